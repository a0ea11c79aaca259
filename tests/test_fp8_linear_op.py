"""fp8_linear as an operator of torch: frozen, compiled, refused, and what it asks of a GPU."""

import gc
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sda_fast import ops
from sda_fast.reference.fp8_linear import quantise_rows

from .test_fp8_linear import DEPTH, ROWS, WIDTH, draw, gradient, same_bits

module = import_module("sda_fast.ops.fp8_linear")
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def turned():
    """The copies for backwards that are there, of weights that are."""
    gc.collect()
    return set(map(id, module._turned.keys()))


def test_nothing_of_x_is_kept_for_the_backward():
    x, w, bias = draw()
    weight, kept = ops.Fp8Weight.of(w), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.fp8_linear(x.requires_grad_(), weight, bias)
    assert {t.data_ptr() for t in kept} == {weight.values.data_ptr(), weight.scale.data_ptr()}


def test_the_copy_for_the_backward_is_made_once_and_goes_with_the_weight(turned):
    x, w, _ = draw()
    weight = ops.Fp8Weight.of(w)
    x.requires_grad_()
    y = ops.fp8_linear(x, weight)
    assert weight.nbytes == WIDTH * DEPTH + 4 * WIDTH
    gradient(y, x, torch.randn_like(y))
    assert weight.nbytes == 2 * WIDTH * DEPTH + 4 * WIDTH + 4 * DEPTH
    held = module._turned[weight.values]
    gradient(ops.fp8_linear(x, weight), x, torch.randn_like(y))
    assert module._turned[weight.values] is held
    assert len(module._turned) == len(turned) + 1
    del weight, y
    gc.collect()
    assert set(map(id, module._turned.keys())) == turned


def test_values_that_change_in_place_are_seen_by_the_next_backward():
    x, w, _ = draw()
    weight, other = ops.Fp8Weight.of(w), ops.Fp8Weight.of(torch.randn_like(w))
    x.requires_grad_()
    d_y = torch.randn(ROWS, WIDTH)
    old = gradient(ops.fp8_linear(x, weight), x, d_y)
    weight.values.copy_(other.values)
    weight.scale.copy_(other.scale)
    new = gradient(ops.fp8_linear(x, weight), x, d_y)
    assert not same_bits(new, old)
    assert same_bits(new, gradient(ops.fp8_linear(x, other), x, d_y))


def test_a_weight_outlives_the_mode_it_was_made_in():
    x, w, _ = draw()
    with torch.inference_mode():
        weight = ops.Fp8Weight.of(w)
        ops.fp8_linear(x, weight)
    x.requires_grad_()
    assert gradient(ops.fp8_linear(x, weight), x, torch.ones(ROWS, WIDTH)).isfinite().all()
    with torch.no_grad():
        assert not ops.fp8_linear(x, ops.Fp8Weight.of(torch.nn.Parameter(w))).requires_grad


def test_a_first_backward_inside_a_captured_graph_is_refused(monkeypatch):
    x, w, _ = draw()
    weight = ops.Fp8Weight.of(w)
    y = ops.fp8_linear(x.requires_grad_(), weight)
    monkeypatch.setattr(module, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run a backward with each weight before a CUDA graph"):
        y.sum().backward(retain_graph=True)
    monkeypatch.undo()
    y.sum().backward(retain_graph=True)
    monkeypatch.setattr(module, "capturing", lambda: True)
    y.sum().backward()


# --- as an operator of torch ----------------------------------------------------------------------


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(biased):
    """Without its test of the schema, which torch cannot compare e4m3 for: done below by bits."""
    x, w, bias = draw((2, 5, 32))
    weight = ops.Fp8Weight.of(w)
    given = [x.requires_grad_(), weight.values, weight.scale, bias if biased else None]
    kept = [None if t is None else t.detach().clone() for t in given]
    torch.library.opcheck(module._forward, given, test_utils=UTILS)
    torch.library.opcheck(
        module._backward, (torch.randn(2, 5, WIDTH), *given[1:3]), test_utils=UTILS
    )
    for a, b in zip(given, kept, strict=True):
        assert (a is None and b is None) or same_bits(a.detach(), b)


def test_compiles_in_one_graph_and_makes_the_copy_once(turned):
    x, w, bias = draw((2, 8, DEPTH))
    weight = ops.Fp8Weight.of(w)
    step = lambda x: ops.fp8_linear(x.sin(), weight, bias).cos()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    for _ in range(3):
        assert same_bits(compiled(x), step(x))
        d_y = torch.randn(2, 8, WIDTH)
        assert same_bits(gradient(compiled(x), x, d_y), gradient(step(x), x, d_y))
    assert len(module._turned) == len(turned) + 1


def test_under_a_checkpoint_and_autocast():
    x, w, bias = draw()
    weight = ops.Fp8Weight.of(w)
    x.requires_grad_()
    d_y = torch.randn(ROWS, WIDTH)
    y = checkpoint(ops.fp8_linear, x, weight, bias, use_reentrant=False)
    assert same_bits(gradient(y, x, d_y), gradient(ops.fp8_linear(x, weight, bias), x, d_y))
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.fp8_linear(x, weight, bias)
    assert same_bits(y, ops.fp8_linear(x.bfloat16(), weight, bias))


def test_fake_cuda_tensors_only_infer():
    with FakeTensorMode():
        values = torch.empty(32, 48, dtype=torch.float8_e4m3fn, device="cuda")
        weight = ops.Fp8Weight(values, torch.empty(32, device="cuda"))
        y = ops.fp8_linear(torch.empty(2, 5, 48, dtype=torch.bfloat16, device="cuda"), weight)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 32), torch.bfloat16, "cuda")


# --- what _scaled_mm is given ---------------------------------------------------------------------


@pytest.fixture
def scaled_mm(monkeypatch):
    """Stands in for torch._scaled_mm: torch's own checks of its operands, and exact sums."""
    calls = []

    def multiply(a, b, *, scale_a, scale_b, bias=None, out_dtype, use_fast_accum=False):
        meta = lambda t: None if t is None else t.to("meta")
        right(*map(meta, (a, b, scale_a, scale_b, bias)), None, out_dtype, use_fast_accum)
        if bias is not None:
            assert (bias.dtype, bias.data_ptr() % 16) == (out_dtype, 0)
        calls.append((scale_a.numel(), use_fast_accum))
        y = a.double() @ b.double() * scale_a.double() * scale_b.double()
        return (y if bias is None else y + bias.double()).to(out_dtype)

    right = torch.ops.aten._scaled_mm.default
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "scaled_apart"),
    [(5, 48, 32, False), (1, 64, 16, False), (128, 3088, 16, True), (129, 3088, 16, False)],
)
def test_a_gpu_is_asked_for_the_same(
    rows, depth, width, scaled_apart, biased, dtype, scaled_mm, monkeypatch
):
    monkeypatch.setattr(module, "FEW_TILES", 2)
    x, w, bias = draw((rows, depth), dtype, width)
    bias = torch.cat([bias[:1], bias])[1:] if biased else None  # 2 bytes off
    operands = quantise_rows(x), quantise_rows(w)
    for fast in (True, False):
        found = module._multiply_on_gpu(*operands, bias, dtype, fast=fast)
        right = module._multiply_exactly(*operands, bias, dtype)
        torch.testing.assert_close(found, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert scaled_mm == [(1, False)] * 2 if scaled_apart else [(rows, True), (rows, False)]


# --- refusals -------------------------------------------------------------------------------------

F8 = torch.float8_e4m3fn
BAD_WEIGHTS = [
    (lambda w: w[0], r"weight must be \[N, K\] and not empty, got shape \(32,\)"),
    (lambda w: w[:0], r"weight must be \[N, K\] and not empty, got shape \(0, 32\)"),
    (lambda w: w.double(), "weight must be bfloat16, float16 or float32, got torch.float64"),
    (lambda w: w * float("inf"), "weight must be finite, got inf or NaN"),
    (lambda w: w.requires_grad_(), "weight must not require a gradient"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_WEIGHTS)
def test_a_weight_that_does_not_fit_is_refused(spoil, message):
    with pytest.raises(ValueError, match=f"Fp8Weight: {message}"):
        ops.Fp8Weight.of(spoil(torch.randn(16, 32)))


def test_every_reason_against_a_weight_is_in_one_message():
    w = torch.full((3, 4, 5), float("nan"), requires_grad=True)
    with pytest.raises(ValueError, match="Fp8Weight") as error:
        ops.Fp8Weight.of(w)
    for words in (r"must be [N, K]", "must be finite", "must not require a gradient"):
        assert words in str(error.value)
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        ops.Fp8Weight.of([1.0])
    with pytest.raises(NotImplementedError, match="CPU and CUDA tensors, got meta"):
        ops.Fp8Weight.of(torch.empty(16, 16, device="meta"))


@pytest.mark.parametrize(
    ("values", "scale", "message"),
    [(torch.ones(4, 8), torch.ones(4), r"values must be \[N, K\] torch.float8_e4m3fn"),
     (torch.ones(8, 4).to(F8).t(), torch.ones(4), "values must be .* contiguous, got"),
     (torch.ones(4, 8).to(F8), torch.ones(4, 1), r"scale must be \[4\] torch.float32, got"),
     (torch.ones(4, 8).to(F8), torch.ones(4).half(), r"scale must be \[4\] torch.float32, got")],
)  # fmt: skip
def test_parts_that_make_no_weight_are_refused(values, scale, message):
    with pytest.raises(ValueError, match=f"Fp8Weight: {message}"):
        ops.Fp8Weight(values, scale)


BAD = [
    ({"x": lambda t: t[..., :8]}, r"x must be \[..., K = 32\] and not empty, got shape \(5, 8\)"),
    ({"x": lambda t: t[:0]}, r"x must be .* not empty, got shape \(0, 32\)"),
    ({"x": lambda t: t.mT.contiguous().mT}, "x must have a last stride of 1, got strides"),
    ({"x": lambda t: t.double()}, "x must be bfloat16, float16, float32 on cpu, got torch.float64"),
    ({"x": lambda t: t.to("meta")}, "weight must be on the device of x, meta, got cpu"),
    ({"bias": lambda t: t[:3]}, r"bias must be \[N = 16\] of a float dtype, got \(3,\)"),
    ({"bias": lambda t: t.int()}, r"bias must be \[N = 16\] of a float dtype, got .*int32"),
    ({"bias": lambda t: t.to("meta")}, "bias must be on the device of x, cpu, got meta"),
    ({"bias": lambda t: t.requires_grad_()}, "bias must not require a gradient"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_what_does_not_fit_is_refused(spoil, message):
    given = {"x": torch.randn(5, 32), "bias": torch.randn(16)}
    given |= {name: change(given[name]) for name, change in spoil.items()}
    with pytest.raises(ValueError, match=f"fp8_linear: {message}"):
        ops.fp8_linear(weight=ops.Fp8Weight.of(torch.randn(16, 32)), **given)


def test_types_are_refused_by_name():
    x, w, _ = draw((2, 32))
    weight = ops.Fp8Weight.of(w)
    for given, message in [
        ((None, weight), "x must be a tensor, got NoneType"),
        ((x, w), "weight must be an Fp8Weight, got Tensor"),
        ((x, weight, 1.0), "bias must be a tensor, got float"),
    ]:
        with pytest.raises(TypeError, match=f"fp8_linear: {message}"):
            ops.fp8_linear(*given)


def test_a_gpu_without_fp8_and_sizes_it_cannot_take_are_refused_together(monkeypatch):
    with FakeTensorMode():
        values = torch.empty(30, 40, dtype=F8, device="cuda")
        weight = ops.Fp8Weight(values, torch.empty(30, device="cuda"))
        x = torch.empty(5, 40, device="cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
        with pytest.raises(ValueError, match="fp8_linear") as error:
            ops.fp8_linear(x, weight)
    for words in (
        "x must be bfloat16, float16 on cuda, got torch.float32",
        "weight must have multiples of 16 as N and K on CUDA, got (30, 40)",
        "weight must be on a GPU of compute capability 8.9 or newer, whose tensor cores take fp8, "
        "got 8.0",
    ):
        assert words in str(error.value)
