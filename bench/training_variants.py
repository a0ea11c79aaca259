"""Who takes part in ``bench training``: ours, and what one would write today."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.flux_cases import GUIDANCE
from bench.flux_model import COMPILE, compile_blocks, run_stock, use_backend
from bench.flux_train import recomputed
from bench.plain_adapter import plain_adapter, table_turns
from bench.suite import Work
from bench.training_cases import TrainingCase
from bench.training_check import Given
from bench.training_model import Models
from bench.training_step import Embed, TrainingStep, Velocity
from sda_fast.embedding import SemanticEmbedding


@dataclass(frozen=True, slots=True)
class TrainingWork(Work):
    """Work, with what all variants of a case need.

    Attributes:
        case: which.
        models: shared.
        pictures: [B, 3, H, W] uint8 on the CPU.
        given: what the transformer takes beside latents, positions and times, and the mask.
    """

    case: TrainingCase = field(kw_only=True)
    models: Models = field(kw_only=True)
    pictures: Tensor = field(kw_only=True)
    given: Given = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class Ready:
    """A variant set up for a case.

    Attributes:
        step: what is timed.
        notes: fields of its record that come up on the way.
    """

    step: TrainingStep
    notes: dict[str, Any] = field(default_factory=dict)


Ways = tuple[Embed, Velocity]


@dataclass(frozen=True, slots=True)
class TrainingVariant:
    """One way through adapter and transformer.

    Attributes:
        name: in records and options.
        label: in tables.
        prepare: sets it up. Raises Unavailable.
        recompute: what is recomputed in the backward: "none", "attention-out" or "full".
        gpu: it needs one.
        compiled: that takes seconds.
    """

    name: str
    label: str
    prepare: Callable[[TrainingWork], Ways]
    recompute: str = "none"
    gpu: bool = False
    compiled: bool = False

    def ready(self, work: TrainingWork) -> Ready:
        """Set up for a case."""
        return Ready(TrainingStep(work.models, work.pictures, *self.prepare(work)))


def _ours(policy: str) -> Callable[[TrainingWork], Ways]:
    def prepare(work: TrainingWork) -> Ways:
        adapter, fast, tree = work.models.adapter, work.models.frozen.fast, work.case.flux.tree
        pooled = work.given.inputs["pooled_projections"]
        grid = work.models.encoder.grid(*work.case.picture, max(work.models.encoder.patch_sizes))
        options: Any = {"grid": work.case.flux.grid, "guidance": GUIDANCE, "checkpoint": policy}

        def velocity(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            return fast.velocity(x_t, t, SemanticEmbedding(tokens, tree, pooled), **options)

        return lambda features: adapter(features, grid), velocity

    return prepare


def _stock(compiled: bool = False) -> Callable[[TrainingWork], Ways]:
    """diffusers' blocks, the dense mask, every block recomputed, the adapter in plain torch."""

    def prepare(work: TrainingWork) -> Ways:
        models, given = work.models, work.given
        twin = models.frozen.twin()
        use_backend(twin, "native")
        twin.enable_gradient_checkpointing(recomputed)
        turns = table_turns(given.places, models.head_dim)
        read: Any = lambda features: plain_adapter(models.adapter, features, turns)
        if compiled:
            compile_blocks(twin)
            read = torch.compile(read, **COMPILE)

        def velocity(x_t: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
            own = {"hidden_states": x_t, "timestep": t, "encoder_hidden_states": tokens.to(x_t)}
            return run_stock(twin, given.inputs | own, given.mask)

        return lambda features: read(features.float()), velocity

    return prepare


def _every_variant() -> tuple[TrainingVariant, ...]:
    new = TrainingVariant
    return (
        new("ours", "**ours**", _ours("none")),
        new("ours-attention-out", "**ours**, all but attention recomputed",
            _ours("attention-out"), "attention-out"),
        new("stock", "stock: dense mask, all recomputed, eager adapter", _stock(), "full"),
        new("stock-compiled", "that, blocks and adapter compiled", _stock(True), "full",
            gpu=True, compiled=True),
    )  # fmt: skip


VARIANTS = {variant.name: variant for variant in _every_variant()}
"""All, by name, in the order of the tables."""
