"""The parts of what a stock diffusers Flux pipeline takes in place of a prompt.

The mask reaches every double and single block as ``joint_attention_kwargs["attention_mask"]``.
"""

import torch
from torch import Tensor

from sda_fast.coords import check_int


def patch_grid(height: int, width: int, patch: int, name: str = "") -> tuple[int, int]:
    """Image tokens of a picture as (rows, columns).

    Args:
        height: pixels, a positive multiple of patch.
        width: likewise.
        patch: pixels along one image token; 16 for FLUX.
        name: what goes before the names of the arguments in an error.

    Raises:
        ValueError: a side is not such a multiple.
    """
    check_int("patch", patch, least=1)
    for side, pixels in ((f"{name}height", height), (f"{name}width", width)):
        if check_int(side, pixels, least=1) % patch:
            raise ValueError(
                f"{side} must be a multiple of the {patch} pixels of an image token, got {pixels}"
            )
    return height // patch, width // patch


def append_text(tokens: Tensor, text: Tensor | None) -> Tensor:
    """[B, N, C] positions and [1 or B, T, C] text embeddings -> [B, N + T, C] in tokens' dtype.

    Raises:
        ValueError: text has another shape or holds a NaN or an infinity.
    """
    if text is None:
        return tokens
    batch, _, channels = tokens.shape
    if text.ndim != 3 or text.shape[0] not in (1, batch) or text.shape[2] != channels:
        raise ValueError(
            f"text must be [1 or {batch}, T, {channels}] like the tokens, got {list(text.shape)}"
        )
    check_finite("text", text)
    return torch.cat([tokens, text.to(tokens).expand(batch, -1, -1)], dim=1)


def pooled_vector(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """[1 or B, P] -> [B, P] in tokens' dtype and on their device.

    Raises:
        ValueError: there is none, it has another shape, or it holds a NaN or an infinity.
    """
    if pooled is None:
        raise ValueError(
            "pooled must be given, here or with the embedding: the [1 or B, P] vector that FLUX "
            "takes beside the txt stream, usually CLIP's embedding of the empty prompt; got None"
        )
    batch = tokens.shape[0]
    if pooled.ndim != 2 or pooled.shape[0] not in (1, batch):
        raise ValueError(f"pooled must be [1 or {batch}, P], got {list(pooled.shape)}")
    check_finite("pooled", pooled)
    return pooled.to(tokens).expand(batch, -1)


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse anything but finite floats.

    Raises:
        ValueError: the dtype is not a floating one, or there is a NaN or an infinity.
    """
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} values that are NaN or infinite")
