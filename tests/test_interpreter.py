"""The mended interpreter computes as hardware does."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction as interpreted

from . import interpreter
from .interpreter import quick
from .interpreter.sanitizer import sanitized

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")


@pytest.fixture(autouse=True)
def mended(monkeypatch):
    """The interpreter as every test of a kernel sees it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a launch may still load parts of triton
    interpreter.install()


@interpreted
def _cast_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < n)


@interpreted
def _toward_zero_kernel(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at).to(tl.bfloat16, fp_downcast_rounding="rtz")
    tl.store(y + at, value)


def cast(x, dtype):
    """What a kernel makes of ``x`` in another dtype."""
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(triton.cdiv(x.numel(), 16384),)](x, y, x.numel(), BLOCK=16384)
    return y


def assert_same_bits(found, wanted):
    """Equal to the sign of zero; a NaN is a NaN."""
    assert found.dtype == wanted.dtype
    ints = {2: torch.int16, 4: torch.int32}[found.element_size()]
    assert torch.equal(found.isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(found.view(ints)[numbers], wanted.view(ints)[numbers])


def every_bf16():
    """All 65536 values of bfloat16."""
    return torch.arange(65536).sub(32768).to(torch.int16).view(torch.bfloat16)


def hard_float32():
    """float32 values: random patterns, ties and their neighbours, ends of the range."""
    patterns = torch.randint(-(2**31), 2**31, (150_000,))
    upper = torch.randint(-(2**15), 2**15, (30_000,)) * 65536
    ties = torch.cat([upper + 0x8000, upper + 0x7FFF, upper + 0x8001])
    values = torch.cat([patterns, ties]).to(torch.int32).view(torch.float32)
    ends = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 1e-40, -1e-40]
    return torch.cat([values, torch.tensor(ends)])


def test_every_bf16_widens_and_comes_back():
    x = every_bf16()
    wide = cast(x, torch.float32)
    assert_same_bits(wide, x.float())
    assert_same_bits(cast(wide, torch.bfloat16), x)


def test_float32_rounds_to_nearest_even():
    x = hard_float32()
    assert_same_bits(cast(x, torch.bfloat16), x.bfloat16())


def test_a_nan_whose_payload_is_in_the_low_half_stays_nan():
    x = torch.tensor([0x7F800001, -0x007FFFFF, 0x7FFFFFFF, -1]).to(torch.int32)
    assert cast(x.view(torch.float32), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.int8])
def test_casts_between_bf16_and_other_types(dtype):
    x = torch.randn(1000).mul(20).bfloat16()
    assert torch.equal(cast(x, dtype), x.to(dtype))
    y = torch.randn(1000).mul(100).to(dtype)
    assert torch.equal(cast(y, torch.bfloat16), y.to(torch.bfloat16))


def test_a_float64_is_rounded_once():
    tie = 1 + 2**-8
    x = torch.tensor([tie, tie + 2**-40, tie - 2**-40], dtype=torch.float64)
    assert cast(x, torch.bfloat16).tolist() == [1.0, 1 + 2**-7, 1.0]


def test_rounding_toward_zero():
    x = torch.randn(128)
    y = torch.empty(128, dtype=torch.bfloat16)
    _toward_zero_kernel[(1,)](x, y, BLOCK=128)
    assert torch.equal(y, (x.view(torch.int32) & -65536).view(torch.float32).bfloat16())


@interpreted
def _operation_kernel(x, y, out, flags, OP: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + at), tl.load(y + at)
    r = a
    if OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "mul":
        r = a * b
    elif OP == "div":
        r = a / b
    elif OP == "scaled":
        r = a * 0.3 + 1.0
    elif OP == "minimum":
        r = tl.minimum(a, b)
    elif OP == "maximum":
        r = tl.maximum(a, b)
    elif OP == "where":
        r = tl.where(a < b, a, b)
    elif OP == "negative":
        r = -a
    elif OP == "abs":
        r = tl.abs(a)
    elif OP == "clamp":
        r = tl.clamp(a, -b, b)
    elif OP == "clamp, NaN kept":
        r = tl.clamp(a, -b, b, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "exp2":
        r = tl.exp2(a.to(tl.float32))
    tl.store(out + at, r.to(tl.bfloat16))
    both = (a <= b) & (a != 0.0)
    tl.store(flags + at, both | (a == b))


OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "scaled": lambda a, b: a * torch.tensor(0.3).bfloat16() + 1.0,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "where": torch.minimum,
    "negative": lambda a, b: -a,
    "abs": lambda a, b: a.abs(),
    "clamp": lambda a, b: torch.clamp(a, -b, b),
    "clamp, NaN kept": lambda a, b: torch.clamp(a, -b, b),
    "exp2": lambda a, b: torch.exp2(a.float()).bfloat16(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_bf16(name):
    a, b = torch.randn(2, 4096).mul(3).bfloat16()
    a[::7] = b[::7]
    b = b.abs() if name.startswith("clamp") else b
    out, flags = torch.empty_like(a), torch.empty(4096, dtype=torch.bool)
    _operation_kernel[(2,)](a, b, out, flags, OP=name, BLOCK=2048)
    if name == "exp2":  # the last bit of a transcendental is a library's own
        torch.testing.assert_close(out, OPERATIONS[name](a, b), rtol=2**-7, atol=0)
    else:
        assert torch.equal(out, OPERATIONS[name](a, b))
    assert torch.equal(flags, (a <= b) & (a != 0) | (a == b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["minimum", "maximum"])
def test_the_extreme_of_a_number_and_nan_is_the_number(name, dtype):
    a, b = torch.randn(2, 64).to(dtype)
    a[::2], b[1::2] = torch.nan, torch.nan
    out, flags = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.bool)
    _operation_kernel[(1,)](a, b, out, flags, OP=name, BLOCK=64)
    assert torch.equal(out, torch.where(a.isnan(), b, a).bfloat16())


@interpreted
def _fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.fma(tl.load(x + at), tl.load(y + at), tl.load(z + at)))


def test_fma_of_bf16_rounds_once():
    x, y, z = torch.randint(-128, 129, (3, 512)).div(16).bfloat16()
    wanted = (x.double() * y.double() + z.double()).bfloat16()  # exact up to the rounding
    # 1.5 * (1 + 2**-7) lies between two bfloat16 values; the third operand breaks the tie
    x[:3], y[:3], z[:3] = 1.5, 1 + 2**-7, torch.tensor([0.0, 2.0**-80, -(2.0**-80)])
    wanted[:3] = torch.tensor([1.515625, 1.515625, 1.5078125])
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, BLOCK=512)
    assert torch.equal(out, wanted)


@interpreted
def _reduce_kernel(
    x, largest, least, place, total, running, ROWS: tl.constexpr, COLS: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    at = rows[:, None] * COLS + cols[None, :]
    value = tl.load(x + at)
    tl.store(largest + rows, tl.max(value, 1).to(tl.bfloat16))
    tl.store(least + cols, tl.min(value, 0).to(tl.bfloat16))
    tl.store(place + rows, tl.argmax(value, 1))
    tl.store(total + rows, tl.sum(value, 1).to(tl.bfloat16))
    tl.store(running + at, tl.cumsum(value, 1).to(tl.bfloat16))


def test_reductions_of_bf16():
    x = torch.randint(-99, 100, (16, 32)).bfloat16()
    x[:4] = -x[:4].abs() - 1  # the largest of negative numbers has the smallest pattern
    largest, total, place = x.new_empty(16), x.new_empty(16), torch.empty(16, dtype=torch.int32)
    least, running = x.new_empty(32), torch.empty_like(x)
    _reduce_kernel[(1,)](x, largest, least, place, total, running, ROWS=16, COLS=32)
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(least, x.amin(0))
    assert torch.equal(x.gather(1, place.long()[:, None])[:, 0], largest)
    exact = x.double().cumsum(1)
    bound = 5 * 2.0**-8 * x.double().abs().sum(1)  # a rounding for each of log2(32) levels
    assert ((total - exact[:, -1]).abs() <= bound).all()
    assert ((running - exact).abs() <= bound[:, None]).all()


@interpreted
def _product_kernel(x, y, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    rows, cols, depth = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK):  # a bound that is known at run time only
        k = start + depth
        a = tl.load(x + rows[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        b = tl.load(y + cols[:, None] * K + k[None, :], mask=k[None, :] < K, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    at = rows[:, None] * N + cols[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty))


def product(x, y, dtype=torch.float32):
    """``x @ y.T`` by a kernel."""
    out = torch.empty(len(x), len(y), dtype=dtype)
    _product_kernel[(1,)](x, y, out, x.shape[1], M=len(x), N=len(y), BLOCK=32)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_multiplies_real_values(dtype):
    whole = torch.randint(-30, 31, (2, 64, 100)).to(dtype)  # sums that no order can change
    assert torch.equal(product(*whole), whole[0].float() @ whole[1].float().T)
    x, y = torch.randn(2, 64, 100).to(dtype)
    exact = x.double() @ y.double().T
    bound = 100 * 2.0**-24 * (x.double().abs() @ y.double().abs().T)
    assert ((product(x, y) - exact).abs() <= bound).all()
    assert torch.equal(product(x, y, dtype), product(x, y).to(dtype))


def test_dot_of_float16_accumulates_in_float32():
    x = torch.full((16, 96), 256.0, dtype=torch.float16)
    assert product(x, x).unique().tolist() == [96 * 65536.0]  # beyond the range of float16


@interpreted
def _half_product_kernel(x, y, z, out, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    total = tl.dot(tl.load(x + at), tl.load(y + at), tl.load(z + at), out_dtype=tl.float16)
    tl.store(out + at, total)


def test_dot_into_float16_rounds_once():
    x, y, z = torch.randint(-40, 41, (3, 32, 32)).to(torch.float16)
    out = torch.empty_like(x)
    _half_product_kernel[(1,)](x, y, z, out, N=32)
    assert torch.equal(out, (x.float() @ y.float() + z.float()).half())


@interpreted
def _attention_kernel(
    q, k, v, out, spans, S, scale, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    tile = tl.program_id(0)
    rows, dims = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    first, last = tl.load(spans + 2 * tile), tl.load(spans + 2 * tile + 1)
    q_tile = tl.load(q + rows[:, None] * D + dims[None, :], mask=rows[:, None] < S, other=0.0)
    pivot = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, last, COLS):
        cols = start + tl.arange(0, COLS)
        at, real = cols[:, None] * D + dims[None, :], cols[:, None] < last
        k_tile = tl.load(k + at, mask=real, other=0.0)
        v_tile = tl.load(v + at, mask=real, other=0.0)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        logits = tl.where(cols[None, :] < last, logits, float("-inf"))
        higher = tl.maximum(pivot, tl.max(logits, 1))
        p, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(pivot - higher)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
        pivot = higher
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * D + dims[None, :], result, mask=rows[:, None] < S)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_attention_kernel_with_bounds_from_a_table(dtype):
    S, D = 75, 32
    q, k, v = torch.randn(3, S, D).to(dtype)
    spans = torch.tensor([[0, 75], [3, 70], [40, 75]], dtype=torch.int32)
    out = torch.empty_like(q)
    scale = D**-0.5 * 1.4426950408889634
    with sanitized() as report:
        _attention_kernel[(3,)](q, k, v, out, spans, S, scale, D=D, ROWS=32, COLS=16)
    report.assert_clean()
    at = torch.arange(S)
    first, last = spans[at // 32].T
    mask = (at >= first[:, None]) & (at < last[:, None])
    q, k, v = q.double(), k.double(), v.double()
    exact = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
    steps = 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    assert ((out - exact).abs() <= 2 * steps * v.abs().max()).all()


@interpreted
def _next(x):
    return x + 1


@interpreted
def _count_kernel(x, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at)
    for _ in range(5):
        value = _next(value)
    tl.store(x + at, value)


def test_nothing_is_done_in_vain_and_the_language_comes_back(monkeypatch):
    quick.install()
    patched, added = [], []
    patch_lang = quick.upstream_patch_lang
    monkeypatch.setattr(
        quick, "upstream_patch_lang", lambda fn: patched.append(fn.__name__) or patch_lang(fn)
    )
    builder = type(triton.runtime.interpreter.interpreter_builder)
    add = builder.create_add
    monkeypatch.setattr(builder, "create_add", lambda *args: added.append(args) or add(*args))
    load = tl.load
    x = torch.tensor([0, 7, 2**31 - 3, -(2**31)], dtype=torch.int32)
    for launches in (1, 2):
        before = x.clone()
        _count_kernel[(1,)](x, BLOCK=4)
        assert torch.equal(x, before + 5)  # round the end, too
        assert patched == ["_count_kernel"] * launches
        assert len(added) == 5 * launches
        assert tl.load is load


def test_dtypes_are_those_of_upstream():
    quick.install()
    every = {t for t in vars(tl).values() if type(t) is tl.dtype}
    scalars = [t for t in every if t.name != "void"]
    assert {tl.int1, tl.bfloat16, tl.float8e5, tl.uint64} < every
    kinds = [t for s in scalars for t in (s, tl.pointer_type(s))]
    for t in (*kinds, *(tl.block_type(t, [4, 2]) for t in kinds)):
        for _ in range(2):
            assert triton.runtime.interpreter._get_np_dtype(t) == quick.upstream_np_dtype(t), t


def test_install_is_idempotent_and_importing_needs_no_triton():
    from triton.runtime import interpreter as patched

    before = dict(vars(patched))
    interpreter.install()
    assert dict(vars(patched)) == before
    code = "import sys, tests.interpreter; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=__file__.rpartition("/tests/")[0])
