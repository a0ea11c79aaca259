"""Which tiles and implementations the kernels of joint attention are tried with."""

import pytest
import torch

from csrc_triton.tiles import Tile
from sda_fast import ops, reference

from .attention_cases import Case
from .numerics import assert_attention

# several tiles, masked blocks and dense ranges even in short sequences
TILES = {
    "small": {
        "forward": Tile(16, 32, 4, 2, 16), "dq": Tile(32, 16, 4, 2, 16),
        "dkdv": Tile(16, 32, 4, 2, 16),
    },
    "middle": {
        "forward": Tile(64, 32, 4, 2, 32), "dq": Tile(64, 64, 4, 2, 16),
        "dkdv": Tile(32, 64, 4, 2, 16),
    },
    "one": {name: Tile(128, 128, 8, 2, 64) for name in ("forward", "dq", "dkdv")},
    "table": {},
}  # fmt: skip


def implementations(rule: str) -> tuple[str, ...]:
    return ("fused",) if rule == "isolated" else ("fused", "split")


def on(device, tensors):
    return [t.to(device) for t in tensors]


def check(case: Case, implementation: str, qkv, d_out):
    """Both passes by the yardstick; on a GPU "split" has no float32 kernel."""
    if implementation == "split" and qkv[0].is_cuda and qkv[0].dtype == torch.float32:
        pytest.skip("the vendors' kernels take half precision only")
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    assert_attention(op, case.bind(reference.hierarchical_attention), qkv, d_out)
