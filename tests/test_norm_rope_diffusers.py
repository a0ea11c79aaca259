"""norm_rope against what diffusers' own attention processor hands to its attention kernel."""

import pytest
import torch
from diffusers.models.transformers import transformer_flux

from sda_fast import ops, reference

from .numerics import GRADIENT_CAP


class Attention:
    """diffusers' own attention of one block, and what it hands to the attention kernel."""

    def __init__(self, monkeypatch, two: bool, dtype):
        self.attn = transformer_flux.FluxAttention(
            query_dim=32, heads=2, dim_head=16, bias=True, eps=1e-6, pre_only=not two,
            added_kv_proj_dim=32 if two else None, context_pre_only=False if two else None,
        ).to(dtype)  # fmt: skip
        for name, parameter in self.attn.named_parameters():
            if "norm" in name:
                parameter.data = (1 + 0.3 * torch.randn(16)).to(dtype)
        self.lengths = (5, 12) if two else (17,)
        self.inputs = [torch.randn(2, n, 32, dtype=dtype) for n in self.lengths]
        ids = torch.cat([torch.zeros(5, 3), torch.cartesian_prod(*map(torch.arange, (1, 3, 4)))])
        self.rotary = transformer_flux.FluxPosEmbed(10000, [4, 6, 6])(ids.float())
        monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", self.attend)

    def attend(self, q, k, v, **_):
        self.joint = q, k, v
        return q

    def of_diffusers(self):
        self.attn(self.inputs[-1], *self.inputs[:-1], image_rotary_emb=self.rotary)
        return self.joint

    def ours(self, op=ops.norm_rope):
        attn = self.attn
        of_img = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
        both = [of_img]
        if len(self.inputs) == 2:
            added = attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
            both = [(added, (attn.norm_added_q, attn.norm_added_k)), of_img]
        streams = [
            torch.cat([linear(x) for linear in linears], -1)
            for x, (linears, _) in zip(self.inputs, both, strict=True)
        ]
        return op(streams, [tuple(n.weight for n in norms) for _, norms in both], self.rotary, 2)


@pytest.mark.parametrize("two", [True, False])
def test_is_what_diffusers_computes_bit_for_bit(two, monkeypatch):
    attention = Attention(monkeypatch, two, torch.float32)
    cos, sin = attention.rotary
    assert all(torch.equal(t[:, ::2], t[:, 1::2]) for t in (cos, sin))
    for a, b in zip(attention.ours(), attention.of_diffusers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("two", [True, False])
def test_gradients_are_those_of_diffusers(two, monkeypatch):
    attention = Attention(monkeypatch, two, torch.float64)
    leaves = [p for n, p in attention.attn.named_parameters() if "out" not in n]
    joint = attention.of_diffusers()
    grads = [torch.randn_like(t) for t in joint]
    theirs = torch.autograd.grad(joint, leaves, grads)
    found = torch.autograd.grad(attention.ours(), leaves, grads)
    # diffusers rounds to float32 before it rotates
    for a, b in zip(found, theirs, strict=True):
        assert (a - b).abs().max() <= GRADIENT_CAP[torch.float32] * b.abs().max()


@pytest.mark.parametrize("two", [True, False])
def test_in_bf16_it_is_as_close_as_diffusers_or_closer(two, monkeypatch):
    """It rounds once, diffusers after the norm, too."""
    attention = Attention(monkeypatch, two, torch.bfloat16)
    ours, theirs = attention.ours(), attention.of_diffusers()
    assert torch.equal(ours[2], theirs[2])
    exact_op = lambda streams, norms, rotary, heads: reference.norm_rope(
        [s.double() for s in streams], [tuple(w.double() for w in p) for p in norms], rotary, heads
    )
    for a, b, exact in zip(ours[:2], theirs[:2], attention.ours(exact_op)[:2], strict=True):
        error, other = ((t - exact).square().mean() for t in (a, b))
        assert error < other
        rounding = torch.finfo(torch.bfloat16).eps * exact.abs().max()
        assert (a - exact).abs().max() <= rounding / 2 * (1 + 1e-4)
