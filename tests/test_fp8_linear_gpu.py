"""fp8_linear on a GPU: its tensor cores against exact sums of the same e4m3 numbers."""

import gc
from importlib import import_module

import pytest
import torch

from bench.measure import Graph
from sda_fast import ops

from .gpu_checks import NEEDS_GPU, assert_repeats, assert_same_bits, other_work
from .test_fp8_linear import allowed, dequantise, expected_rms, half_spacing, rms, spacing

pytestmark = NEEDS_GPU

module = import_module("sda_fast.ops.fp8_linear")
HALF = (torch.bfloat16, torch.float16)
# tokens, K, N: of FLUX's images and texts, of one token, and those that cuBLAS may not scale
SIZES = [
    (4096, 3072, 9216),
    (1152, 15360, 3072),
    (4224, 3072, 21504),
    (128, 12288, 3072),
    (128, 3072, 12288),
    (257, 12288, 3072),
    (1000, 64, 3072),
    (1, 3072, 64),
]
FAST = 2e-2 / 4096
"""Times K, the relative error of Hopper's fast accumulation, which cuts a sum to about 14 bits at
each step: nearly 2 % for K = 4096 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)."""


def draw(tokens, depth, width, dtype):
    x = torch.randn(1, tokens, depth, device="cuda").to(dtype)
    w = torch.randn(width, depth, device="cuda") / depth**0.5
    return x, w.to(dtype), torch.randn(width, device="cuda").to(dtype)


def step_of(x, weight, bias, d_y):
    """A forward and a backward."""

    def step():
        leaf = x.detach().requires_grad_()
        y = ops.fp8_linear(leaf, weight, bias)
        return y.detach(), torch.autograd.grad(y, leaf, d_y)[0]

    return step


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sums_are_those_of_the_rounded_operands(size, dtype):
    x, w, bias = draw(*size, dtype)
    weight = ops.Fp8Weight.of(w)
    d_y = torch.randn(1, size[0], size[2], device="cuda").to(dtype)
    y, dx = step_of(x, weight, bias, d_y)()
    rounding = torch.finfo(dtype).eps / 2
    x_there = dequantise(*module._quantise(x))
    w_there = dequantise(weight.values, weight.scale)
    right = x_there @ w_there.T
    error = y[0].double() - (right + bias.double())
    assert rms(error) <= FAST * size[1] * rms(right) + rounding * rms(y)
    d_there = dequantise(*module._quantise(d_y, weight.scale))
    right = d_there @ weight.values.double()
    # float32 sums of 128 products that are kept to 14 bits
    assert rms(dx[0].double() - right) <= (2**-10 + rounding) * rms(right)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_error_is_that_of_rounding_the_operands(dtype):
    depth = 3072
    x, w, _ = draw(1024, depth, 3072, dtype)
    weight = ops.Fp8Weight.of(w)
    exact = x[0].double() @ w.double().T
    error = ops.fp8_linear(x, weight)[0].double() - exact
    scale = module._quantise(x)[1]
    expected = expected_rms((x[0], spacing(x[0], scale)), (w, spacing(w, weight.scale)))
    assert 0.9 * expected <= rms(error)
    assert rms(error) <= 1.1 * (expected**2 + (FAST * depth * rms(exact)) ** 2) ** 0.5
    half = allowed((x[0], half_spacing(x[0], scale)), (w, half_spacing(w, weight.scale)))
    assert (error.abs() <= half + FAST * depth * x[0].double().abs() @ w.double().abs().T).all()


@pytest.mark.parametrize("size", [(200, 3072, 3072), (128, 12288, 3072)], ids=str)
def test_a_graph_follows_its_input_and_repeats_give_the_same_bits(size):
    x, w, bias = draw(*size, torch.bfloat16)
    weight = ops.Fp8Weight.of(w)
    d_y = torch.randn(1, size[0], size[2], device="cuda").bfloat16()
    step = step_of(x, weight, bias, d_y)
    assert_repeats(step, 20, other_work(x.device))
    graph = Graph(step, torch.cuda.graph_pool_handle())
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        assert_same_bits(graph.fresh(), step())


def test_a_first_backward_under_capture_is_refused():
    x, w, bias = draw(128, 256, 256, torch.bfloat16)
    weight = ops.Fp8Weight.of(w)
    ops.fp8_linear(x, weight, bias)  # compiles the kernel
    step = step_of(x, weight, bias, torch.ones_like(ops.fp8_linear(x, weight, bias)))
    with (
        pytest.raises(RuntimeError, match="run a backward with each weight before a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        step()
    assert step()[1].isfinite().all()


def test_the_memory_is_what_is_said():
    x, w, bias = draw(256, 4096, 8192, torch.bfloat16)
    d_y = torch.randn(1, 256, 8192, device="cuda").bfloat16()
    step_of(x, ops.Fp8Weight.of(w), bias, d_y)()  # the workspace of cuBLAS stays
    gc.collect()
    before = torch.cuda.memory_allocated()
    weight = ops.Fp8Weight.of(w)
    assert torch.cuda.memory_allocated() - before == weight.nbytes == 8192 * 4096 + 4 * 8192
    before = torch.cuda.memory_allocated() - weight.nbytes
    step = step_of(x, weight, bias, d_y)
    for _ in range(2):
        step()
    assert torch.cuda.memory_allocated() - before == weight.nbytes
    assert weight.nbytes == 2 * 8192 * 4096 + 4 * 8192 + 4 * 4096


def test_compiled_it_gives_the_same_bits():
    x, w, bias = draw(300, 512, 768, torch.bfloat16)
    weight = ops.Fp8Weight.of(w)
    compiled = torch.compile(lambda x: ops.fp8_linear(x, weight, bias), fullgraph=True)
    assert_same_bits([compiled(x)], [ops.fp8_linear(x, weight, bias)])


def test_what_a_gpu_does_not_take_is_refused():
    x, w, _ = draw(4, 24, 40, torch.bfloat16)
    with pytest.raises(ValueError, match="multiples of 16 as N and K on CUDA"):
        ops.Fp8Weight.of(w)
    x, w, _ = draw(4, 32, 48, torch.float32)
    with pytest.raises(ValueError, match="x must be bfloat16, float16 on cuda, got"):
        ops.fp8_linear(x, ops.Fp8Weight.of(w))
