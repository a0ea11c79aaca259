"""What ``bench tune`` sweeps of rotated attention: the tiles of its kernels, and the parts of keys.

For each kernel all shapes, in as many parts of the keys as the rule says, ``tiles.choose_parts``;
then the fastest shapes in other numbers of parts, to see what the rule costs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bench.attempts import Attempt, Tuning
from bench.check import RATIO, Places, yardstick
from bench.measure import Results, Step
from bench.qformer_cases import QFormerCase
from bench.records import Record
from bench.tune_exact import Exact, float32_limit
from bench.tune_table import entries, parts_table
from csrc_triton import rope3d_attention, rope3d_attention_backward
from csrc_triton.rope3d import Transform, padded_width, pair_table
from csrc_triton.tiles import ROPE3D_KERNELS, Problem, Tile, choose_parts, choose_tile
from sda_fast import reference
from sda_fast.reference.rope3d_attention import default_axes

SWEEP = {
    "rope3d_forward": (
        (128, 64, 8, 2), (64, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 3),
        (64, 128, 8, 2), (64, 64, 8, 3), (128, 128, 8, 3), (128, 32, 8, 2), (128, 64, 8, 4),
    ),
    "rope3d_dq": (
        (128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3),
        (128, 32, 8, 3), (128, 128, 8, 2), (64, 128, 4, 2), (64, 32, 4, 2),
    ),
    "rope3d_dkdv": (
        (64, 64, 4, 2), (32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 2), (16, 64, 4, 3),
        (64, 64, 8, 2), (32, 64, 4, 3), (32, 128, 8, 3), (16, 64, 4, 2),
    ),
}  # fmt: skip
"""block_m, block_n, num_warps and num_stages to try, by worth: a sweep that is cut short has tried
the first ones. At D = 64 the compile gate takes them all; it refuses forward tiles of 4 warps,
where ptxas for sm_90a serialises the products."""
SMALL_SWEEP = {
    "rope3d_forward": ((16, 32, 4, 1),),
    "rope3d_dq": ((16, 32, 4, 1),),
    "rope3d_dkdv": ((16, 32, 4, 1),),
}
IN_PARTS = 3
"""Of the tiles of a sweep, so many are tried in other numbers of parts."""
PARTS = (0, 0.5, 1, 1.5, 2, 3, 4)
"""Those numbers, as multiples of what the rule says; 0 stands for one part."""
RESULTS = {
    "rope3d_forward": ("out", "lse"),
    "rope3d_dq": ("dq", "delta"),
    "rope3d_dkdv": ("dk", "dv"),
}
"""What a kernel writes."""
SPLIT = ("rope3d_forward", "rope3d_dq")
"""Kernels whose keys are split."""
PROCESSORS = 132
"""Of an H100; the operator counts them where there is no GPU, too."""
THETA = 1e4


@dataclass(frozen=True, slots=True)
class Trial:
    """How a kernel is launched.

    Attributes:
        tile: with what.
        parts: of the keys; None where they are not split.
        by_rule: parts is what the rule says.
    """

    tile: Tile
    parts: int | None = None
    by_rule: bool = True


@dataclass(frozen=True, slots=True)
class Subject:
    """One case with all that its kernels take, exact where another kernel would have made it.

    Attributes:
        case: the attention.
        inputs: q [B, N, H, D], k and v [B, S, H, D] and the gradient of out, as q.
        transforms: of queries and of keys: rotations, without a norm.
        exact: what its kernels must give.
    """

    case: QFormerCase
    inputs: list[Tensor]
    transforms: tuple[Transform, Transform]
    exact: Exact

    @classmethod
    def of(cls, case: QFormerCase, device: torch.device) -> "Subject":
        """Draw the inputs and work out the exact results."""
        inputs, places = case.inputs(device), case.places(device)
        pairs = pair_table(default_axes(case.head_dim), THETA).to(device)
        turns = Transform(places[0].contiguous(), pairs), Transform(places[1].contiguous(), pairs)
        lse, limit = _exact_lse(inputs, places)
        ruler = yardstick(inputs, None, places)
        return cls(case, inputs, turns, Exact.of(ruler, lse, inputs[3], limit))

    @property
    def problem(self) -> Problem:
        """What the choice of a tile depends on."""
        case = self.case
        width = padded_width(case.head_dim)
        positions = case.tree.num_tokens
        return Problem(case.dtype, width, positions, case.seq_len, case.batch * case.heads)

    def sizes(self, tile: Tile) -> tuple[int, int, int]:
        """What the rule goes by: tiles of queries, blocks of keys and multiprocessors."""
        problem, device = self.problem, self.inputs[0].device
        tiles = -(-problem.num_txt // tile.block_m) * problem.batch_heads
        processors = PROCESSORS
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        return tiles, -(-problem.num_img // tile.block_n), processors

    def by_rule(self, kernel: str, tile: Tile) -> Trial:
        """A tile as the operator would launch it."""
        return Trial(tile, choose_parts(*self.sizes(tile)) if kernel in SPLIT else None)

    def kernel_step(self, kernel: str, trial: Trial) -> Step:
        """Launch one kernel alone, the sum of its parts included: to what RESULTS names."""
        q, k, v, d_out = self.inputs
        qkv, results, delta = (q, k, v), (self.exact.out, self.exact.lse), self.exact.delta
        given = self.transforms, None, self.case.head_dim**-0.5
        split = *given, trial.parts or 1, trial.tile

        def forward() -> Results:
            return rope3d_attention.launch_rope3d_attention(*qkv, *split)

        def dq() -> Results:
            return rope3d_attention_backward.launch_rope3d_dq(d_out, qkv, results, *split)[:2]

        def dkdv() -> Results:
            return rope3d_attention_backward.launch_rope3d_dkdv(
                d_out, qkv, results[1], delta, *given, trial.tile
            )[:2]  # fmt: skip

        return dict(zip(ROPE3D_KERNELS, (forward, dq, dkdv), strict=True))[kernel]

    def faults(self, names: Sequence[str], results: Results) -> list[str]:
        """What is wrong with results of these names, of NAMES, lse and delta; empty if nothing."""
        return self.exact.faults(names, results)


@dataclass(frozen=True, slots=True)
class Rope3dTuning(Tuning):
    """Rotated attention; see Tuning."""

    op: ClassVar[str] = "rope3d_attention"

    def measure(self, case: QFormerCase) -> Iterator[Record]:
        """The records of a case: of every tile of every kernel, then of other parts."""
        subject = Subject.of(case, self.turns.device)
        for kernel in ROPE3D_KERNELS:
            if self.turns.is_late():
                print(f"  no time left for {kernel}")
                return
            yield from self._sweep(subject, kernel)

    @staticmethod
    def report(records: Sequence[Record]) -> list[str]:
        """Entries to be pasted, and the time of each number of parts, as comments."""
        comments = [f"# {row}" for row in parts_table(records)]
        return ["# ROPE3D_ENTRIES", *entries(records), "", *comments]

    def _sweep(self, subject: Subject, kernel: str) -> Iterator[Record]:
        """All shapes of a kernel, then the fastest of them in other numbers of parts."""
        current = choose_tile(kernel, "", subject.problem)
        tiles = shapes(kernel, current, self.small)

        def attempt(trial: Trial, number: int) -> Attempt:
            return Attempt(
                lambda: subject.kernel_step(kernel, trial),
                lambda results: subject.faults(RESULTS[kernel], results),
                self._about(subject, kernel, trial)
                | {"current": trial.tile == current, "round": number},
            )

        def in_parts(records: Sequence[Record]) -> list[Trial]:
            timed = [record for record in records if record["p50_ms"] is not None]
            timed.sort(key=lambda record: record["p50_ms"])
            if kernel not in SPLIT or not timed:
                return []
            found = [Tile(**record["tile"]) for record in timed[:IN_PARTS]]
            split = [trial for tile in found for trial in other_parts(subject, kernel, tile)]
            # who stands is timed again, in turns with the new ones
            return list(dict.fromkeys([subject.by_rule(kernel, current), *split]))

        first = [subject.by_rule(kernel, tile) for tile in tiles]
        yield from self.turns.two_rounds(attempt, first, in_parts)

    def _about(self, subject: Subject, kernel: str, trial: Trial) -> Record:
        case, problem = subject.case, subject.problem
        tiles, blocks, processors = subject.sizes(trial.tile)
        return {
            "suite": "tune",
            "op": self.op,
            "case": case.name,
            "head_dim": case.head_dim,
            "width": problem.head_dim,
            "dtype": str(case.dtype).removeprefix("torch."),
            "num_txt": problem.num_txt,
            "num_img": problem.num_img,
            "batch_heads": problem.batch_heads,
            "pass": "forward" if kernel == "rope3d_forward" else "backward",
            "implementation": None,
            "kernel": kernel,
            "tile": asdict(trial.tile),
            "tiles": tiles,
            "blocks": blocks,
            "processors": processors,
            "parts": trial.parts,
            "by_rule": trial.by_rule,
            **self.about,
        }


def shapes(kernel: str, current: Tile, small: bool) -> list[Tile]:
    """The tile that stands in the table, then those of the sweep; nothing in them is masked."""
    sweep = SMALL_SWEEP[kernel] if small else SWEEP[kernel]
    tiles = [Tile(*shape, current.block_masked) for shape in sweep]
    return list(dict.fromkeys([current, *tiles]))


def other_parts(subject: Subject, kernel: str, tile: Tile) -> list[Trial]:
    """A tile as the rule has it, then in other numbers of parts, none of them without keys."""
    rule = subject.by_rule(kernel, tile)
    _, blocks, _ = subject.sizes(tile)
    wanted = [max(1, int((rule.parts or 1) * times)) for times in PARTS]
    # a part is of whole blocks, the same number in all but the last
    numbers = [-(-blocks // -(-blocks // number)) for number in wanted]
    others = [number for number in dict.fromkeys(numbers) if number != rule.parts]
    return [rule, *(Trial(tile, number, by_rule=False) for number in others)]


def _exact_lse(inputs: Sequence[Tensor], places: Places) -> tuple[Tensor, float]:
    """lse [B, H, N] f32, exact but for its rounding, and how far a kernel's may be off.

    A kernel multiplies turned operands that are rounded, as plain torch does: in half precision
    its lse is held to plain torch's error.
    """
    exact, error, logit = [], 0.0, 0.0
    scale, eps = inputs[0].shape[-1] ** -0.5, torch.finfo(torch.float32).eps
    for b in range(inputs[0].shape[0]):
        q, k, v = (t[b : b + 1] for t in inputs[:3])
        _, right = reference.rope3d_attention(
            q.double(), k.double(), v.double(), *places, return_lse=True
        )  # fmt: skip
        _, plain = reference.rope3d_attention(q, k, v, *places, return_lse=True)
        exact.append(right.float())
        error = max(error, (plain.double() - right).abs().max().item())
        norms = [t.double().norm(dim=-1).max().item() for t in (q, k)]
        logit = max(logit, 2 * eps * scale * norms[0] * norms[1])
    lse = torch.cat(exact)
    allowed = RATIO["out"] * error + eps * lse.abs().max().item()
    if inputs[0].dtype == torch.float32:
        allowed = min(allowed, float32_limit(lse))
    return lse, allowed + logit
