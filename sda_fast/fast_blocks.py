"""FLUX's two kinds of blocks from fused operators: same weights, fewer passes over the tokens.

A block takes and gives its residual together with what the next norm makes of it, so that a gated
residual and the norm behind it are one pass, across blocks too.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sda_fast.flux_modulation import Norm
from sda_fast.ops import gated_ada_norm, norm_rope
from sda_fast.packed_linear import PackedLinear, is_plain

Attend = Callable[..., Tensor]
"""q, k, v [B, S, H, D] -> [B, S, H, D], into ``out`` if that is given."""
Rotary = tuple[Tensor, Tensor]
"""cos and sin, [S, D] float32."""
Stream = tuple[Tensor, Tensor]
"""A residual [B, S, C], and what the next norm makes of it."""


class DoubleBlock:
    """A FluxTransformerBlock: text and image have weights of their own and attend together.

    Args:
        block: of the transformer, whose weights are used as they are at each call.
        fp8: multiply in fp8.

    Attributes:
        products: all of its linears.
    """

    def __init__(self, block: Any, fp8: bool = False) -> None:
        self.block = block
        attn = block.attn
        added = "add_q_proj", "add_k_proj", "add_v_proj"
        self.img_qkv = PackedLinear(
            lambda: _projections(attn, "to_qkv", "to_q", "to_k", "to_v"), fp8
        )
        self.txt_qkv = PackedLinear(lambda: _projections(attn, "to_added_qkv", *added), fp8)
        self.img_out = PackedLinear(lambda: [attn.to_out[0]], fp8)
        self.txt_out = PackedLinear(lambda: [attn.to_add_out], fp8)
        self.img_ff = FeedForward(lambda: block.ff, fp8)
        self.txt_ff = FeedForward(lambda: block.ff_context, fp8)
        self.products = [self.img_qkv, self.txt_qkv, self.img_out, self.txt_out]
        self.products += [*self.img_ff.products, *self.txt_ff.products]

    def __call__(
        self,
        img: Stream,
        txt: Stream,
        modulation: tuple[list[Tensor], list[Tensor]],
        after: tuple[Norm, Norm],
        rotary: Rotary,
        attend: Attend,
    ) -> tuple[Stream, Stream]:
        """Both streams, image first, normed for what comes after.

        Args:
            img: the image's residual and normed residual.
            txt: the text's.
            modulation: shift, scale and gate of both norms, of the image and of the text.
            after: shift and scale of the norms that follow, of the image and of the text.
            rotary: of all tokens, text first.
            attend: the joint attention.
        """
        attn = self.block.attn
        streams = self.txt_qkv(txt[1]), self.img_qkv(img[1])
        weights = (
            (attn.norm_added_q.weight, attn.norm_added_k.weight),
            (attn.norm_q.weight, attn.norm_k.weight),
        )
        q, k, v = norm_rope(streams, weights, rotary, attn.heads)
        out = attend(q, k, v).flatten(2)
        num_txt = txt[0].shape[1]
        img_out, txt_out = self.img_out(out[:, num_txt:]), self.txt_out(out[:, :num_txt])
        return (
            self.img_ff(img[0], img_out, modulation[0], after[0]),
            self.txt_ff(txt[0], txt_out, modulation[1], after[1]),
        )


class SingleBlock:
    """A FluxSingleTransformerBlock: attention and MLP side by side over all tokens.

    Args:
        block: of the transformer, whose weights are used as they are at each call.
        fp8: multiply in fp8.

    Attributes:
        products: all of its linears.
    """

    def __init__(self, block: Any, fp8: bool = False) -> None:
        self.block = block
        self.fp8 = fp8
        attn = block.attn
        self.qkv_mlp = PackedLinear(
            lambda: [*_projections(attn, "to_qkv", "to_q", "to_k", "to_v"), block.proj_mlp], fp8
        )
        self.out = PackedLinear(lambda: [block.proj_out], fp8)
        self.products = [self.qkv_mlp, self.out]

    def __call__(
        self, x: Stream, gate: Tensor, after: Norm, rotary: Rotary, attend: Attend
    ) -> Stream:
        """The stream, normed for what comes after.

        Args:
            x: residual and normed residual of all tokens, text first.
            gate: [B, C].
            after: shift and scale of the norm that follows.
            rotary: of all tokens.
            attend: the joint attention.
        """
        attn = self.block.attn
        width = attn.inner_dim
        projected = self.qkv_mlp(x[1])
        qkv, mlp = projected[..., : 3 * width], projected[..., 3 * width :]
        weights = ((attn.norm_q.weight, attn.norm_k.weight),)
        learns = projected.requires_grad or any(w.requires_grad for w in weights[0])
        graded = torch.is_grad_enabled() and learns
        q, k, v = norm_rope((qkv,), weights, rotary, attn.heads, values=graded)
        if graded:
            y = self._out(attend(q, k, v).flatten(2), F.gelu(mlp, approximate="tanh"))
        else:
            v = qkv[..., 2 * width :].unflatten(-1, (attn.heads, -1))
            both = projected.new_empty(*projected.shape[:2], width + mlp.shape[-1])
            attend(q, k, v, out=both[..., :width].unflatten(-1, (attn.heads, -1)))
            torch.ops.aten.gelu.out(mlp, approximate="tanh", out=both[..., width:])
            y = self.out(both)
        return gated_ada_norm(x[0], y, gate, *after)

    def _out(self, attended: Tensor, mlp: Tensor) -> Tensor:
        """``proj_out`` of both; under autograd their concatenation would be one more copy."""
        linear, width = self.block.proj_out, attended.shape[-1]
        if self.fp8 or not is_plain(linear):
            return self.out(torch.cat([attended, mlp], -1))
        of_mlp = F.linear(mlp, linear.weight[:, width:], linear.bias)
        rows = torch.addmm(
            of_mlp.flatten(0, 1), attended.flatten(0, 1), linear.weight[:, :width].t()
        )
        return rows.view_as(of_mlp)


class FeedForward:
    """The attention's gated residual, the MLP and its gated residual, of one stream.

    Args:
        find: gives diffusers' FeedForward.
        fp8: multiply in fp8.

    Attributes:
        products: its linears.
    """

    def __init__(self, find: Callable[[], Any], fp8: bool) -> None:
        self.products = [
            PackedLinear(lambda: [find().net[0].proj], fp8),
            PackedLinear(lambda: [find().net[2]], fp8),
        ]

    def __call__(
        self, residual: Tensor, attended: Tensor, modulation: list[Tensor], after: Norm
    ) -> Stream:
        """The stream, normed for what comes after.

        Args:
            residual: [B, S, C].
            attended: what the attention gave, [B, S, C].
            modulation: shift, scale and gate of both norms of the stream.
            after: shift and scale of the norm that follows.
        """
        _, _, gate, shift, scale, gate_mlp = modulation
        residual, normed = gated_ada_norm(residual, attended, gate, shift, scale)
        into, out = self.products
        hidden = F.gelu(into(normed), approximate="tanh")
        return gated_ada_norm(residual, out(hidden), gate_mlp, *after)


def _projections(attn: Any, fused: str, *names: str) -> list[Any]:
    """The linears of q, k and v: one where diffusers has fused them."""
    if attn.fused_projections and hasattr(attn, fused):
        return [getattr(attn, fused)]
    return [getattr(attn, name) for name in names]
