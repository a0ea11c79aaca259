"""Rotated attention by the project's kernels: each pass from its launches."""

from functools import lru_cache

import torch
from torch import Tensor

from csrc_triton.tiles import ROPE3D_KERNELS, Problem, choose_parts, choose_tile
from sda_fast.ops.device_tables import kept_table

QKV = tuple[Tensor, Tensor, Tensor]
Places = tuple[Tensor, Tensor, tuple[int, int, int], float]
"""Coordinates of queries and keys, axes and theta; None where nothing turns."""
Norms = tuple[Tensor, Tensor]
"""Weights of the norms of queries and keys, [D] each; None where there are none."""


def forward(
    qkv: QKV, places: Places | None, norms: Norms | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return out [B, N, H, D] contiguous and lse [B, H, N] f32.

    Args:
        qkv: q [B, N, H, D], k and v [B, S, H, D], last stride 1.
        places: where the tokens are, or None.
        norms: what scales their norms, or None.
        lengths: [B] int32, keys of each sample, or None.
        scale: positive.
    """
    from csrc_triton.rope3d_attention import launch_rope3d_attention

    q, k, v = qkv
    lengths = None if lengths is None else lengths.contiguous()
    tile = choose_tile("rope3d_forward", "", _problem(q, k))
    parts = _parts(q, k, tile.block_m, tile.block_n)
    transforms = _transforms(places, norms, q)
    return launch_rope3d_attention(q, k, v, transforms, lengths, scale, parts, tile)


def backward(
    d_out: Tensor,
    qkv: QKV,
    results: tuple[Tensor, Tensor],
    places: Places | None,
    norms: Norms | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous, and the gradients of norms; the same bits at every call.

    Without norms the last two are empty.

    Args:
        d_out: [B, N, H, D], any strides.
        qkv: of the forward pass.
        results: its out and lse.
        places: as in the forward pass.
        norms: likewise.
        lengths: likewise.
        scale: likewise.
    """
    from csrc_triton.rope3d_attention_backward import launch_rope3d_dkdv, launch_rope3d_dq

    q, k, _ = qkv
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    lengths = None if lengths is None else lengths.contiguous()
    transforms = _transforms(places, norms, q)
    tile, to_keys = (choose_tile(name, "", _problem(q, k)) for name in ROPE3D_KERNELS[1:])
    parts = _parts(q, k, tile.block_m, tile.block_n)
    dq, delta, d_of_q = launch_rope3d_dq(
        d_out, qkv, results, transforms, lengths, scale, parts, tile
    )  # fmt: skip
    dk, dv, d_of_k = launch_rope3d_dkdv(
        d_out, qkv, results[1], delta, transforms, lengths, scale, to_keys
    )  # fmt: skip
    dtypes = (q.dtype, q.dtype) if norms is None else (norms[0].dtype, norms[1].dtype)
    return dq, dk, dv, d_of_q.to(dtypes[0]), d_of_k.to(dtypes[1])


def _problem(q: Tensor, k: Tensor) -> Problem:
    from csrc_triton.rope3d import padded_width

    batch, num_queries, heads, head_dim = q.shape
    return Problem(q.dtype, padded_width(head_dim), num_queries, k.shape[1], batch * heads)


def _parts(q: Tensor, k: Tensor, block_m: int, block_n: int) -> int:
    tiles = -(-q.shape[1] // block_m) * q.shape[0] * q.shape[2]
    return choose_parts(tiles, -(-k.shape[1] // block_n), _processors(q.device))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere those of an H100, so that the same parts are tried."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def _transforms(places: Places | None, norms: Norms | None, q: Tensor):  # noqa: ANN202
    from csrc_triton.rope3d import Transform, pair_table

    of_q, of_k = (None, None) if norms is None else (norms[0].contiguous(), norms[1].contiguous())
    if places is None:
        return Transform(weight=of_q), Transform(weight=of_k)
    q_coords, k_coords, *turns = places
    wanted = "rope3d_attention must run once with these axes"
    pairs = kept_table(pair_table, tuple(turns), q, wanted)
    of_q = Transform(q_coords.contiguous(), pairs, of_q)
    return of_q, Transform(k_coords.contiguous(), pairs, of_k)
