"""Faults planted in the kernels of norm_rope: each must be noticed by a check that they pass."""

import sys
from functools import partial

import pytest
import torch

from csrc_triton import norm_rope
from csrc_triton.tiles import RowTile
from sda_fast import ops

from .interpreter.sanitizer import sanitized
from .planting import plant
from .test_norm_rope import assert_good, draw, gradients_with_other_strides

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in the interpreter"),
]

KERNELS = ("rope3d", "norm_rope")
LAUNCHERS = {norm_rope: ("launch_norm_rope", "launch_norm_rope_backward")}

# name: (file, the right words, the wrong ones)
FAULTS = {
    "sine of the wrong sign": (
        "rope3d", "even * cosine - odd * sine, even * sine + odd * cosine",
        "even * cosine + odd * sine, odd * cosine - even * sine",
    ),
    "norm over half the head": ("rope3d", "tl.sum(x * x, 1) / HEAD_DIM", "tl.sum(x * x, 1) / 8"),
    "a larger eps": ("rope3d", "EPS = tl.constexpr(1e-6)", "EPS = tl.constexpr(1e-5)"),
    "gradient of the norm without its own part": (
        "rope3d", "d_unit - unit * along[:, None]", "d_unit",
    ),
    "gradient of the weight of unnormed rows": (
        "rope3d", "tl.sum(d_normed * unit, 0)", "tl.sum(d_normed * x, 0)",
    ),
    "norm before its weight forgotten": ("norm_rope", "[:, None] * weight[None, :]", "[:, None]"),
    "gradients not turned back": ("norm_rope", "-sine, cosine", "sine, cosine"),
    "sine taken for cosine": (
        "norm_rope", "tl.load(cos_ptr + row * stride_cos", "tl.load(sin_ptr + row * stride_sin",
    ),
    "half of the table not read": ("norm_rope", "2 * tl.arange(0, HALF)", "tl.arange(0, HALF)"),
    "places of img counted from its own start": (
        "norm_rope", "tl.where(of_txt, 0, num_txt)", "tl.where(of_txt, 0, 0)",
    ),
    "img turned as if it came first": (
        "norm_rope", "row = (before + s).to(tl.int64)", "row = s.to(tl.int64)",
    ),
    "txt tiles of img": ("norm_rope", "tl.where(of_txt, tile, tile - txt_tiles)", "tile"),
    "norms of img for txt": (
        "norm_rope", "tl.where(of_txt, load_weight(txt_ptr, HEAD_DIM, HEAD_DIM), of_img)", "of_img",
    ),
    "weight of q for k": (
        "norm_rope", "_weight(of_txt, txt_k_norm_ptr, img_k_norm_ptr",
        "_weight(of_txt, txt_q_norm_ptr, img_q_norm_ptr",
    ),
    "strides of img for txt": (
        "norm_rope", "tl.where(of_txt, stride_ts, stride_is)", "stride_is",
    ),
    "samples apart as those of img": (
        "norm_rope", "tl.where(of_txt, stride_tb, stride_ib)", "stride_ib",
    ),
    "k is q": ("norm_rope", "k = tl.load(x_ptr + width", "k = tl.load(x_ptr"),
    "v is k": ("norm_rope", "tl.load(x_ptr + 2 * width", "tl.load(x_ptr + width"),
    "heads of the last group that are not there": (
        "norm_rope", "(h < num_heads) & (s < length)", "s < length",
    ),
    "tokens past the end": (
        "norm_rope", "(h < num_heads) & (s < length)", "h < num_heads",
    ),
    "the table read past its end": (
        "norm_rope", "inside = (s < length)[:, None]", "inside = (s < length + 9)[:, None]",
    ),
    "last stride of the gradient forgotten": ("norm_rope", "+ d * stride_d", "+ d"),
    "heads of dk apart as those of dq": (
        "norm_rope", "joint, stride_ks, stride_kh", "joint, stride_ks, stride_qh",
    ),
    "dv forgotten": ("norm_rope", "tl.store(to + 2 * width", "tl.store(to"),
    "d_txt apart as d_img": ("norm_rope", "b * length * columns", "b * num_img * columns"),
    "gradients of the weights in one row": (
        "norm_rope", "tl.program_id(0).to(tl.int64) * 2 * HEAD_DIM", "0",
    ),
    "weights of q and of k exchanged": (
        "norm_rope", "tl.store(own, d_q_weight)\n        tl.store(own + HEAD_DIM, d_k_weight)",
        "tl.store(own, d_k_weight)\n        tl.store(own + HEAD_DIM, d_q_weight)",
    ),
    "sums of txt with some of img": (
        "norm_rope", "d_weight.split([n for n in programs if n])",
        "d_weight.split([programs[0] + 1, programs[1] - 1])",
    ),
}  # fmt: skip


@pytest.fixture
def spoil(monkeypatch, tmp_path):
    """Put a wrong word into one kernel file; everything goes through the spoilt kernels then."""
    operator = sys.modules["sda_fast.ops.norm_rope"]
    monkeypatch.setattr(operator, "choose_row_tile", lambda *_: RowTile(4, 2, 4))
    return partial(plant, monkeypatch, tmp_path, KERNELS, LAUNCHERS)


def noticed() -> bool:
    """By the yardstick at two scales, gradients with strides, or by the sanitizer."""
    for scale in (1.0, 1e-3):
        torch.manual_seed(0)
        case = draw((3, 5), scale=scale)
        narrow = [torch.cat([s, s], -1)[..., : s.shape[-1]] for s in case.streams[1:]]
        strided, _ = gradients_with_other_strides(case)
        case = case._replace(streams=[case.streams[0], *narrow], grads=strided)
        try:
            with sanitized() as report:
                assert_good(case, op=ops.norm_rope)
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
    spoil("norm_rope", "HEAD_DIM", "HEAD_DIM")
    assert not noticed()
