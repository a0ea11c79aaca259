"""What ``bench tune`` sweeps of joint attention: the tiles of each implementation's kernels.

For each implementation and kernel all shapes, then the fastest with other sizes of its masked
blocks; then whole passes with the best tiles: which implementation wins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from bench.attempts import Attempt, Tuning
from bench.cases import Case
from bench.check import NAMES, yardstick
from bench.cost import attention_bytes, attention_flops
from bench.measure import Results, Step
from bench.records import Record
from bench.tune_exact import Exact
from bench.tune_table import entries, fastest, preferred
from bench.variants import dense_mask
from csrc_triton import joint_attention, joint_attention_backward
from csrc_triton.tiles import IMPLEMENTATIONS, KERNELS, Tile, choose_tile, forced
from sda_fast.ops import joint_kernels
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
DIRECTIONS = {"forward": ("forward",), "backward": ("dq", "dkdv")}
"""The kernels of each pass."""


@dataclass(frozen=True)
class Subject:
    """One case with all that its kernels take, exact where another kernel would have made it.

    Attributes:
        case: the attention.
        layout: of its sequence.
        inputs: q, k, v and the gradient of out, [B, S, H, D].
        exact: what its kernels must give.
    """

    case: Case
    layout: Layout
    inputs: list[Tensor]
    exact: Exact

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
        return cls(case, layout, inputs, Exact.of(ruler, lse, inputs[3]))

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.case.head_dim**-0.5

    def kernel_step(self, kernel: str, implementation: str, tile: Tile) -> Step:
        """Launch one kernel alone: to (out, lse), (dq, delta) or (dk, dv)."""
        q, k, v, d_out = self.inputs
        out, lse, delta = self.exact.out, self.exact.lse, self.exact.delta
        split = implementation == "split"
        lists = (key_lists if kernel == "dkdv" else query_lists)(self.layout, tile, split, q.device)
        options = self.scale, lists, tile

        def forward() -> Results:
            new = torch.empty_like(q)
            partial = self._vendor_out if split else None
            return new, joint_attention.launch_joint_attention(q, k, v, new, *options, partial)

        def dq() -> Results:
            return joint_attention_backward.launch_joint_attention_dq(
                d_out, (q, k, v), out, lse, *options,
                self._vendor_gradients[0] if split else None,
            )  # fmt: skip

        def dkdv() -> Results:
            return joint_attention_backward.launch_joint_attention_dkdv(
                d_out, (q, k, v), lse, delta, *options,
                self._vendor_gradients[1] if split else None,
            )  # fmt: skip

        return {"forward": forward, "dq": dq, "dkdv": dkdv}[kernel]

    def pass_step(self, direction: str, implementation: str, tiles: dict[str, Tile]) -> Step:
        """A whole pass as the operator runs it: to (out, lse) or (dq, dk, dv)."""
        q, k, v, d_out = self.inputs
        results = self.exact.out, self.exact.lse

        def step() -> Results:
            with forced(**tiles):
                if direction == "forward":
                    out = torch.empty_like(q)
                    last = self.layout, self.scale, implementation
                    return out, joint_kernels.forward((q, k, v), out, *last)
                return joint_kernels.backward(
                    d_out, (q, k, v), results, self.layout, self.scale, implementation
                )

        return step

    def faults(self, names: Sequence[str], results: Results) -> list[str]:
        """What is wrong with results of these names, of NAMES, lse and delta; empty if nothing."""
        return self.exact.faults(names, results)

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
            d_out[:, first:], (q[:, first:], k[:, num_txt:], v[:, num_txt:]),
            self.exact.out[:, first:], self.exact.lse[..., first:].contiguous(), self.scale, True,
        )  # fmt: skip
        return (dq, first), (dk.contiguous(), dv.contiguous(), num_txt)


RESULTS = {"forward": ("out", "lse"), "dq": ("dq", "delta"), "dkdv": ("dk", "dv")}
"""What a kernel writes; the pass "backward" gives dq, dk and dv."""


@dataclass(frozen=True, slots=True)
class JointTuning(Tuning):
    """Joint attention; see Tuning."""

    op: ClassVar[str] = "hierarchical_attention"

    def measure(self, case: Case) -> Iterator[Record]:
        """The records of a case: of every tile of every kernel, then of whole passes."""
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

    @staticmethod
    def report(records: Sequence[Record]) -> list[str]:
        """Entries and what "auto" takes, to be pasted."""
        return ["# ENTRIES", *entries(records), "", "# PREFERRED", *preferred(records)]

    def _sweep(self, subject: Subject, kernel: str, implementation: str) -> Iterator[Record]:
        """All shapes of a kernel, then the fastest with other sizes of its masked blocks."""
        problem = joint_kernels.problem(subject.inputs[0], subject.layout)
        current = choose_tile(kernel, implementation, problem)
        direction = "forward" if kernel == "forward" else "backward"
        tiles = shapes(kernel, current, problem.head_dim, self.small)

        def attempt(tile: Tile, number: int) -> Attempt:
            return Attempt(
                lambda: subject.kernel_step(kernel, implementation, tile),
                lambda results: subject.faults(RESULTS[kernel], results),
                self._about(subject.case, direction, implementation)
                | {"kernel": kernel, "tile": asdict(tile)}
                | {"current": tile == current, "round": number},
            )

        def masked(records: Sequence[Record]) -> list[Tile]:
            found = fastest(records, kernel, implementation)
            if found is None:
                return []
            best = Tile(**found["tile"])
            more = [tile for tile in with_masked(kernel, best) if tile not in tiles]
            # who stands is timed again, in turns with the new ones
            return list(dict.fromkeys([best, current, *more])) if more else []

        yield from self.turns.two_rounds(attempt, tiles, masked)

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
            "op": self.op,
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
