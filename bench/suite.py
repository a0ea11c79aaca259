"""How suites measure variants side by side: checked, captured, timed in turns, recorded."""

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.cases import names
from bench.measure import Deadline, Graph, Step, peak_bytes, quantiles, take_turns
from bench.nvml import card
from bench.records import Record, append_record

PASSES = {"forward": False, "forward+backward": True}
"""Whether the backward is in, by the name in records."""
RESERVE = 0.05
"""Part of the limit that is kept for timing what is ready when it nears."""


class Unavailable(Exception):
    """A variant cannot take part here; says why."""


REFUSALS = (Unavailable, ValueError, NotImplementedError, RuntimeError, ImportError)
"""How a variant says that it cannot do a case; anything else is a failure of it."""


class DeviceLost(Exception):
    """The GPU answers no more, as after an illegal access: nothing can be measured from here on."""


class Ruler(Protocol):
    """Knows what is exact and how far from it a result may be."""

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """What is wrong with the results of a step; empty if nothing is."""
        ...


@dataclass(frozen=True, slots=True)
class Work:
    """What the passes of a case share.

    Attributes:
        inputs: whatever the suite's steps take.
        rulers: by what the suite's ``ruler`` goes by.
        ready: variants set up, by name.
    """

    inputs: list[Tensor]
    rulers: dict[Any, Ruler]
    ready: dict[str, Any] = field(default_factory=dict)


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

    variant: Any
    status: str = "ok"
    reason: str | None = None
    step: Step | None = None
    graph: bool = False
    peak: int | None = None

    def give_up(self, status: str, reason: str) -> None:
        """It will not be timed."""
        self.status, self.reason, self.step = status, " ".join(reason.split())[:400], None


@dataclass(frozen=True, slots=True)
class Suite:
    """Who is measured, how, and until when; what is measured is said by those that inherit.

    Attributes:
        variants: in the order they are set up.
        device: where.
        reps: turns of each.
        deadline: no more is begun after it.
        reserve_s: seconds before the deadline when nothing more is set up.
        about: fields that all records share.
    """

    variants: Sequence[Any]
    device: torch.device
    reps: int
    deadline: Deadline = field(default_factory=Deadline)
    reserve_s: float = 0.0
    about: Record = field(default_factory=dict)

    def competitors(self, case: Any) -> Sequence[Any]:
        """Those of the variants that a case is for."""
        return self.variants

    def passes(self) -> Mapping[str, bool]:
        """Those that are measured: whether the backward is in, by name."""
        return PASSES

    def work(self, case: Any) -> Work:
        """Inputs and rulers of a case."""
        raise NotImplementedError

    def prepare(self, variant: Any, case: Any, work: Any) -> Any:
        """Set a variant up for a case. Raises one of REFUSALS where it cannot take part."""
        raise NotImplementedError

    def step(self, ready: Any, work: Any, backward: bool) -> Step:
        """What is timed of a variant that was set up."""
        raise NotImplementedError

    def ruler(self, variant: Any, work: Work) -> Ruler:
        """What the results of a variant are held to."""
        raise NotImplementedError

    def facts(self, case: Any, variant: Any, ready: Any, backward: bool) -> Record:
        """Fields of a record that only this suite has; ready is None if it was not set up."""
        raise NotImplementedError

    def captures(self, variant: Any) -> bool:
        """Whether a variant is timed as a CUDA graph, where that can be."""
        return True

    def rate(self, record: Record) -> str:
        """How fast that was, for the terminal."""
        raise NotImplementedError

    def done(self, case: Any) -> None:
        """Free what was kept for a case."""

    def measure(self, case: Any) -> Iterator[Record]:
        """The records of a case, one a pass and variant, after each pass.

        Raises:
            DeviceLost: an error of a variant took the device with it; its record has come first.
        """
        torch.compiler.reset()  # else cases add up to the limit of recompilations
        try:
            work = self.work(case)
            for name, backward in self.passes().items():
                entries = [Entry(variant) for variant in self.competitors(case)]
                yield from self._one_pass(case, (name, backward), entries, work)
        finally:
            self.done(case)

    def _one_pass(
        self, case: Any, measured: tuple[str, bool], entries: list[Entry], work: Work
    ) -> Iterator[Record]:
        pass_name, backward = measured
        lost = self._set_up_all(entries, case, backward, work)
        times, nvml = {}, None
        if not lost:
            try:
                times, nvml = self._time(entries)
            except RuntimeError as error:
                lost = f"while all were timed: {error}"
        for entry in entries:
            variant = entry.variant
            if lost and entry.step is not None:
                entry.give_up("failed", f"the device was lost, {lost}")
            yield {
                "case": case.name,
                "variant": variant.name,
                "label": variant.label,
                "pass": pass_name,
                "status": entry.status,
                "reason": entry.reason,
                **_spread(times.get(variant.name, [])),
                "graph": entry.graph,
                "peak_bytes": entry.peak,
                "nvml": nvml,
                **self.facts(case, variant, work.ready.get(variant.name), backward),
                **self.about,
            }
        if lost:
            raise DeviceLost(f"{case.name}, {pass_name}: {lost}")

    def _set_up_all(
        self, entries: Sequence[Entry], case: Any, backward: bool, work: Work
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

    def _set_up(self, entry: Entry, case: Any, backward: bool, work: Work, pool: Any) -> None:
        """Bring an entry to where it can be timed, or note why not."""
        variant = entry.variant
        if variant.gpu and self.device.type != "cuda":
            return entry.give_up("skipped", "it needs a CUDA device")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if variant.name not in work.ready:
                    work.ready[variant.name] = self.prepare(variant, case, work)
                step = self.step(work.ready[variant.name], work, backward)
                step()  # compiles what there is to compile
                entry.peak = peak_bytes(step, self.device)
                self._capture(entry, step, pool)
                faults = self.ruler(variant, work).faults(_results(entry.step))
                if faults:
                    entry.give_up("failed", "wrong: " + "; ".join(faults))
            except torch.OutOfMemoryError as error:
                entry.give_up("failed", f"out of memory: {error}")
            except REFUSALS as error:
                told = dict.fromkeys(str(w.message) for w in said if w.category is UserWarning)
                became = "failed" if _is_our_fault(entry.variant, error) else "skipped"
                entry.give_up(became, "; ".join([str(error) or repr(error), *told]))
            except Exception as error:  # a variant's fault must not end the run
                entry.give_up("failed", f"{type(error).__name__}: {error}")
        if entry.step is None and self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def _capture(self, entry: Entry, step: Step, pool: Any) -> None:
        """As a graph where that can be done."""
        entry.step = step
        if self.device.type == "cuda" and self.captures(entry.variant):
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


def _results(step: Step | None) -> tuple[Tensor, ...]:
    return step.fresh() if isinstance(step, Graph) else step() if step is not None else ()


def _spread(times: list[float]) -> Record:
    p20, p50, p80 = quantiles(times) if times else (None, None, None)
    return {"reps": len(times), "p20_ms": p20, "p50_ms": p50, "p80_ms": p80}


def run(suite: Suite, cases: Sequence[Any], out: Path) -> list[Record]:
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
                print(_line(record, suite.rate), flush=True)
        except DeviceLost as error:
            print(f"the device was lost in {error}")
            break
        except torch.OutOfMemoryError as error:  # of the inputs or of the yardstick
            print(f"{case.name} does not fit: {error}")
    return records


def _is_our_fault(variant: Any, error: Exception) -> bool:
    """Ours refuses by ValueError and NotImplementedError; what else it raises is a fault."""
    refused = isinstance(error, (Unavailable, ValueError, NotImplementedError))
    return variant.name.startswith("ours") and not refused


def _line(record: Record, rate: Callable[[Record], str]) -> str:
    head = f"  {record['pass']:17}{record['variant']:22}"
    if record["p50_ms"] is None:
        return f"{head}{record['status']}: {record['reason']}"
    peak = "" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:9.1f} MiB"
    return f"{head}{record['p50_ms']:9.4f} ms {rate(record)}{peak}"
