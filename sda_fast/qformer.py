"""The QFormer: learned queries, one for each embedding position, read the patches of a picture."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sda_fast.ops import rope3d_attention
from sda_fast.reference.rope3d_attention import NORM_EPS


class QFormer(nn.Module):
    """Learned queries that attend to each other and to patches, layer after layer.

    A layer is self-attention over the queries, cross-attention to the patches and a feed-forward
    of four times the width, each pre-norm and residual. Cross-attention rotates queries and keys
    by (level, y, x), so a query finds its own region of the picture at any grid. Queries and keys
    of each head are RMS-normalised, as FLUX does it. After BLIP-2's Q-Former, Li et al. 2023,
    https://arxiv.org/abs/2301.12597; rotation after Su et al. 2021,
    https://arxiv.org/abs/2104.09864.

    Args:
        num_queries: N, embedding positions.
        width: C, of queries and patches alike.
        num_layers: how many layers.
        num_heads: must divide width; where something rotates, into a head dim that the ratio 2:3:3
            of the axes level, y, x fits: a multiple of 16.
        cross_attention_every: layers 0, k, 2k, ... read the patches; 1 is every layer.
        cross_attention_rope: False leaves cross-attention without rotation: a query then has no
            place of its own.
        self_attention_rope: rotate the self-attention too.

    Raises:
        ValueError: a size is below 1, or num_heads does not divide width as it must.
    """

    def __init__(
        self,
        num_queries: int,
        width: int,
        num_layers: int,
        num_heads: int,
        cross_attention_every: int = 1,
        cross_attention_rope: bool = True,
        self_attention_rope: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "num_queries": num_queries,
            "width": width,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "cross_attention_every": cross_attention_every,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        unit = 16 if cross_attention_rope or self_attention_rope else 1
        if width % (num_heads * unit):
            raise ValueError(
                f"num_heads must divide width into a head dim that is a multiple of {unit}, "
                f"got {num_heads} and {width}"
            )
        self.num_heads = num_heads
        self.cross_attention_rope = cross_attention_rope
        self.self_attention_rope = self_attention_rope
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable | None = None  # set by diffusers' ModelMixin
        # unit queries: smaller ones drown in the first residual branches, and positions start alike
        self.queries = nn.Parameter(torch.randn(num_queries, width))
        self.norm_patches = nn.LayerNorm(width)
        reads = [i % cross_attention_every == 0 for i in range(num_layers)]
        # of all layers that read the patches, one after the other: one product for all of them
        self.to_kv = _linear(width, sum(reads) * 2 * width)
        # the branches together add as much variance as the queries bring
        gain = (2 * num_layers + sum(reads)) ** -0.5
        self.layers = nn.ModuleList(
            QFormerLayer(width, num_heads, reads_patches, gain) for reads_patches in reads
        )
        self.norm_out = nn.LayerNorm(width)

    def forward(self, patches: Tensor, q_coords: Tensor, k_coords: Tensor) -> Tensor:
        """Read the patches of each picture into its embedding positions.

        Args:
            patches: [B, S, C], float.
            q_coords: [N, 3] f32, (level, y, x) of each position, on the device of patches.
            k_coords: [S, 3] f32, likewise of each patch.

        Returns:
            [B, N, C], normalised.
        """
        patches = self.norm_patches(patches)
        x = self.queries.expand(patches.shape[0], -1, -1)
        self_coords = q_coords if self.self_attention_rope else None
        coords = self_coords, *((q_coords, k_coords) if self.cross_attention_rope else (None, None))
        head_dim = x.shape[-1] // self.num_heads
        kv = self.to_kv(patches).unflatten(-1, (-1, 2, self.num_heads, head_dim))
        of_layers = iter(kv.unbind(2))
        recompute = self._gradient_checkpointing_func if self.gradient_checkpointing else None
        for layer in self.layers:
            read = next(of_layers) if layer.cross_attention is not None else None
            if recompute is not None and torch.is_grad_enabled():
                x = recompute(layer, x, read, *coords)
            else:
                x = layer(x, read, *coords)
        return self.norm_out(x)


class QFormerLayer(nn.Module):
    """Self-attention, cross-attention where the layer reads the patches, feed-forward.

    Args:
        width: C.
        num_heads: divides width.
        reads_patches: False leaves the cross-attention out.
        gain: initial scale of what a branch adds.
    """

    def __init__(self, width: int, num_heads: int, reads_patches: bool, gain: float) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = SelfAttention(width, num_heads, gain)
        self.norm_cross = nn.LayerNorm(width) if reads_patches else None
        self.cross_attention = CrossAttention(width, num_heads, gain) if reads_patches else None
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            _linear(width, 4 * width), nn.GELU(), _linear(4 * width, width, gain)
        )

    def forward(
        self,
        x: Tensor,
        kv: Tensor | None,
        self_coords: Tensor | None,
        q_coords: Tensor | None,
        k_coords: Tensor | None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C].

        Args:
            x: [B, N, C].
            kv: [B, S, 2, H, D] keys and values of the patches; None for a layer that reads none.
            self_coords: [N, 3] f32 for the self-attention; None rotates not.
            q_coords: [N, 3] f32 for the cross-attention, likewise.
            k_coords: [S, 3] f32, likewise.
        """
        x = x + self.self_attention(self.norm_self(x), self_coords)
        if self.cross_attention is not None and self.norm_cross is not None and kv is not None:
            x = x + self.cross_attention(self.norm_cross(x), kv, q_coords, k_coords)
        return x + self.feed_forward(self.norm_feed_forward(x))


class SelfAttention(nn.Module):
    """Multi-head attention of the queries among themselves.

    Args:
        width: C.
        num_heads: divides width.
        gain: initial scale of the output.
    """

    def __init__(self, width: int, num_heads: int, gain: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_qkv = _linear(width, 3 * width)
        self.norm_q = HeadNorm(width // num_heads)
        self.norm_k = HeadNorm(width // num_heads)
        self.to_out = _linear(width, width, gain)

    def forward(self, x: Tensor, coords: Tensor | None) -> Tensor:
        """[B, N, C] -> [B, N, C]; coords [N, 3] f32 rotates, None does not."""
        qkv = rearrange(
            self.to_qkv(x), "b n (three h d) -> three b n h d", three=3, h=self.num_heads
        )
        q, k, v = qkv.unbind(0)
        norms = self.norm_q(), self.norm_k()
        return self.to_out(_attend(q, k, v, coords, coords, norms))


class CrossAttention(nn.Module):
    """Multi-head attention of the queries to the patches.

    Args:
        width: C.
        num_heads: divides width.
        gain: initial scale of the output.
    """

    def __init__(self, width: int, num_heads: int, gain: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = _linear(width, width)
        self.norm_q = HeadNorm(width // num_heads)
        self.norm_k = HeadNorm(width // num_heads)
        self.to_out = _linear(width, width, gain)

    def forward(
        self, x: Tensor, kv: Tensor, q_coords: Tensor | None, k_coords: Tensor | None
    ) -> Tensor:
        """x [B, N, C], kv [B, S, 2, H, D] -> [B, N, C]; coords [N or S, 3] f32 rotate, None not."""
        q = rearrange(self.to_q(x), "b n (h d) -> b n h d", h=self.num_heads)
        k, v = kv.unbind(2)
        norms = self.norm_q(), self.norm_k()
        return self.to_out(_attend(q, k, v, q_coords, k_coords, norms))


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last dim that keeps the dtype of its input, under autocast too.

    Args:
        dim: size of the last dim.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim], dtype of x."""
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


class HeadNorm(nn.Module):
    """Weight of an RMSNorm over a head, which the attention does as it loads q or k.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self) -> Tensor:
        """The weight [D]; called, not read, for the hooks that fetch weights when they are due."""
        return self.weight


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_coords: Tensor | None,
    k_coords: Tensor | None,
    norms: tuple[Tensor, Tensor],
) -> Tensor:
    """[B, S, H, D] each -> [B, N, H * D]."""
    if q_coords is None or k_coords is None:
        q_coords = k_coords = None
    return rope3d_attention(q, k, v, q_coords, k_coords, norms=norms).flatten(2)


def _linear(in_features: int, out_features: int, gain: float = 1.0) -> nn.Linear:
    """A Linear that turns unit variance into gain ** 2; PyTorch's default loses two thirds."""
    linear = nn.Linear(in_features, out_features)
    nn.init.normal_(linear.weight, std=gain / math.sqrt(in_features))
    nn.init.zeros_(linear.bias)
    return linear
