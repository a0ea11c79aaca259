"""Faults planted in the kernels of rotated attention: each must be noticed by a check they pass."""

from functools import partial

import pytest
import torch

from csrc_triton import rope3d_attention, rope3d_attention_backward
from csrc_triton.tiles import ROPE3D_KERNELS, Tile, forced
from sda_fast import ops, reference
from sda_fast.ops import rope3d_kernels

from .interpreter.sanitizer import sanitized
from .numerics import assert_attention, draw_qkv
from .planting import plant

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in the interpreter"),
]

KERNELS = ("primitives", "rope3d", "rope3d_attention", "rope3d_attention_backward")
LAUNCHERS = {
    rope3d_attention: ("launch_rope3d_attention",),
    rope3d_attention_backward: ("launch_rope3d_dq", "launch_rope3d_dkdv"),
}
TILES = {name: Tile(16, 16, 4, 2) for name in ROPE3D_KERNELS}

# name: (file, the right words, the wrong ones)
FAULTS = {
    "sine of the wrong sign in the third quarter": (
        "rope3d", "tl.where((quarter & 2) != 0, -sine, sine)", "sine",
    ),
    "sine and cosine not exchanged": ("rope3d", "tl.where(odd, c, s)", "tl.where(odd, s, s)"),
    "y taken for x": ("rope3d", "y[:, None], x[:, None])", "y[:, None], y[:, None])"),
    "level forgotten": ("rope3d", "level[:, None], along)", "along, along)"),
    "places of the first sample": (
        "rope3d_attention", "k_coords_ptr += b * stride_kcb", "k_coords_ptr += 0 * stride_kcb",
    ),
    "padding seen": (
        "rope3d_attention", "num_keys = tl.minimum(num_keys, tl.load(lengths_ptr + b))",
        "num_keys = num_keys",
    ),
    "keys past the end seen": (
        "rope3d_attention", 'tl.where(in_range[None, :], scores, float("-inf"))', "scores",
    ),
    "parts not weighted": (
        "rope3d_attention", "x * weight[:, None]", "x",
    ),
    "parts merged in base 2": (
        "rope3d_attention", "tl.exp(row_max - pivot), tl.exp(part_lse - pivot)",
        "tl.exp2(row_max - pivot), tl.exp2(part_lse - pivot)",
    ),
    "norm before its weight forgotten": (
        "rope3d_attention", "[:, None] * weight[None, :]", "[:, None]",
    ),
    "norm over the padded width": (
        "rope3d", "tl.sum(x * x, 1) / HEAD_DIM", "tl.sum(x * x, 1) / 32",
    ),
    "gradient of the norm without its own part": (
        "rope3d", "d_unit - unit * along[:, None]", "d_unit",
    ),
    "gradients of the weight in one row": (
        "rope3d_attention_backward", "tl.program_id(0).to(tl.int64) * HEAD_DIM", "0",
    ),
    "gradient of the weight of unnormed rows": (
        "rope3d", "tl.sum(d_normed * unit, 0)", "tl.sum(d_normed * x, 0)",
    ),
    "gradients not turned back": ("rope3d_attention_backward", "turn(d_x, -sine", "turn(d_x, sine"),
    "delta left out": ("rope3d_attention_backward", "dp - delta[None, :]", "dp"),
    "dq not scaled": ("rope3d_attention_backward", "dq * scale, q_ptr", "dq, q_ptr"),
    "keys of a sample it does not have": (
        "rope3d_attention_backward", "dk = tl.where(in_sample[:, None], dk, 0.0)", "dk = dk",
    ),
    "rows past the end are stored": (
        "rope3d", "mask = in_range[:, None] & (d < HEAD_DIM)\n    tl.store",
        "mask = d < HEAD_DIM\n    tl.store",
    ),
}  # fmt: skip


@pytest.fixture
def spoil(monkeypatch, tmp_path):
    """Put a wrong word into one kernel file; everything goes through the spoilt kernels then."""
    monkeypatch.setattr(rope3d_kernels, "choose_parts", lambda *_: 2)
    return partial(plant, monkeypatch, tmp_path, KERNELS, LAUNCHERS)


def noticed() -> bool:
    """By the yardstick, with places of each sample and padding, near and sharp logits; or by the
    sanitizer. The smaller check comes first and notices most."""
    for logits, keys, counts, normed in (
        (1.0, 20, (20, 9), True),
        ("near-200", 37, (37, 20), False),
    ):
        torch.manual_seed(0)
        qkv = draw_qkv((2, 5, 1, 16), (2, keys, 1, 16), logits, torch.float32)
        qkv = (*qkv, *(1 + 0.3 * torch.randn(2, 16))) if normed else qkv
        coords = torch.rand(2, 5, 3) * 64, torch.rand(2, keys, 3) * 64
        lengths = torch.tensor(counts, dtype=torch.int32)
        bind = lambda op, c=coords, n=lengths: (
            lambda q, k, v, *norms: op(q, k, v, *c, norms=norms or None, lengths=n, return_lse=True)
        )
        try:
            with forced(**TILES), sanitized() as report:
                assert_attention(
                    bind(ops.rope3d_attention), bind(reference.rope3d_attention),
                    qkv, torch.randn(2, 5, 1, 24)[..., 8:], rounds_operands=True,
                )  # fmt: skip
            report.assert_clean()
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_noticed(fault, spoil):
    spoil(*FAULTS[fault])
    assert noticed()


def test_the_kernels_as_they_are_pass_the_same_checks(spoil):
    """Through the same loading of files, so that it is the fault that is noticed."""
    spoil("primitives", "-inf", "-inf")
    assert not noticed()
