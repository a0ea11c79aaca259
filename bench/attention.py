"""Joint attention under the hierarchy against everything else that computes it, timed.

``python -m bench attention`` on one GPU: forward and forward with backward, time and peak memory of
our operator, of torch's and others' attention with the same mask, and of the best kernels without
one, the speed of light. ``--small`` goes through all of it on a CPU.
"""

import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.cases import Case, names, select
from bench.check import Yardstick, yardstick
from bench.circumstances import circumstances
from bench.cost import attention_bytes, attention_flops
from bench.measure import Deadline, Graph, Step, attention_step, peak_bytes, quantiles, take_turns
from bench.nvml import card
from bench.records import Record, append_record
from bench.roofs import measure_roofs
from bench.variants import VARIANTS, Ready, Unavailable, Variant, dense_mask

PASSES = {"forward": False, "forward+backward": True}
"""Whether the backward is in, by the name in records."""
RESERVE = 0.05
"""Part of the limit that is kept for timing what is ready when it nears."""
FILE = "attention.jsonl"
REFUSALS = (Unavailable, ValueError, NotImplementedError, RuntimeError, ImportError)
"""How a variant says that it cannot do a case; anything else is a failure of it."""


class DeviceLost(Exception):
    """The GPU answers no more, as after an illegal access: nothing can be measured from here on."""


@dataclass(slots=True)
class Entry:
    """One variant in one pass: on its way to a record.

    Attributes:
        variant: who.
        status: of the record: "ok", "skipped" (it cannot, or there was no time) or "failed".
        reason: why it is not "ok".
        step: what will be timed.
        graph: the step is a CUDA graph.
        peak: bytes.
    """

    variant: Variant
    status: str = "ok"
    reason: str | None = None
    step: Step | None = None
    graph: bool = False
    peak: int | None = None

    def give_up(self, status: str, reason: str) -> None:
        """It will not be timed."""
        self.status, self.reason, self.step = status, " ".join(reason.split())[:400], None


@dataclass(frozen=True, slots=True)
class Attention:
    """The suite: who is measured, how, and until when.

    Attributes:
        variants: in the order they are set up.
        device: where.
        reps: turns of each.
        deadline: no more is begun after it.
        reserve_s: seconds before the deadline when nothing more is set up.
        about: fields that all records share.
    """

    variants: Sequence[Variant]
    device: torch.device
    reps: int
    deadline: Deadline = field(default_factory=Deadline)
    reserve_s: float = 0.0
    about: Record = field(default_factory=dict)

    def measure(self, case: Case) -> Iterator[Record]:
        """The records of a case, one a pass and variant, after each pass.

        Raises:
            DeviceLost: an error of a variant took the device with it; its record has come first.
        """
        torch.compiler.reset()  # else cases add up to the limit of recompilations
        inputs = case.inputs(self.device)
        rulers = {True: yardstick(inputs, dense_mask(case, self.device)[0, 0])}
        if not all(variant.masked for variant in self.variants):
            rulers[False] = yardstick(inputs, None)
        ready: dict[str, Ready] = {}
        try:
            for name in PASSES:
                entries = [Entry(variant) for variant in self.variants]
                yield from self._one_pass(case, name, entries, _Work(inputs, rulers, ready))
        finally:
            dense_mask.cache_clear()

    def _one_pass(
        self, case: Case, pass_name: str, entries: list[Entry], work: "_Work"
    ) -> Iterator[Record]:
        lost = self._set_up_all(entries, case, PASSES[pass_name], work)
        times, nvml = {}, None
        if not lost:
            try:
                times, nvml = self._time(entries)
            except RuntimeError as error:
                lost = f"while all were timed: {error}"
        for entry in entries:
            if lost and entry.step is not None:
                entry.give_up("failed", f"the device was lost, {lost}")
            ready = work.ready.get(entry.variant.name)
            yield {
                "suite": "attention",
                "op": "hierarchical_attention",
                "case": case.name,
                "variant": entry.variant.name,
                "label": entry.variant.label,
                "masked": entry.variant.masked,
                "pass": pass_name,
                "status": entry.status,
                "reason": entry.reason,
                **_spread(times.get(entry.variant.name, [])),
                "graph": entry.graph,
                "flops": attention_flops(case, entry.variant.masked, PASSES[pass_name]),
                "bytes": attention_bytes(case, PASSES[pass_name]),
                "peak_bytes": entry.peak,
                "setup_ms": ready and ready.setup_ms,
                "mask_bytes": ready and ready.mask_bytes,
                "nvml": nvml,
                **self.about,
            }
        if lost:
            raise DeviceLost(f"{case.name}, {pass_name}: {lost}")

    def _set_up_all(
        self, entries: Sequence[Entry], case: Case, backward: bool, work: "_Work"
    ) -> str | None:
        """Set up one after the other; who took the device with it, None if nobody did."""
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        lost = None
        for entry in entries:
            if lost:
                entry.give_up("skipped", f"the device was lost, {lost}")
            elif self.deadline.left() < self.reserve_s:
                entry.give_up("skipped", "no time was left")
            else:
                self._set_up(entry, case, backward, work, pool)
                if not self._alive():
                    lost = f"in {entry.variant.name}"
                    entry.give_up("failed", f"the device was lost, {lost}: {entry.reason}")
        return lost

    def _set_up(self, entry: Entry, case: Case, backward: bool, work: "_Work", pool: Any) -> None:
        """Bring an entry to where it can be timed, or note why not."""
        variant = entry.variant
        if variant.gpu and self.device.type != "cuda":
            return entry.give_up("skipped", "it needs a CUDA device")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if variant.name not in work.ready:
                    work.ready[variant.name] = variant.prepare(case, work.inputs[0])
                step = attention_step(work.ready[variant.name].attend, work.inputs, backward)
                step()  # compiles what there is to compile
                entry.peak = peak_bytes(step, self.device)
                self._capture(entry, step, pool)
                faults = work.rulers[variant.masked].faults(_results(entry.step))
                if faults:
                    entry.give_up("failed", "wrong: " + "; ".join(faults))
            except torch.OutOfMemoryError as error:
                entry.give_up("failed", f"out of memory: {error}")
            except REFUSALS as error:
                told = dict.fromkeys(str(w.message) for w in said if w.category is UserWarning)
                entry.give_up("skipped", "; ".join([str(error) or repr(error), *told]))
            except Exception as error:  # a variant's fault must not end the run
                entry.give_up("failed", f"{type(error).__name__}: {error}")
        if entry.step is None and self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _capture(self, entry: Entry, step: Step, pool: Any) -> None:
        """As a graph where that can be done."""
        entry.step = step
        if self.device.type == "cuda":
            try:
                entry.step, entry.graph = Graph(step, pool), True
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                entry.reason = " ".join(f"timed without a graph: {error}".split())[:400]

    def _time(self, entries: Sequence[Entry]) -> tuple[dict[str, list[float]], Record | None]:
        """Milliseconds by variant, and what the card said of itself before and after."""
        steps = {entry.variant.name: entry.step for entry in entries if entry.step is not None}
        before = card(self.device)
        times = take_turns(steps, self.device, self.reps, self.deadline)
        after = card(self.device)
        return times, None if before is None else {"before": before, "after": after}

    def _alive(self) -> bool:
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Work:
    """What the passes of a case share: q, k, v, d_out; yardsticks by masked; variants set up."""

    inputs: list[Tensor]
    rulers: dict[bool, Yardstick]
    ready: dict[str, Ready]


def _results(step: Step | None) -> tuple[Tensor, ...]:
    return step.fresh() if isinstance(step, Graph) else step() if step is not None else ()


def _spread(times: list[float]) -> Record:
    p20, p50, p80 = quantiles(times) if times else (None, None, None)
    return {"reps": len(times), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def run(suite: Attention, cases: Sequence[Case], out: Path) -> list[Record]:
    """Measure case after case, each record written as soon as it is there; stop in time."""
    records: list[Record] = []
    for number, case in enumerate(cases):
        if suite.deadline.left() < suite.reserve_s:
            print(f"no time left for {names(cases[number:])}")
            break
        print(f"{case.name}: S = {case.seq_len}, {suite.deadline.left():.0f} s left", flush=True)
        try:
            for record in suite.measure(case):
                append_record(out, record)
                records.append(record)
                print(_line(record), flush=True)
        except DeviceLost as error:
            print(f"the device was lost in {error}")
            break
        except torch.OutOfMemoryError as error:  # of the inputs or of the yardstick
            print(f"{case.name} does not fit: {error}")
    return records


def _line(record: Record) -> str:
    head = f"  {record['pass']:17}{record['variant']:22}"
    if record["p50_ms"] is None:
        return f"{head}{record['status']}: {record['reason']}"
    rate = record["flops"] / record["p50_ms"] / 1e9
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:9.1f} MiB"
    return f"{head}{record['p50_ms']:9.4f} ms {rate:8.1f} TFLOP/s{peak}"


def choose(text: str) -> list[Variant]:
    """Variants by name, separated by commas; all for "all".

    Raises:
        ValueError: there is none of a name.
    """
    chosen = list(VARIANTS) if text == "all" else text.split(",")
    unknown = [name for name in chosen if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return [VARIANTS[name] for name in chosen]


def main(
    cases: Annotated[
        str | None, typer.Option(help="Groups goals, flux, small; names; patterns: a,b-*,c.")
    ] = None,
    variants: Annotated[str, typer.Option(help="Names, separated by commas.")] = "all",
    reps: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 50,
    limit_s: Annotated[float, typer.Option(help="Stop after so many seconds.")] = 540.0,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder; records are appended to {FILE} in it.")
    ] = None,
    small: Annotated[bool, typer.Option(help="Cases of milliseconds, on a CPU, too.")] = False,
    commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
) -> None:
    """Time joint attention against its competitors; one record a case, pass and variant."""
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        chosen = select(cases or ("small" if small else "goals"))
        if not on_gpu and not small:
            raise ValueError("there is no CUDA device; --small goes through small cases on a CPU")
        competing = choose(variants)
    except ValueError as error:
        print(f"bench attention: {error}")
        raise typer.Exit(2) from error
    about = circumstances(device)
    if commit and about["commit"] == "unknown":
        about["commit"] = commit
    about["roofs"] = measure_roofs(device)
    print(_roofs(about), flush=True)
    deadline, reserve = Deadline(start + limit_s), RESERVE * limit_s
    suite = Attention(competing, device, reps, deadline, reserve, about)
    folder = out or Path("out/bench" if small else "bench/results")
    records = run(suite, chosen, folder / FILE)
    print(f"{len(records)} records in {folder / FILE}")
    wrong = [r for r in records if r["status"] == "failed" and r["variant"].startswith("ours")]
    if wrong or not any(r["status"] == "ok" for r in records):
        raise typer.Exit(1)


def _roofs(about: Record) -> str:
    copy, matmul = about["roofs"]["copy"] / 1e12, about["roofs"]["matmul"] / 1e12
    where = about["gpu"] or f"{about['processor']} CPU"
    return f"{where}: copy {copy:.3f} TB/s, matmul {matmul:.2f} TFLOP/s, torch {about['torch']}"
