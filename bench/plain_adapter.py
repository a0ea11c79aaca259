"""The adapter written out in plain torch, on the weights of a SemanticAdapter, and its yardstick.

Keys and values are projected layer by layer, q and k are normalised and turned on their own, then
torch's attention: what ``bench qformer`` compares the module with, in speed and in results.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.check import Places
from sda_fast.reference.rope3d_attention import NORM_EPS, default_axes, rope3d

Turn = Callable[[Tensor], Tensor]
"""Turns x [B, S, H, D] by the places of its tokens."""
Turns = tuple[Turn, Turn]
"""Of q and of k."""
RATIO = 2.0
"""An error's norm may be so many times plain torch's, plus one rounding of the exact norm."""


def reference_turns(places: Places, head_dim: int) -> Turns:
    """By the reference: angles and complex products at every call."""
    axes = default_axes(head_dim)
    q_coords, k_coords = places
    return lambda q: rope3d(q, q_coords, axes), lambda k: rope3d(k, k_coords, axes)


def table_turns(places: Places, head_dim: int) -> Turns:
    """By cosines and sines that are kept, float32 [S, 1, D / 2], and real products."""
    one, other = (_table_turn(coords, head_dim) for coords in places)
    return one, other


def _table_turn(coords: Tensor, head_dim: int) -> Turn:
    # a unit vector along the first of each pair is turned into (cos, sin)
    unit = coords.new_tensor([1.0, 0.0]).repeat(head_dim // 2)
    table = rope3d(unit.expand(1, len(coords), 1, -1), coords, default_axes(head_dim))
    cos, sin = (t.contiguous() for t in table[0].unflatten(-1, (-1, 2)).unbind(-1))

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    return turn


def turned_sdpa(q: Tensor, k: Tensor, v: Tensor, turns: Turns | None) -> Tensor:
    """[B, N or S, H, D] each -> [B, N, H, D]: torch's attention, after turning q and k."""
    if turns is not None:
        q, k = turns[0](q), turns[1](k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def plain_adapter(adapter: Any, features: Tensor, turns: Turns) -> Tensor:
    """Features [B, S, F] -> embedding [B, N, C] by an adapter's weights.

    Args:
        adapter: a SemanticAdapter every layer of which reads the patches, turned there alone.
        features: in the dtype of the weights.
        turns: of positions and of patches.
    """
    qformer = adapter.qformer
    patches = qformer.norm_patches(adapter.mlp(adapter.norm_in(features)))
    x = qformer.queries.expand(len(features), -1, -1)
    count = len(qformer.layers)
    weights, biases = qformer.to_kv.weight.chunk(count), qformer.to_kv.bias.chunk(count)
    for layer, weight, bias in zip(qformer.layers, weights, biases, strict=True):
        own, cross = layer.self_attention, layer.cross_attention
        heads = own.num_heads
        q, k, v = _split(own.to_qkv(layer.norm_self(x)), 3, heads)
        x = x + own.to_out(turned_sdpa(*_normed(own, q, k), v, None).flatten(2))
        (q,) = _split(cross.to_q(layer.norm_cross(x)), 1, heads)
        k, v = _split(F.linear(patches, weight, bias), 2, heads)
        x = x + cross.to_out(turned_sdpa(*_normed(cross, q, k), v, turns).flatten(2))
        x = x + layer.feed_forward(layer.norm_feed_forward(x))
    return adapter.norm_out(adapter.proj_out(qformer.norm_out(x)))


def _normed(attention: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """q and k after the norms of their heads."""
    weights = attention.norm_q.weight, attention.norm_k.weight
    q, k = (
        F.rms_norm(x, w.shape, w.to(x.dtype), NORM_EPS)
        for x, w in zip((q, k), weights, strict=True)
    )
    return q, k


def _split(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """[B, S, parts * H * D] -> parts of [B, S, H, D]."""
    return x.unflatten(-1, (parts, heads, -1)).unbind(2)


@dataclass(frozen=True, slots=True)
class AdapterYardstick:
    """The exact embedding and gradients of all parameters, and how far a result may be.

    Attributes:
        names: "embedding" and the parameters'.
        exact: float64, in that order.
        limit: largest norm of the error of each.
    """

    names: list[str]
    exact: list[Tensor]
    limit: list[float]

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """What is wrong with the embedding, or with it and the gradients; empty if nothing is."""
        found = []
        wanted = zip(self.names, self.exact, self.limit, strict=True)
        for (name, exact, limit), result in zip(wanted, results, strict=False):
            if result.shape != exact.shape:
                found.append(f"{name} is {list(result.shape)}, not {list(exact.shape)}")
                continue
            error = (result.double() - exact).norm().item()
            if not error <= limit:  # NaN is not
                found.append(f"{name} is off by {error:.2e} in norm, allowed {limit:.2e}")
        return found


def adapter_yardstick(
    adapter: Any, features: Tensor, d_out: Tensor, places: Places
) -> AdapterYardstick:
    """Work it out from the plain adapter in float64 and in its own dtype, picture by picture."""
    turns = reference_turns(places, adapter.qformer.queries.shape[1] // adapter.config.num_heads)
    exact = _summed(copy.deepcopy(adapter).double(), features.double(), d_out.double(), turns)
    plain = _summed(adapter, features, d_out, turns)
    names = ["embedding", *(name for name, p in adapter.named_parameters() if p.requires_grad)]
    eps = torch.finfo(features.dtype).eps
    limit = [
        RATIO * (e - x).norm().item() + eps * x.norm().item()
        for e, x in zip(plain, exact, strict=True)
    ]
    return AdapterYardstick(names, exact, limit)


def _summed(adapter: Any, features: Tensor, d_out: Tensor, turns: Turns) -> list[Tensor]:
    """The embedding, and gradients summed over pictures in float64."""
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    rows = []
    for one, d_one in zip(features.split(1), d_out.split(1), strict=True):
        out = plain_adapter(adapter, one, turns)
        for total, grad in zip(sums, torch.autograd.grad(out, parameters, d_one), strict=True):
            total += grad
        rows.append(out.detach().double())
    return [torch.cat(rows), *sums]
