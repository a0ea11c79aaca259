"""A test of the tests: planted faults that the yardstick must notice."""

import pytest
import torch
from torch import Tensor

from sda_fast.hierarchy import Hierarchy

from .numerics import LOGITS, assert_attention, draw_qkv

H, W, HEAD_DIM = 5, 7, 16
TREE = Hierarchy((3, 2, 1))
LENGTH = TREE.num_tokens + H * W
MASK = TREE.attention_mask(H, W)  # of the rules the only one that is not symmetric


class Attention(torch.autograd.Function):
    """Attention with every step in sight, so that one at a time can be spoilt."""

    @staticmethod
    def forward(ctx, q, k, v, fault: str):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = MASK.clone()
        if fault == "mask transposed":
            mask = MASK.T
        if fault == "rule of another kind":
            mask = TREE.attention_mask(H, W, "local")
        if fault == "patches in column order":
            txt, img = torch.arange(LENGTH).split((TREE.num_tokens, H * W))
            order = torch.cat([txt, img.view(H, W).T.flatten()])
            mask = MASK[order][:, order]
        if fault == "last key lost":
            mask[:, -1] = False
        if fault == "keys rounded":
            k = k.bfloat16().to(k)
        if fault == "keys of the first sample":
            k = k[:1].expand_as(k)
        scale = HEAD_DIM**-0.5 * (1.02 if fault == "scale off" else 1.0)
        logits = q @ k.mT * scale
        largest = logits.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
        if fault == "pivot from a tile that some rows do not see":
            tile = slice(11, 19)
            seen = logits[..., tile].masked_fill(~mask[:, tile], float("-inf"))
            largest = seen.amax(-1, keepdim=True)
        if fault == "no pivot":
            largest = torch.zeros_like(largest)
        hidden = -100.0 if fault == "finite sentinel" else float("-inf")
        p = torch.exp(logits.masked_fill(~mask, hidden) - largest)
        total = p.sum(-1, keepdim=True)
        lse = (total.log() + largest).squeeze(-1)
        p = p / total
        out = p @ v
        ctx.save_for_backward(q, k, v, p, out)
        ctx.fault, ctx.scale = fault, scale
        return out.transpose(1, 2), lse / 0.693147 if fault == "lse in base 2" else lse

    @staticmethod
    def backward(ctx, d_out: Tensor, _d_lse: Tensor):
        q, k, v, p, out = ctx.saved_tensors
        if ctx.fault == "strides of the output gradient ignored":
            d_out = d_out.as_strided(d_out.shape, torch.empty(d_out.shape).stride())
        d_out = d_out.transpose(1, 2)
        delta = (d_out * out).sum(-1, keepdim=True)
        if ctx.fault == "delta forgotten":
            delta = 0.0
        ds = p * (d_out @ v.mT - delta) * ctx.scale
        transposed = ds.mT, p.mT
        if ctx.fault == "lists of the backward not the transpose":
            transposed = ds.mT * MASK, p.mT * MASK
        grads = ds @ k, transposed[0] @ q, transposed[1] @ d_out
        return *(t.transpose(1, 2) for t in grads), None


FAULTS = [
    "mask transposed",
    "rule of another kind",
    "patches in column order",
    "last key lost",
    "keys rounded",
    "keys of the first sample",
    "scale off",
    "pivot from a tile that some rows do not see",
    "no pivot",
    "finite sentinel",
    "lse in base 2",
    "strides of the output gradient ignored",
    "delta forgotten",
    "lists of the backward not the transpose",
]


def notices(fault: str, logits: float | str) -> bool:
    shape = 2, LENGTH, 2, HEAD_DIM
    qkv = draw_qkv(shape, shape, logits, torch.float32)
    d_out = torch.randn(2, LENGTH, 2, HEAD_DIM + 8)[..., :HEAD_DIM]

    def right(q, k, v):
        return Attention.apply(q, k, v, "none")

    assert_attention(right, right, qkv, d_out)
    try:
        assert_attention(lambda q, k, v: Attention.apply(q, k, v, fault), right, qkv, d_out)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(fault):
    """For one of the inputs at least that every operator is tried on."""
    assert any(notices(fault, logits) for logits in LOGITS)
