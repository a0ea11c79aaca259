"""Faults planted in the kernels of joint attention, and the sanitizer over the kernels as they are.

A test of the tests: each fault must be noticed by one of the checks that the kernels pass.
"""

from functools import partial

import pytest
import torch

from csrc_triton import joint_attention, joint_attention_backward
from csrc_triton.interpreter import bfloat16_is_right
from csrc_triton.tiles import Tile, forced
from sda_fast import ops, reference
from sda_fast.ops import joint_lists

from .attention_cases import Case, draw, sliced
from .interpreter.sanitizer import sanitized
from .numerics import assert_attention, run_attention
from .planting import plant

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="faults are planted in the interpreter"),
]

KERNELS = ("primitives", "joint_attention", "joint_attention_backward")
LAUNCHERS = {
    joint_attention: ("launch_joint_attention",),
    joint_attention_backward: ("launch_joint_attention_dq", "launch_joint_attention_dkdv"),
}
TILES = {
    "forward": Tile(32, 16, 4, 2, 16), "dq": Tile(32, 16, 4, 2, 16), "dkdv": Tile(16, 32, 4, 2, 16),
}  # fmt: skip

# name: (file, the right words, the wrong ones); words that stand in several places change in all
FAULTS = {
    "accumulator not rescaled": ("joint_attention", "acc * decay[:, None]", "acc"),
    "sum not rescaled": ("joint_attention", "row_sum * decay", "row_sum"),
    "no finite pivot": (
        "primitives", 'tl.where(new_max == float("-inf"), 0.0, new_max)', "new_max",
    ),
    "finite sentinel": (
        "joint_attention", 'tl.where(visible, scores, float("-inf"))',
        "tl.where(visible, scores, -100.0)",
    ),
    "lse in base 2": ("joint_attention", "tl.log2(total)) * LN_2", "tl.log2(total))"),
    "partial lse taken as base 2": ("joint_attention", "p_lse * LOG2_E_DEVICE", "p_lse"),
    "partial result left out": ("joint_attention", "acc += tl.load(p_rows", "tl.load(p_rows"),
    "head stride taken for the batch": (
        "joint_attention", "b * stride_qb + h", "b * stride_qh + h",
    ),
    "rows past the end are stored": (
        "joint_attention", "out.to(out_ptr.dtype.element_ty), mask=in_rows[:, None]",
        "out.to(out_ptr.dtype.element_ty)",
    ),
    "keys past the end are read": (
        "primitives", "tl.load(v_rows, mask=in_range[:, None], other=0.0)", "tl.load(v_rows)",
    ),
    "keys past the end are seen": (
        "primitives", "mask=in_range, other=0)", "mask=in_range, other=-1)",
    ),
    "columns of nodes forgotten": (
        "primitives", "return rows & ((a[1][:, None] & b[1][None, :]) != 0)", "return rows",
    ),
    "source picture in the rows of the image": (
        "primitives", "num_txt + row + tl.where(of_source, tl.load(shape_ptr + 2), 0)",
        "num_txt + row",
    ),
    "delta left out": ("joint_attention_backward", "dp - delta[None, :]", "dp"),
    "dq not scaled": ("joint_attention_backward", "dq *= scale\n", "dq *= 1.0\n"),
    "mask left out of dk and dv": (
        "joint_attention_backward", "visible, scale_log2, MASKED=True\n",
        "visible, scale_log2, MASKED=False\n",
    ),
    "queries past the end reach dk and dv": (
        "joint_attention_backward", "tl.where(m < num_txt, num_txt, length) - m", "length - m",
    ),
    "queries show image keys what they show txt keys": (
        "joint_attention_backward", "tl.where(start < num_txt, TO_TXT, TO_IMG)",
        "tl.where(start < num_txt, TO_TXT, TO_TXT)",
    ),
    "strides of the output gradient ignored": (
        "joint_attention_backward", "for t in (q, k, v, d_out, dk, p_dk)",
        "for t in (q, k, v, dk, dk, p_dk)",
    ),
    "partial gradients left out": (
        "joint_attention_backward", "dk += tl.load(pk_rows", "tl.load(pk_rows",
    ),
}  # fmt: skip

OVERLAP = Case(1, 1, 16, (2, 1), 3, 5, {"rule": "overlap"})
SEVERAL = Case(2, 2, 16, (2, 1), 3, 3, {"rule": "overlap"})
ISOLATED = Case(
    1, 1, 16, (3, 2, 1), 5, 7, {"rule": "isolated", "isolate_level": 1, "source": (3, 4)}
)
# the lower rows see none of the txt keys that are gathered first
LOCAL = Case(1, 1, 16, (0, 0, 2), 4, 5, {"rule": "local", "extra_text": 2})
# two tiles of queries and more of keys in each sample, the last ones ragged
LONG = Case(2, 1, 16, (3, 2, 1), 5, 7, {"rule": "overlap"})


def check(case: Case, implementation: str, logits: float | str) -> None:
    """Both passes by the yardstick, with a strided dO, and no stray access."""
    qkv, _ = draw(case, logits)
    d_out = sliced(case.shape, torch.float32)
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    with sanitized() as report:
        assert_attention(op, case.bind(reference.hierarchical_attention), qkv, d_out)
    report.assert_clean()


# the cheapest first: it notices most
CHECKS = [
    (OVERLAP, "split", 1.0),
    (LOCAL, "fused", 5.0),
    (ISOLATED, "fused", "near-200"),
    (SEVERAL, "fused", 1.0),
]


@pytest.fixture
def spoil(monkeypatch, tmp_path):
    """Put a wrong word into one kernel file; everything goes through the spoilt kernels then."""
    return partial(plant, monkeypatch, tmp_path, KERNELS, LAUNCHERS)


def noticed() -> bool:
    for case, implementation, logits in CHECKS:
        torch.manual_seed(0)
        try:
            with forced(**TILES):
                check(case, implementation, logits)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_noticed(fault, spoil):
    spoil(*FAULTS[fault])
    assert noticed()


def test_the_kernels_as_they_are_pass_the_same_checks(spoil):
    """Through the same loading of files, so that it is the fault that is noticed."""
    spoil("primitives", "other=0.0", "other=0.0")
    assert not noticed()


@pytest.mark.parametrize("lists", ["_query_lists", "_key_lists"])
def test_lists_that_lose_a_block_are_noticed(lists, monkeypatch):
    """Of the backward alone: then they are no longer the transpose of the forward's."""
    right = joint_lists._masked_and_dense
    build = getattr(joint_lists, lists)
    build.cache_clear()

    def lossy(*args):
        blocks, dense = right(*args)
        return blocks[:-1], dense

    def built(*key):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(joint_lists, "_masked_and_dense", lossy)
            return build(*key)

    monkeypatch.setattr(joint_lists, lists, built)
    assert noticed()
    build.cache_clear()


@pytest.mark.parametrize(
    ("case", "implementation", "dtype"),
    [
        (LONG, "fused", torch.bfloat16),
        (ISOLATED, "fused", torch.float16),
        (LOCAL, "fused", torch.float32),
        (LONG, "split", torch.float16),
        (LOCAL, "split", torch.bfloat16),
        (SEVERAL, "split", torch.float32),
    ],
)
def test_no_stray_access_no_race_and_no_atomic(case, implementation, dtype):
    qkv, d_out = draw(case, dtype=dtype)
    op = case.bind(ops.hierarchical_attention, implementation=implementation)
    bfloat16_is_right()  # asked once a process, by a launch that is not counted here
    with forced(**TILES), sanitized(seed=1) as report:
        run_attention(op, qkv, d_out)
    report.assert_clean()
    assert report.launches == 3
