"""In small, on a CPU in Triton's interpreter, what test_joint_gpu checks at real sizes."""

from dataclasses import replace

import pytest
import torch

from bench.measure import attention_step
from csrc_triton import joint_attention_backward
from csrc_triton.tiles import IMPLEMENTATIONS
from sda_fast.hierarchy import RULES

from . import test_joint_gpu as on_gpu
from .joint_tiles import implementations
from .test_bench_tune import CPU, TINY, needs_no_gpu, spoiled


@needs_no_gpu
@pytest.mark.parametrize("rule", RULES)
def test_a_small_sequence_is_as_good_as_the_reference(rule, kernels):
    on_gpu.assert_right(replace(TINY, rule=rule, head_dim=32), CPU)


@needs_no_gpu
@pytest.mark.parametrize("rule", RULES)
def test_the_check_of_the_gpu_notices_a_wrong_gradient(rule, kernels, monkeypatch):
    launch = spoiled(
        joint_attention_backward.launch_joint_attention_dkdv,
        lambda _args, results, _tile: results[0][0, -1].mul_(1.01),
    )
    monkeypatch.setattr(joint_attention_backward, "launch_joint_attention_dkdv", launch)
    with pytest.raises(AssertionError, match="dk is off by"):
        on_gpu.assert_right(replace(TINY, rule=rule), CPU, which=implementations(rule)[:1])


@needs_no_gpu
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tensors_in_one_wide_buffer(implementation, place, kernels):
    on_gpu.assert_far_is_near(replace(TINY, batch=2), implementation, CPU, place, 1 << 16)


@needs_no_gpu
def test_inputs_expanded_over_the_batch(kernels):
    on_gpu.assert_all_samples_alike(replace(TINY, batch=3), CPU)


@needs_no_gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_buffer_of_a_single_block_in_small(implementation, kernels):
    on_gpu.assert_single_block(replace(TINY, batch=2), implementation, CPU, 4 * 32)


def test_repeats_are_compared_bit_by_bit():
    x, loads = torch.randn(7), []
    on_gpu.assert_repeats(lambda: (x, x[:3]), 5, lambda: loads.append(1))
    assert len(loads) == 5
    other = iter([x, x, x.neg().neg(), x.nextafter(x + 1), x])
    with pytest.raises(AssertionError):
        on_gpu.assert_repeats(lambda: (x, next(other)), 4, lambda: None)
    step = attention_step(lambda q, k, v: q + k * v, [torch.ones(1, 2, 1, 2)] * 4, backward=True)
    on_gpu.assert_repeats(step, 2, lambda: None)
