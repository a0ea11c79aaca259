"""Sequences of joint attention to try, by name, and inputs for them."""

from typing import NamedTuple

import torch
from torch import Tensor

from sda_fast.hierarchy import Hierarchy

from .numerics import draw_qkv


class Case(NamedTuple):
    batch: int
    heads: int
    head_dim: int
    tokens_per_node: tuple[int, ...]
    h: int
    w: int
    options: dict

    @property
    def tree(self) -> Hierarchy:
        return Hierarchy(self.tokens_per_node)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        rows, cols = self.options.get("source") or (0, 0)
        length = self.tree.num_tokens + self.options.get("extra_text", 0)
        return self.batch, length + self.h * self.w + rows * cols, self.heads, self.head_dim

    def bind(self, op, **more):
        """`op` as f(q, k, v) -> (out, lse)."""
        options = dict(self.options, return_lse=True, **more)
        return lambda q, k, v: op(q, k, v, self.tree, self.h, self.w, **options)


CASES = {
    "two-patches": Case(1, 1, 16, (3,), 2, 1, {"rule": "overlap"}),
    "ragged": Case(2, 3, 16, (3, 2, 1), 5, 7, {"rule": "overlap"}),
    "empty-level": Case(2, 2, 32, (4, 0, 1), 6, 5, {"rule": "local"}),
    "isolated": Case(1, 2, 16, (2, 1, 1), 7, 3, {"rule": "isolated"}),
    "extra-text-and-source": Case(
        2, 1, 32, (2, 1), 4, 5,
        {"rule": "isolated", "extra_text": 3, "source": (3, 2), "isolate_level": 1},
    ),
    "nodes-smaller-than-patches": Case(1, 2, 16, (0, 0, 1, 1), 3, 2, {"rule": "local"}),
    "wide-heads": Case(1, 2, 64, (8, 2), 9, 11, {"rule": "overlap"}),
}  # fmt: skip
SMALL = CASES["isolated"]


def draw(case: Case, logits: float | str = 1.0, dtype: torch.dtype = torch.float32):
    qkv = draw_qkv(case.shape, case.shape, logits, dtype)
    return qkv, torch.randn(case.shape).to(dtype)


def sliced(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As FLUX's fused projections give it: one slice of a wider buffer, no dimension dense."""
    batch, length, heads, head_dim = shape
    return torch.randn(batch, length + 1, 3, heads, head_dim + 8, dtype=dtype)[:, 1:, 1, :, :-8]
