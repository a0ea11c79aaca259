"""Faults planted in the kernels of adaptive norms: each must be noticed by a check they pass."""

from functools import partial

import pytest
import torch

from csrc_triton import modulation
from sda_fast import ops

from .interpreter.sanitizer import sanitized
from .modulation_cases import GATED, PLAIN, assert_good, draw, run
from .planting import plant

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in the interpreter"),
]

LAUNCHERS = {modulation: ("launch_ada_norm", "launch_ada_norm_backward")}

# name: (the right words, the wrong ones)
FAULTS = {
    "mean over the padded width": ("tl.sum(row, 0) * (1.0 / CHANNELS)", "tl.sum(row, 0) / 32"),
    "spread of what is beyond C": ("tl.arange(0, BLOCK) < CHANNELS, s - rough", "True, s - rough"),
    "rest of the mean left in": ("(off - rest) * rstd", "off * rstd"),
    "mean kept without its rest": ("row * 2, rough + rest)", "row * 2, rough)"),
    "eps outside of the root": ("tl.sqrt_rn(variance + eps)", "(tl.sqrt_rn(variance) + eps)"),
    "scale without its one": ("rstd * (1.0 + scale) + shift", "rstd * scale + shift"),
    "gate of the first sample": ("gate_ptr + b * stride_gate, C", "gate_ptr, C"),
    "scale of the first sample": ("scale_ptr + b * stride_scale, C", "scale_ptr, C"),
    "shift of the first sample": ("shift_ptr + b * stride_shift, C", "shift_ptr, C"),
    "x taken to be dense": ("b * stride_xb + token * stride_xs", "row * CHANNELS"),
    "y with the strides of x": (
        "stride_yb + token * stride_ys, CHANNELS, BLOCK)\n        gate",
        "stride_xb + token * stride_xs, CHANNELS, BLOCK)\n        gate",
    ),
    "norm of the unrounded residual": (".to(s_ptr.dtype.element_ty).to(tl.float32)", ""),
    "gradient without the common part": ("(d_unit - straight - unit", "(d_unit - unit"),
    "gradient without its own part": (" - unit * turned", ""),
    "gradient not scaled": ("d_normed * (1.0 + scale)", "d_normed"),
    "gradient of what else reads s left out": ("dx += d_s", "dx += 0.0 * d_s"),
    "gradient of s with the strides of the other": (
        "b * stride_gb + token * stride_gs", "b * stride_nb + token * stride_ns",
    ),
    "gradient of the normed taken to be dense": (
        "b * stride_nb + token * stride_ns", "row * CHANNELS",
    ),
    "gate left out of dy": ("dx * gate, CHANNELS", "dx, CHANNELS"),
    "gradient of gate before what else reads s": ("d_gate += dx * y", "d_gate += (dx - d_s) * y"),
    "gradient of scale of unnormed rows": ("d_scale += d_normed * unit", "d_scale += d_normed * s"),
    "gradient of shift of the last row": ("d_shift += d_normed", "d_shift = d_normed"),
    "rows of the next sample": ("tl.minimum(first + ROWS, length)", "first + ROWS"),
    "rows past the last full program lost": ("triton.cdiv(length, rows)", "max(1, length // rows)"),
    "sums of the first program": (
        "own = pid.to(tl.int64) * CHANNELS", "own = 0 * pid.to(tl.int64) * CHANNELS",
    ),
    "sums of other samples": (
        "view(batch, parts, channels).sum(1)", "view(parts, batch, channels).sum(0)",
    ),
    "elements beyond C are loaded": ("mask=c < CHANNELS, other=0.0", "mask=c < BLOCK, other=0.0"),
    "elements beyond C are stored": (
        "element_ty), mask=c < CHANNELS", "element_ty), mask=c < BLOCK",
    ),
}  # fmt: skip


@pytest.fixture
def spoil(monkeypatch, tmp_path):
    """Put a wrong word into the kernels; everything goes through the spoilt ones then."""
    return partial(plant, monkeypatch, tmp_path, ("modulation",), LAUNCHERS, "modulation")


def noticed():
    """By the yardstick, with rows apart in memory, near zero and far from it; by the sanitizer; by
    the bits of a rounded residual; or by a constant row."""
    torch.manual_seed(0)
    try:
        for op, dtype, kind in (
            (PLAIN, torch.float32, "offset"),
            (GATED, torch.float32, "usual"),
            (GATED, torch.float32, "small"),
            (GATED, torch.bfloat16, "usual"),
        ):
            inputs, d_outs = draw(op, 2, 10, 24, dtype, kind=kind)
            inputs["x"] = torch.cat([inputs["x"]] * 2, -1)[..., 24:]
            d_outs = [d.transpose(0, 1).contiguous().transpose(0, 1) for d in d_outs[:1]] + [
                torch.cat([d] * 2, 1)[:, 10:] for d in d_outs[1:]
            ]
            with sanitized() as report:
                assert_good(op, inputs, d_outs)
            report.assert_clean()
        s, normed = ops.gated_ada_norm(**inputs)
        assert torch.equal(normed, ops.ada_norm(s, inputs["shift"], inputs["scale"]))
        inputs, d_outs = draw(PLAIN, 2, 10, 24)
        inputs["x"] = torch.full((2, 10, 24), 1e4 / 3)
        found = run(ops.ada_norm, inputs, d_outs)
        assert found.out["normed"].eq(inputs["shift"][:, None]).all()
        assert found.grad["scale"].eq(0).all()
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_noticed(fault, spoil):
    spoil(*FAULTS[fault])
    assert noticed()


def test_the_kernels_as_they_are_pass_the_same_checks(spoil):
    """Through the same loading of files, so that it is the fault that is noticed."""
    spoil("CHANNELS", "CHANNELS")
    assert not noticed()
