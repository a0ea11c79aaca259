"""Joint attention by the project's kernels: each pass of each implementation, from its launches.

fused: the kernels do everything. split: the image keys go to the vendor's dense kernel, for all
queries that see all of them, and the kernels add the rest: exactly, since attention over two sets
of keys merges by lse, and since a backward fed with the merged out and lse gives exact shares.
"""

from torch import Tensor

from csrc_triton.tiles import HALF, Problem, choose_implementation, choose_tile
from sda_fast.ops.joint_lists import Layout, key_lists, query_lists
from sda_fast.ops.vendor_attention import vendor_backward, vendor_forward

QKV = tuple[Tensor, Tensor, Tensor]


def forward(qkv: QKV, out: Tensor, layout: Layout, scale: float, implementation: str) -> Tensor:
    """Write out [B, S, H, D], last stride 1, and return lse [B, H, S] f32.

    Args:
        qkv: [B, S, H, D] each, last stride 1.
        out: as q, written whole; no memory of q, k or v.
        layout: of the sequence.
        scale: positive.
        implementation: "auto", "fused" or "split".
    """
    from csrc_triton.joint_attention import launch_joint_attention

    q, k, v = qkv
    implementation = _resolve(implementation, "forward", q, layout)
    tile = choose_tile("forward", implementation, problem(q, layout))
    split = implementation == "split"
    lists = query_lists(layout, tile, split, q.device)
    if not split:
        return launch_joint_attention(q, k, v, out, scale, lists, tile)
    first = layout.dense_from or 0
    dense = vendor_forward(q[:, first:], k[:, layout.num_txt :], v[:, layout.num_txt :], scale)
    return launch_joint_attention(q, k, v, out, scale, lists, tile, (*dense, first))


def backward(
    d_out: Tensor,
    qkv: QKV,
    results: tuple[Tensor, Tensor],
    layout: Layout,
    scale: float,
    implementation: str,
    deterministic: bool = True,
) -> QKV:
    """Return dq, dk and dv, [B, S, H, D] contiguous.

    Args:
        d_out: [B, S, H, D], any strides.
        qkv: of the forward pass.
        results: its out and lse.
        layout: of the sequence.
        scale: positive.
        implementation: "auto", "fused" or "split"; the forward pass may have had another.
        deterministic: bitwise the same at every call; False lets "split" take a faster vendor
            kernel that is not.
    """
    from csrc_triton.joint_attention_backward import (
        launch_joint_attention_dkdv,
        launch_joint_attention_dq,
    )

    (q, k, v), (out, lse) = qkv, results
    if d_out.stride(-1) != 1:
        d_out = d_out.contiguous()
    implementation = _resolve(implementation, "backward", q, layout)
    split = implementation == "split"
    dq_tile, dkdv_tile = (
        choose_tile(kernel, implementation, problem(q, layout)) for kernel in ("dq", "dkdv")
    )
    to_q = query_lists(layout, dq_tile, split, q.device)
    to_k = key_lists(layout, dkdv_tile, split, q.device)
    dq_partial = dkdv_partial = None
    if split:
        first, num_txt = layout.dense_from or 0, layout.num_txt
        p_dq, p_dk, p_dv = vendor_backward(
            d_out[:, first:],
            (q[:, first:], k[:, num_txt:], v[:, num_txt:]),
            out[:, first:],
            lse[..., first:].contiguous(),
            scale,
            deterministic,
        )
        if p_dv.stride() != p_dk.stride():
            p_dk, p_dv = p_dk.contiguous(), p_dv.contiguous()
        dq_partial, dkdv_partial = (p_dq, first), (p_dk, p_dv, num_txt)
    dq, delta = launch_joint_attention_dq(
        d_out, qkv, out, lse, scale, to_q, dq_tile, dq_partial
    )  # fmt: skip
    dk, dv = launch_joint_attention_dkdv(
        d_out, qkv, lse, delta, scale, to_k, dkdv_tile, dkdv_partial
    )  # fmt: skip
    return dq, dk, dv


def mask_bytes(q: Tensor, layout: Layout, implementation: str) -> int:
    """Bytes of the lists that forward and backward keep on the device, for tensors like q."""
    lists = {}
    for kernel, build in (("forward", query_lists), ("dq", query_lists), ("dkdv", key_lists)):
        direction = "forward" if kernel == "forward" else "backward"
        chosen = _resolve(implementation, direction, q, layout)
        tile = choose_tile(kernel, chosen, problem(q, layout))
        found = build(layout, tile, chosen == "split", q.device)
        lists[id(found)] = found.nbytes
    return sum(lists.values())


def problem(q: Tensor, layout: Layout) -> Problem:
    """What the table of tiles chooses by."""
    batch, _, heads, head_dim = q.shape
    return Problem(q.dtype, head_dim, layout.num_txt, layout.num_img, batch * heads)


def split_faults(q: Tensor, rule: str) -> list[str]:
    """Every reason why "split" cannot serve these tensors; empty if there is none."""
    faults = []
    if rule == "isolated":
        faults.append(
            "implementation 'split' needs a rule under which image tokens all see each other, "
            f"got rule {rule!r}"
        )
    if q.device.type == "cuda" and q.dtype not in HALF:
        faults.append(f"implementation 'split' needs bfloat16 or float16, got {q.dtype}")
    return faults


def _resolve(implementation: str, direction: str, q: Tensor, layout: Layout) -> str:
    if implementation != "auto":
        return implementation
    chosen = choose_implementation(direction, problem(q, layout))
    return "fused" if chosen == "split" and split_faults(q, layout.rule) else chosen
