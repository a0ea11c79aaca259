"""Which tile is the fastest for each kernel of joint attention, among those that are right?

``python -m bench tune`` on one GPU: for each case, implementation and kernel a frozen sweep of
tiles, each checked against the reference before it is timed, alone, without the kernels around it.
Then whole passes with the best tiles: which implementation wins. Prints what to paste into
csrc_triton/tiles.py. ``--small`` goes through all of it on a CPU, in Triton's interpreter.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bench.attempts import Attempt, Turns, run
from bench.cases import SMALL, Case, select
from bench.check import NAMES, Yardstick, yardstick
from bench.circumstances import circumstances
from bench.cost import attention_bytes, attention_flops
from bench.measure import Deadline, Results, Step
from bench.records import Record
from bench.tune_table import entries, fastest, preferred
from bench.variants import dense_mask
from csrc_triton import joint_attention, joint_attention_backward
from csrc_triton.tiles import HEAD_DIMS, IMPLEMENTATIONS, KERNELS, Tile, choose_tile, forced
from sda_fast.ops import joint_kernels
from sda_fast.ops.inputs import interpreted
from sda_fast.ops.joint_lists import Layout, key_lists, query_lists
from sda_fast.ops.vendor_attention import vendor_backward, vendor_forward
from sda_fast.reference.dense_attention import dense_attention

SWEEP = {
    "forward": (
        (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 4, 2), (64, 64, 4, 3),
        (128, 64, 8, 4), (64, 128, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4),
    ),
    "dq": (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3),
        (64, 64, 4, 2), (128, 64, 8, 4), (64, 128, 8, 2),
    ),
    "dkdv": (
        (32, 128, 8, 3), (64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2),
        (32, 128, 8, 4), (32, 64, 8, 3),
    ),
}  # fmt: skip
"""block_m, block_n, num_warps and num_stages to try, by worth: a sweep that is cut short has tried
the first ones."""
NARROW_SWEEP = {
    "forward": ((128, 64, 4, 3), (128, 128, 8, 4)),
    "dq": ((128, 64, 4, 2), (128, 128, 8, 3)),
    "dkdv": ((64, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 64, 4, 2)),
}
"""Tried too below D = 128, where they spill or do not fit shared memory (ptxas for sm_90a)."""
SMALL_SWEEP = {
    "forward": ((16, 16, 4, 1), (32, 32, 4, 2)),
    "dq": ((64, 16, 4, 2),),
    "dkdv": ((16, 64, 4, 1),),
}
MASKED = (64, 32, 16)
"""block_masked to try with the fastest shape."""
DEFAULT = ",".join(
    f"flux-{case}-tree32.8.4" for case in ("1024-b1", "2048-b1", "512-b1", "1024-b4")
)
"""Cases by worth."""
DIRECTIONS = {"forward": ("forward",), "backward": ("dq", "dkdv")}
"""The kernels of each pass."""
FLOAT32_CAP = 2e-5
"""Error of lse and delta, relative to the largest magnitude, absolute below 1."""
RESERVE = 0.1
"""Part of the limit that is kept for timing what is ready when it nears."""
FILE = "tune.jsonl"


@dataclass(frozen=True)
class Subject:
    """One case with all that its kernels take, exact where another kernel would have made it.

    Attributes:
        case: the attention.
        layout: of its sequence.
        inputs: q, k, v and the gradient of out, [B, S, H, D].
        ruler: what is exact and how close is close enough.
        out: [B, S, H, D], exact but for the rounding to its dtype.
        lse: [B, H, S] f32, likewise.
        delta: [B, H, S] f32, rowsum(dO * out).
    """

    case: Case
    layout: Layout
    inputs: list[Tensor]
    ruler: Yardstick
    out: Tensor
    lse: Tensor
    delta: Tensor

    @classmethod
    def of(cls, case: Case, device: torch.device) -> "Subject":
        """Draw the inputs and work out the exact results."""
        tree = case.tree
        layout = Layout(
            tree.tokens_per_node, case.h, case.w, case.rule, case.extra_text,
            tree.num_levels - 1, (),
        )  # fmt: skip
        inputs = case.inputs(device)
        mask = dense_mask(case, device)[0, 0]
        ruler = yardstick(inputs, mask)
        lse = torch.empty(case.batch, case.heads, case.seq_len, device=device)
        for b in range(case.batch):
            for h in range(case.heads):
                q, k, v = (t[b : b + 1, :, h : h + 1].double() for t in inputs[:3])
                lse[b, h] = dense_attention(q, k, v, mask)[1][0, 0]
        dense_mask.cache_clear()
        out = ruler.exact["out"].to(case.dtype)
        delta = (out.float() * inputs[3].float()).sum(-1).transpose(1, 2).contiguous()
        return cls(case, layout, inputs, ruler, out, lse, delta)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.case.head_dim**-0.5

    def kernel_step(self, kernel: str, implementation: str, tile: Tile) -> Step:
        """Launch one kernel alone: to (out, lse), (dq, delta) or (dk, dv)."""
        q, k, v, d_out = self.inputs
        split = implementation == "split"
        lists = (key_lists if kernel == "dkdv" else query_lists)(self.layout, tile, split, q.device)
        options = self.scale, lists, tile

        def forward() -> Results:
            out = torch.empty_like(q)
            partial = self._vendor_out if split else None
            return out, joint_attention.launch_joint_attention(q, k, v, out, *options, partial)

        def dq() -> Results:
            return joint_attention_backward.launch_joint_attention_dq(
                d_out, (q, k, v), self.out, self.lse, *options,
                self._vendor_gradients[0] if split else None,
            )  # fmt: skip

        def dkdv() -> Results:
            return joint_attention_backward.launch_joint_attention_dkdv(
                d_out, (q, k, v), self.lse, self.delta, *options,
                self._vendor_gradients[1] if split else None,
            )  # fmt: skip

        return {"forward": forward, "dq": dq, "dkdv": dkdv}[kernel]

    def pass_step(self, direction: str, implementation: str, tiles: dict[str, Tile]) -> Step:
        """A whole pass as the operator runs it: to (out, lse) or (dq, dk, dv)."""
        q, k, v, d_out = self.inputs

        def step() -> Results:
            with forced(**tiles):
                if direction == "forward":
                    out = torch.empty_like(q)
                    last = self.layout, self.scale, implementation
                    return out, joint_kernels.forward((q, k, v), out, *last)
                return joint_kernels.backward(
                    d_out, (q, k, v), (self.out, self.lse), self.layout, self.scale, implementation
                )

        return step

    def faults(self, names: Sequence[str], results: Results) -> list[str]:
        """What is wrong with results of these names, of NAMES, lse and delta; empty if nothing."""
        named = dict(zip(names, results, strict=True))
        found = self.ruler.faults([named.get(name, self.ruler.exact[name]) for name in NAMES])
        for name, exact in (("lse", self.lse), ("delta", self.delta)):
            if name in named:
                error = (named[name] - exact).abs().max().item()
                allowed = FLOAT32_CAP * max(1.0, exact.abs().max().item())
                if not error <= allowed:  # NaN is not
                    found.append(f"{name} is off by {error:.2e}, allowed {allowed:.2e}")
        return found

    @cached_property
    def _vendor_out(self) -> joint_attention.Partial:
        q, k, v, _ = self.inputs
        first, num_txt = self.layout.dense_from or 0, self.layout.num_txt
        return *vendor_forward(q[:, first:], k[:, num_txt:], v[:, num_txt:], self.scale), first

    @cached_property
    def _vendor_gradients(self) -> tuple[tuple[Tensor, int], tuple[Tensor, Tensor, int]]:
        q, k, v, d_out = self.inputs
        first, num_txt = self.layout.dense_from or 0, self.layout.num_txt
        dq, dk, dv = vendor_backward(
            d_out[:, first:], (q[:, first:], k[:, num_txt:], v[:, num_txt:]), self.out[:, first:],
            self.lse[..., first:].contiguous(), self.scale, True,
        )  # fmt: skip
        return (dq, first), (dk.contiguous(), dv.contiguous(), num_txt)


RESULTS = {"forward": ("out", "lse"), "dq": ("dq", "delta"), "dkdv": ("dk", "dv")}
"""What a kernel writes; the pass "backward" gives dq, dk and dv."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The suite: what is tried and how it is measured.

    Attributes:
        turns: how attempts are measured, and until when.
        small: sweep a few tiles that an interpreter takes.
        about: fields that all records share.
    """

    turns: Turns
    small: bool = False
    about: Record = field(default_factory=dict)

    def measure(self, case: Case) -> Iterator[Record]:
        """The records of a case: of every tile of every kernel, then of whole passes.

        Raises:
            DeviceLost: the device answers no more; what is known has come first.
        """
        subject = Subject.of(case, self.turns.device)
        best: dict[tuple[str, str], Tile] = {}
        for implementation in IMPLEMENTATIONS:
            faults = joint_kernels.split_faults(subject.inputs[0], case.rule)
            if implementation == "split" and faults:
                print(f"  {implementation} is left out: {'; '.join(faults)}")
                continue
            for kernel in KERNELS:
                if self.turns.is_late():
                    print(f"  no time left for {implementation} {kernel}")
                    return
                records = []
                for record in self._sweep(subject, kernel, implementation):
                    records.append(record)
                    yield record
                found = fastest(records, kernel, implementation)
                if found is not None:
                    best[implementation, kernel] = Tile(**found["tile"])
        for direction in DIRECTIONS:
            yield from self._passes(subject, direction, best)

    def _sweep(self, subject: Subject, kernel: str, implementation: str) -> Iterator[Record]:
        """All shapes of a kernel, then the fastest with other sizes of its masked blocks."""
        problem = joint_kernels.problem(subject.inputs[0], subject.layout)
        current = choose_tile(kernel, implementation, problem)
        direction = "forward" if kernel == "forward" else "backward"
        tried: list[Tile] = []
        tiles = shapes(kernel, current, problem.head_dim, self.small)
        for number in (1, 2):
            attempts = [
                Attempt(
                    lambda tile=tile: subject.kernel_step(kernel, implementation, tile),
                    lambda results: subject.faults(RESULTS[kernel], results),
                    self._about(subject.case, direction, implementation)
                    | {"kernel": kernel, "tile": asdict(tile)}
                    | {"current": tile == current, "round": number},
                )
                for tile in tiles
            ]
            records = []
            for record in self.turns.time_all(attempts):
                records.append(record)
                yield record
            tried += tiles
            found = fastest(records, kernel, implementation)
            if found is None:
                return
            best = Tile(**found["tile"])
            more = [tile for tile in with_masked(kernel, best) if tile not in tried]
            if not more:
                return
            # who stands is timed again, in turns with the new ones
            tiles = list(dict.fromkeys([best, current, *more]))

    def _passes(
        self, subject: Subject, direction: str, best: dict[tuple[str, str], Tile]
    ) -> Iterator[Record]:
        """Whole passes with the best tiles, of each implementation that has them all."""
        case, kernels = subject.case, DIRECTIONS[direction]
        names = RESULTS["forward"] if direction == "forward" else NAMES[1:]
        flops, moved = attention_flops(case, True, False), attention_bytes(case, False)
        if direction == "backward":
            flops = attention_flops(case, True, True) - flops
            moved = attention_bytes(case, True) - moved
        attempts = []
        for implementation in IMPLEMENTATIONS:
            if not all((implementation, kernel) in best for kernel in kernels):
                continue
            tiles = {kernel: best[implementation, kernel] for kernel in kernels}
            step = subject.pass_step(direction, implementation, tiles)
            attempts.append(
                Attempt(
                    lambda step=step: step,
                    lambda results: subject.faults(names, results),
                    self._about(case, direction, implementation)
                    | {"kernel": None, "tiles": {name: asdict(t) for name, t in tiles.items()}}
                    | {"flops": flops, "bytes": moved},
                )
            )
        yield from self.turns.time_all(attempts)

    def _about(self, case: Case, direction: str, implementation: str) -> Record:
        return {
            "suite": "tune",
            "op": "hierarchical_attention",
            "case": case.name,
            "head_dim": case.head_dim,
            "dtype": str(case.dtype).removeprefix("torch."),
            "num_img": case.h * case.w,
            "batch_heads": case.batch * case.heads,
            "pass": direction,
            "implementation": implementation,
            **self.about,
        }


def shapes(kernel: str, current: Tile, head_dim: int, small: bool) -> list[Tile]:
    """The tile that stands in the table, then those of the sweep, with masked blocks like its."""
    sweep = SMALL_SWEEP[kernel] if small else SWEEP[kernel]
    if head_dim < 128 and not small:
        sweep += NARROW_SWEEP[kernel]
    inner = 0 if kernel == "dkdv" else 1
    tiles = [Tile(*shape, min(current.block_masked, shape[inner])) for shape in sweep]
    return list(dict.fromkeys([current, *tiles]))


def with_masked(kernel: str, tile: Tile) -> list[Tile]:
    """A tile with each size of masked blocks that divides its inner blocks."""
    inner = tile.block_m if kernel == "dkdv" else tile.block_n
    return [replace(tile, block_masked=size) for size in MASKED if inner % size == 0]


def chosen(cases: str, head_dims: str | None, device: torch.device) -> list[Case]:
    """The cases of a list in each head dim of another, or in their own.

    Raises:
        ValueError: there is no such case, or no kernel for it here.
    """
    found = select(cases)
    if head_dims is not None:
        dims = [int(part) if part.isdecimal() else 0 for part in head_dims.split(",")]
        if not set(dims) <= set(HEAD_DIMS):
            known = ", ".join(map(str, HEAD_DIMS))
            raise ValueError(f"head-dims must be of {known}, got {head_dims!r}")
        found = [replace(case, head_dim=dim) for dim in dims for case in found]
    if device.type == "cuda" and interpreted():
        raise ValueError("TRITON_INTERPRET is set: without it the kernels run on this GPU")
    if device.type == "cpu" and not interpreted():
        raise ValueError(
            "there is no CUDA device; with TRITON_INTERPRET=1 --small goes through a small case "
            "in Triton's interpreter"
        )
    halves = [case.name for case in found if case.dtype != torch.float32]
    if device.type == "cpu" and halves:
        raise ValueError(f"Triton's interpreter needs float32 cases, got {', '.join(halves)}")
    return found


def main(
    cases: Annotated[
        str | None, typer.Option(help="Groups goals, flux, small; names; patterns: a,b-*,c.")
    ] = None,
    head_dims: Annotated[
        str | None, typer.Option(help="D to try, as 64,128; the cases' own unless given.")
    ] = None,
    reps: Annotated[int, typer.Option(min=1, help="Turns of each tile.")] = 25,
    limit_s: Annotated[float, typer.Option(help="Stop after so many seconds.")] = 540.0,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder; records are appended to {FILE} in it.")
    ] = None,
    small: Annotated[bool, typer.Option(help="Few tiles, a small case; on a CPU, too.")] = False,
    commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
) -> None:
    """Sweep the tiles of joint attention's kernels; print entries for csrc_triton/tiles.py."""
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        subjects = chosen(cases or (SMALL[0].name if small else DEFAULT), head_dims, device)
    except ValueError as error:
        print(f"bench tune: {error}")
        raise typer.Exit(2) from error
    about = circumstances(device)
    if commit and about["commit"] == "unknown":
        about["commit"] = commit
    turns = Turns(device, reps, Deadline(start + limit_s), RESERVE * limit_s)
    file = (out or Path("out/bench" if small else "bench/results")) / FILE
    records = run(turns, Tuning(turns, small, about).measure, subjects, file)
    print(f"{len(records)} records in {file}\n")
    print("\n".join([*entries(records), "", *preferred(records)]))
    states = {record["status"] for record in records}
    if "failed" in states or "ok" not in states:
        raise typer.Exit(1)
