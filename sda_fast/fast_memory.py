"""What FastFlux needs of a GPU's memory, and what it says when that is not there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# widths C of bf16 numbers a token: what the largest point of a forward holds at once, and what the
# blocks keep for their backward (by arithmetic over fast_blocks; the MLP is four wide)
AT_ONCE = 20
KEPT_DOUBLE, KEPT_SINGLE = 17, 13
KEPT_OF_ATTENTION = 2


def forward_bytes(transformer: Any, tokens: int) -> int:
    """About what a forward holds at once for one picture, beside the weights.

    Args:
        transformer: a FluxTransformer2DModel.
        tokens: S, text and image.
    """
    return AT_ONCE * tokens * transformer.inner_dim * transformer.dtype.itemsize


def kept_bytes(transformer: Any, tokens: int, checkpoint: str) -> int:
    """About what one picture keeps between forward and backward.

    Args:
        transformer: a FluxTransformer2DModel.
        tokens: S, text and image.
        checkpoint: the policy: "none", "attention-out" or "full".
    """
    double, single = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    widths = {
        "none": KEPT_DOUBLE * double + KEPT_SINGLE * single,
        "attention-out": (2 + KEPT_OF_ATTENTION) * (double + single),
        "full": 2 * (double + single),
    }[checkpoint]
    return widths * tokens * transformer.inner_dim * transformer.dtype.itemsize


def room_for(transformer: Any, each: int) -> str:
    """How many pictures fit a GPU beside the weights, in words.

    Args:
        transformer: whose weights are there already.
        each: bytes that a picture takes.
    """
    weights = sum(p.nbytes for p in transformer.parameters() if p.device.type != "cpu")
    size = _size_of(transformer.device)
    fit = max(0, int((size - weights) // each))
    return (
        f"a picture takes about {each / 2**30:.2f} GiB, and beside the weights "
        f"({weights / 2**30:.1f} of {size / 2**30:.1f} GiB) about {fit} fit, if nothing else is "
        "there"
    )


@contextmanager
def advised(what: str, advice: Callable[[], str]) -> Iterator[None]:
    """While open, an error for want of memory says what was being made and what would fit.

    Args:
        what: was being made.
        advice: what would fit, worked out when it is needed.

    Raises:
        torch.OutOfMemoryError: with such a message.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"out of memory in {what}: {advice()} ({error})") from error


def _size_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
