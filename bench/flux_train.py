"""Training through a frozen FLUX: forward, and the gradient of the embedding, with random weights.

``python -m bench flux-train`` on one GPU, at the size of FLUX.1-dev: pictures a second, the share
of what the card can do, memory a picture, how many pictures fit. ``--small`` goes through it with a
tiny transformer on a CPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.command import command
from bench.flux import COMPILE_S, free_memory
from bench.flux_cases import GUIDANCE, FluxCase, select_flux_train
from bench.flux_check import Noted, flux_yardstick, step_and_gradient
from bench.flux_model import Frozen, Shelf, compile_blocks, run_stock, use_backend
from bench.measure import Deadline, Results, Step
from bench.records import Record
from bench.suite import Suite, Unavailable, Work
from sda_fast.cost import flux_flops
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_checkpoints import POLICIES

MOST_PICTURES, MOST_SMALL = 32, 3
"""Where the search for the largest batch ends; on a CPU, where nothing shows that it is full."""
MOST_TRIES = 10


@dataclass(frozen=True, slots=True)
class TrainWork(Work):
    """Work, with what all variants of a case need.

    Attributes:
        case: which.
        frozen: the transformer.
        mask: [1, 1, S, S] bool.
        given: inputs of the transformer's forward; its positions require a gradient.
        d_out: gradient of the velocity.
    """

    case: FluxCase = field(kw_only=True)
    frozen: Frozen = field(kw_only=True)
    mask: Tensor = field(kw_only=True)
    given: dict[str, Tensor] = field(kw_only=True)
    d_out: Tensor = field(kw_only=True)

    @classmethod
    def make(cls, case: FluxCase, frozen: Frozen, device: torch.device) -> "TrainWork":
        """Inputs and the gradient of the velocity, the same at every call."""
        given = case.inputs(device)
        given["encoder_hidden_states"].requires_grad_()
        generator = torch.Generator(device).manual_seed(1)
        latents = given["hidden_states"]
        one = torch.randn(
            latents[: case.distinct].shape,
            generator=generator,
            dtype=case.dtype,
            device=device,
        )
        d_out = one.repeat(case.batch // case.distinct, 1, 1)
        mask = case.tree.attention_mask(*case.grid)[None, None].to(device)
        return cls([], {}, case=case, frozen=frozen, mask=mask, given=given, d_out=d_out)


@dataclass(frozen=True, slots=True)
class Ready:
    """A variant set up for a case.

    Attributes:
        velocity: of the case's inputs, differentiable in the positions.
        work: of the case.
        notes: fields of its record that come up on the way.
    """

    velocity: Callable[[], Tensor]
    work: TrainWork
    notes: dict[str, Any] = field(default_factory=dict)

    def step(self) -> Results:
        """The velocity and the gradient of the positions."""
        out = self.velocity()
        leaf = self.work.given["encoder_hidden_states"]
        return out.detach(), *torch.autograd.grad(out, leaf, self.work.d_out)


@dataclass(frozen=True, slots=True)
class TrainVariant:
    """One way to the velocity and its gradient.

    Attributes:
        name: in records and options.
        label: in tables.
        prepare: sets it up. Raises Unavailable.
        gpu: it needs one.
        compiled: that takes seconds.
        everywhere: it takes part in cases that are no goals, too.
        searched: its largest batch is looked for.
    """

    name: str
    label: str
    prepare: Callable[[TrainWork], Callable[[], Tensor]]
    gpu: bool = False
    compiled: bool = False
    everywhere: bool = False
    searched: bool = False


def _ours(policy: str) -> Callable[[TrainWork], Callable[[], Tensor]]:
    def prepare(work: TrainWork) -> Callable[[], Tensor]:
        given, fast = work.given, work.frozen.fast
        pooled = given["pooled_projections"]
        emb = SemanticEmbedding(given["encoder_hidden_states"], work.case.tree, pooled)
        options: Any = {"grid": work.case.grid, "guidance": GUIDANCE, "checkpoint": policy}
        return lambda: fast.velocity(given["hidden_states"], given["timestep"], emb, **options)

    return prepare


def _stock(
    compiled: bool = False, checkpointed: bool = False
) -> Callable[[TrainWork], Callable[[], Tensor]]:
    def prepare(work: TrainWork) -> Callable[[], Tensor]:
        twin = work.frozen.twin()
        use_backend(twin, "native")
        if checkpointed:
            twin.enable_gradient_checkpointing(recomputed)
        if compiled:
            compile_blocks(twin)
        return lambda: run_stock(twin, work.given, work.mask)

    return prepare


def recomputed(block: Callable[..., Any], *args: Any) -> Any:
    """``block(*args)``, done again in the backward; for ``enable_gradient_checkpointing``."""
    # a block draws nothing: no random state to keep
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)


def _every_variant() -> tuple[TrainVariant, ...]:
    ours = [
        TrainVariant(
            f"ours-{policy}", f"**FastFlux**, checkpoint {policy}", _ours(policy),
            everywhere=True, searched=policy == "none",
        )
        for policy in POLICIES
    ]  # fmt: skip
    return (
        *ours,
        TrainVariant("stock", "stock eager, dense mask", _stock()),
        TrainVariant(
            "stock-checkpointed", "stock eager, dense mask, checkpointed",
            _stock(checkpointed=True),
        ),
        TrainVariant(
            "compiled-mask", "compiled, dense mask", _stock(compiled=True), gpu=True, compiled=True
        ),
    )  # fmt: skip


VARIANTS = {variant.name: variant for variant in _every_variant()}
"""All, by name, in the order of the tables."""


@dataclass(frozen=True, slots=True)
class FluxTrain(Suite):
    """Forward and gradient of the embedding; weights are frozen.

    Attributes:
        shelf: where the transformer stays from case to case.
    """

    shelf: Shelf = field(default_factory=Shelf)

    def measure(self, case: FluxCase) -> Iterator[Record]:
        """See Suite; a case has a number of turns of its own."""
        return Suite.measure(replace(self, reps=min(self.reps, case.reps)), case)

    def competitors(self, case: FluxCase) -> Sequence[TrainVariant]:
        """All where there is a goal, else ours."""
        return [variant for variant in self.variants if variant.everywhere or case.goal]

    def passes(self) -> Mapping[str, bool]:
        """Forward and backward together."""
        return {"forward+backward": True}

    def work(self, case: FluxCase) -> TrainWork:
        """Inputs; the ruler knows the velocity and the gradient of the positions."""
        free_memory(self.device)
        frozen = self.shelf.get(case, self.device)
        work = TrainWork.make(case, frozen, self.device)
        compute = step_and_gradient(work.mask, work.d_out)
        names = "velocity", "d_positions"
        given = {name: t.detach() for name, t in work.given.items()}
        work.rulers[True] = flux_yardstick(frozen, case, given, names, compute)
        return work

    def prepare(self, variant: TrainVariant, case: FluxCase, work: TrainWork) -> Ready:
        """See Suite."""
        if variant.compiled and self.deadline.left() < 2 * COMPILE_S:  # a backward, too
            raise Unavailable("no time was left to compile it")
        return Ready(variant.prepare(work), work)

    def step(self, ready: Ready, work: Work, backward: bool) -> Step:
        """See Suite."""
        return ready.step

    def ruler(self, variant: TrainVariant, work: TrainWork) -> Noted:  # pyrefly: ignore
        """See Suite."""
        return Noted(work.rulers[True], work.ready[variant.name].notes)  # pyrefly: ignore

    def captures(self, variant: TrainVariant) -> bool:
        """A training step is launched."""
        return False

    def facts(
        self, case: FluxCase, variant: TrainVariant, ready: Ready | None, backward: bool
    ) -> Record:
        """FLOPs of both passes, how far off the results are, and how many pictures fit."""
        largest, by = None, None
        if ready is not None and variant.searched and case.goal and "error" in ready.notes:
            largest, by = self._largest_batch(variant, ready.work)
        flops = flux_flops(case.config, case.num_txt, case.num_img, backward=True)
        return {
            "suite": "flux-train",
            "op": "flux",
            "kind": case.kind,
            "batch": case.batch,
            "flops": case.batch * flops,
            "error": None if ready is None else ready.notes.get("error"),
            "largest_batch": largest,
            "largest_batch_by": by,
        }

    def _largest_batch(self, variant: TrainVariant, work: TrainWork) -> tuple[int, str]:
        """Pictures that fit, and what ended the search."""

        def fits(batch: int) -> bool:
            free_memory(self.device)
            try:
                case = replace(work.case, batch=batch)
                more = TrainWork.make(case, work.frozen, self.device)
                Ready(variant.prepare(more), more).step()
            except torch.OutOfMemoryError:
                return False
            return True

        most = MOST_PICTURES if self.device.type == "cuda" else MOST_SMALL
        found = largest(fits, 2 * work.case.batch, most, self.deadline)
        free_memory(self.device)
        return found

    def rate(self, record: Record) -> str:
        """Pictures a second, and TFLOP/s."""
        took = record["p50_ms"]
        speed = f"{1e3 * record['batch'] / took:8.2f} pictures/s"
        most = record["largest_batch"]
        most = "" if most is None else f" at most {most} ({record['largest_batch_by']})"
        return f"{speed}{record['flops'] / took / 1e9:8.1f} TFLOP/s{most}"


def largest(
    fits: Callable[[int], bool], first: int, most: int, deadline: Deadline
) -> tuple[int, str]:
    """The largest number that fits, if what fits does so in smaller numbers too.

    Args:
        fits: may take seconds.
        first: tried first.
        most: none above it is tried.
        deadline: none is tried after it.

    Returns:
        The number, 0 if none fits; and what it is bounded by: "memory", "bound", "time" or "tries".
    """
    low, high, at = 0, most + 1, min(first, most)
    for _ in range(MOST_TRIES):
        if high - low == 1:
            return low, "bound" if low == most else "memory"
        if deadline.left() <= 0:
            return low, "time"
        if fits(at):
            low = at
        else:
            high = at
        # twice as many while all fit, then halve what is open
        at = min(most, 2 * low) if high > most else (low + high) // 2
    if high - low == 1:
        return low, "bound" if low == most else "memory"
    return low, "tries"


main = command(
    "flux-train",
    "Time forward and gradient through a frozen FLUX; one record a case and variant.",
    FluxTrain,
    VARIANTS,
    select_flux_train,
)
