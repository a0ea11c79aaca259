"""What a block of the frozen FLUX keeps for its backward."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

POLICIES = ("none", "attention-out", "full")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Runs blocks by a policy.

    Attributes:
        policy: "none" keeps what the backward reads; "attention-out" keeps a block's input and what
            its attention gave, and recomputes the rest; "full" keeps the input alone.
        draws: something in the blocks draws random numbers, as LoRA's dropout, and must draw the
            same again.
    """

    policy: str
    draws: bool = False

    def __call__(self, block: Callable[..., Any], *args: Any) -> Any:
        """``block(*args)``."""
        if self.policy == "none" or not torch.is_grad_enabled():
            return block(*args)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.draws}
        if self.policy == "attention-out":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)
        return checkpoint(block, *args, **options)


def _keep_attention(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if op is torch.ops.sda_fast.hierarchical_attention.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
