"""norm_rope on the CPU: against float64, and as an operator of torch."""

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sda_fast import ops, reference

from .numerics import DTYPES, GRADIENT_CAP, OUTPUT_CAP, RATIO, RMS_CAP, RMS_RATIO

LENGTHS = {"two": (5, 11), "one": (13,)}


class Case(NamedTuple):
    streams: list[Tensor]
    norms: list[Tensor]  # weights of q and of k of each stream
    rotary: tuple[Tensor, Tensor]
    heads: int
    grads: list[Tensor]


def draw(
    lengths=(5, 11), heads=3, head_dim=16, dtype=torch.float32, *,
    batch=2, scale=1.0, beyond=0, device=None,
) -> Case:  # fmt: skip
    """Streams with `beyond` columns after q, k and v, and a table with every value twice."""
    columns, length = 3 * heads * head_dim + beyond, sum(lengths)
    streams = [(scale * torch.randn(batch, n, columns)).to(device, dtype) for n in lengths]
    norms = [(1 + 0.3 * torch.randn(head_dim)).to(device, dtype) for _ in range(2 * len(lengths))]
    angle = 64 * torch.randn(length, head_dim // 2)
    rotary = [t.repeat_interleave(2, 1).to(device) for t in (angle.cos(), angle.sin())]
    grads = [torch.randn(batch, length, heads, head_dim).to(device, dtype) for _ in range(3)]
    return Case(streams, norms, tuple(rotary), heads, grads)


def run(op, case: Case, values=True, dtype=None) -> dict[str, Tensor]:
    """Results and gradients by name; of the very tensors, or in another dtype."""
    cast = lambda tensors: [t.detach() if dtype is None else t.detach().to(dtype) for t in tensors]
    streams, norms, grads = cast(case.streams), cast(case.norms), cast(case.grads[: 2 + values])
    leaves = [t.requires_grad_() for t in (*streams, *norms)]
    pairs = list(zip(norms[::2], norms[1::2], strict=True))
    q, k, v = op(streams, pairs, tuple(cast(case.rotary)), case.heads, values)
    assert (v is not None) == values
    results = [q, k, v][: 2 + values]
    found = torch.autograd.grad(results, leaves, grads)
    names = [*("q", "k", "v")[: len(results)], *(f"d_stream {i}" for i in range(len(streams)))]
    names += [f"d_norm {i}" for i in range(len(norms))]
    return dict(zip(names, (t.detach() for t in (*results, *found)), strict=True))


def assert_good(case: Case, values=True, op=ops.norm_rope):
    """As good as the reference in every result and gradient, by the tolerance of attention: the
    caps are relative to the largest exact magnitude, those of results absolute below 1."""
    exact = run(reference.norm_rope, case, values, torch.float64)
    eager, actual = run(reference.norm_rope, case, values), run(op, case, values)
    for name, x in exact.items():
        a, e, is_result = actual[name], eager[name], name in "qkv"
        assert (a.shape, a.dtype) == (x.shape, e.dtype), name
        assert a.isfinite().equal(x.isfinite()), name
        # the gradient of a float64 weight is computed in float32, too
        dtype, finite = a.dtype if a.dtype in DTYPES else torch.float32, x.isfinite()
        a, e, x = a[finite].double(), e[finite].double(), x[finite]
        largest, error = x.abs().max().item(), (a - x).abs().max().item()
        ratio = RATIO["out"] if is_result else RATIO["dq"]
        allowed = ratio * (e - x).abs().max().item() + torch.finfo(dtype).eps * largest
        assert error <= allowed, f"{name}: error {error:.2e}, the reference allows {allowed:.2e}"
        cap = OUTPUT_CAP[dtype] * max(largest, 1.0) if is_result else GRADIENT_CAP[dtype] * largest
        assert error <= cap, f"{name}: error {error:.2e}, the cap is {cap:.2e}"
        if dtype in RMS_CAP:
            rms = lambda t: t.square().mean().sqrt().item()
            allowed = max(RMS_CAP[dtype] * rms(x), RMS_RATIO * rms(e - x))
            assert rms(a - x) <= allowed, f"{name} (RMS): {rms(a - x):.2e}, allowed {allowed:.2e}"


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


def gradients_with_other_strides(case: Case):
    """(gradients of other strides, the same ones dense): columns of heads, one token for all,
    every second token of a head."""
    dq, dk, dv = case.grads
    twice = dv.transpose(1, 2).repeat_interleave(2, 2).transpose(1, 2)
    strided = [dq.mT.contiguous().mT, dk[:, :1].expand_as(dk), twice[:, ::2]]
    assert [t.stride(-1) for t in strided] == [case.heads, 1, 1]
    return strided, [t.contiguous() for t in strided]


def interleaved_pairs(streams):
    return list(zip(streams[::2], streams[1::2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_is_as_good_as_the_reference(lengths, values, scale, dtype):
    assert_good(draw(lengths, dtype=dtype, scale=scale), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (2, 64), (1, 80), (2, 128)])
def test_other_heads_are_as_good_as_the_reference(heads, head_dim, dtype):
    assert_good(draw((3, 4), heads, head_dim, dtype))


@pytest.mark.parametrize("values", [True, False])
def test_columns_beyond_q_k_and_v_are_neither_read_nor_copied_nor_given_a_gradient(values):
    case = draw(beyond=48)
    width = 3 * case.heads * 16
    narrow = run(
        ops.norm_rope, case._replace(streams=[s[..., :width] for s in case.streams]), values
    )
    for s in case.streams:
        s[..., width:] = float("nan")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide = run(ops.norm_rope, case, values)
    for i, s in enumerate(case.streams):
        assert any(t.data_ptr() == s.data_ptr() and t.stride() == s.stride() for t in kept)
        gradient = wide.pop(f"d_stream {i}")
        assert torch.equal(gradient[..., :width], narrow.pop(f"d_stream {i}")[..., :width])
        read = (2 + values) * case.heads * 16
        assert gradient[..., read:].eq(0).all()
        assert gradient[..., :read].ne(0).any(0).any(0).all()
    assert_same_bits(wide, narrow)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradients_of_other_strides_equal_dense_ones(lengths, dtype):
    case = draw(lengths, dtype=dtype)
    strided, dense = gradients_with_other_strides(case)
    found = run(ops.norm_rope, case._replace(grads=strided))
    assert_same_bits(found, run(ops.norm_rope, case._replace(grads=dense)))
    assert_good(case._replace(grads=strided))


def test_without_values_q_and_k_and_their_gradients_are_the_same():
    case = draw()
    whole = run(ops.norm_rope, case._replace(grads=[*case.grads[:2], 0 * case.grads[2]]))
    del whole["v"]
    assert_same_bits(run(ops.norm_rope, case, values=False), whole)


class Calls(TorchDispatchMode):
    """Which gradients of norms are asked for."""

    def __init__(self):
        super().__init__()
        self.learn = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.sda_fast.norm_rope_backward.default:
            self.learn.append((args[-1], len(out)))
        return out


@pytest.mark.parametrize("learning", [(), (3,), (0, 1, 2, 3)])
def test_norms_learn_where_one_requires_it_and_cost_nothing_elsewhere(learning):
    case = draw()
    expected = run(ops.norm_rope, case)
    streams = [s.clone().requires_grad_() for s in case.streams]
    norms = [w.clone().requires_grad_(i in learning) for i, w in enumerate(case.norms)]
    joint = ops.norm_rope(streams, interleaved_pairs(norms), case.rotary, case.heads)
    with Calls() as calls:
        torch.autograd.backward(joint, case.grads)
    assert calls.learn == [(bool(learning), 2 + bool(learning))]
    for i, s in enumerate(streams):
        assert torch.equal(s.grad, expected[f"d_stream {i}"])
    for i, w in enumerate(norms):
        assert (w.grad is not None) == (i in learning)
        assert w.grad is None or torch.equal(w.grad, expected[f"d_norm {i}"])


def test_one_stream_may_be_frozen_and_results_unused():
    case = draw()
    txt, img = case.streams[0], case.streams[1].clone().requires_grad_()
    _, k, _ = ops.norm_rope((txt, img), interleaved_pairs(case.norms), case.rotary, case.heads)
    (d_img,) = torch.autograd.grad(k, img, case.grads[1])
    only_k = [0 * case.grads[0], case.grads[1], 0 * case.grads[2]]
    assert torch.equal(d_img, run(ops.norm_rope, case._replace(grads=only_k))["d_stream 1"])


def test_norms_of_other_dtypes_keep_theirs():
    case = draw(dtype=torch.bfloat16)
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    norms = [w.to(dtype) for w, dtype in zip(case.norms, dtypes, strict=True)]
    found = run(ops.norm_rope, case._replace(norms=norms))
    assert tuple(found[f"d_norm {i}"].dtype for i in range(4)) == dtypes
    assert found["q"].dtype == torch.bfloat16


def test_the_second_value_of_a_pair_is_not_read():
    case = draw()
    first = [t.clone() for t in case.rotary]
    for t in first:
        t[:, 1::2] = float("nan")
    found = run(ops.norm_rope, case._replace(rotary=tuple(first)))
    assert_same_bits(found, run(ops.norm_rope, case))


def test_rows_of_zeros_and_large_rows():
    case = draw()
    for s in case.streams:
        s[:, 0], s[:, 1], s[:, 2] = 0.0, 1e-4 * s[:, 1], 1e4 * s[:, 2]
    assert_good(case)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_stays_in_its_head(bad):
    case = draw()
    clean = run(ops.norm_rope, case)
    case.streams[1][1, 3, 16 + 5] = bad  # q of head 1
    found = run(ops.norm_rope, case)
    wrong = found["q"] != clean["q"]
    assert wrong[1, 5 + 3, 1].any()
    wrong[1, 5 + 3, 1] = False
    assert not wrong.any()
    assert torch.equal(found["k"], clean["k"])
    assert torch.equal(found["v"], clean["v"])


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("lengths", [(2, 3), (4,)])
def test_gradcheck(lengths, values):
    case = draw(lengths, heads=2, head_dim=4, dtype=torch.float64, beyond=3)
    count = len(lengths)
    inputs = [t.requires_grad_() for t in (*case.streams, *case.norms)]

    def joint(*tensors):
        pairs = interleaved_pairs(tensors[count:])
        results = ops.norm_rope(tensors[:count], pairs, case.rotary, case.heads, values)
        return results[: 2 + values]

    assert torch.autograd.gradcheck(joint, inputs, fast_mode=True)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_opcheck(lengths, values):
    case = draw(lengths, dtype=torch.bfloat16)
    read = (2 + values) * case.heads * 16
    streams = [s[..., :read].detach().requires_grad_() for s in case.streams]
    norms = [w.requires_grad_() for w in case.norms]
    op = torch.ops.sda_fast.norm_rope.default
    torch.library.opcheck(op, (streams, norms, *case.rotary, case.heads, values))
    for learn in (True, False):
        torch.library.opcheck(
            torch.ops.sda_fast.norm_rope_backward.default,
            (case.grads[: 2 + values], streams, norms, *case.rotary, learn),
            test_utils=("test_schema", "test_faketensor"),
        )


class Block(torch.nn.Module):
    """Projections of two streams, the second fused with something else, and their joint q, k, v."""

    def __init__(self):
        super().__init__()
        self.txt, self.img = torch.nn.Linear(8, 96), torch.nn.Linear(8, 96 + 24)
        self.norms = torch.nn.ParameterList(torch.ones(16) for _ in range(4))

    def forward(self, txt, img, cos, sin):
        streams, pairs = (self.txt(txt), self.img(img)), interleaved_pairs(list(self.norms))
        q, k, v = ops.norm_rope(streams, pairs, (cos, sin), 2)
        return torch.cat([(q * k + v).flatten(2), q.new_ones(*q.shape[:2], 24)], -1) * 2.0


def test_compiles_whole_for_other_sizes_and_recomputes_in_a_checkpoint(device):
    module = Block().to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    again = lambda *args: checkpoint(module, *args, use_reentrant=False)
    for lengths in ((3, 4), (5, 2), (2, 9)):
        inputs = [torch.randn(2, n, 8).to(device) for n in lengths]
        rotary = draw(lengths, device=device).rotary
        plain, traced, recomputed = (
            torch.autograd.grad(f(*inputs, *rotary).square().sum(), list(module.parameters()))
            for f in (module, compiled, again)
        )
        torch.testing.assert_close(traced, plain)
        for a, b in zip(recomputed, plain, strict=True):
            assert torch.equal(a, b)


def test_autocast_changes_nothing():
    case = draw()
    with torch.autocast("cpu", torch.bfloat16):
        found = run(ops.norm_rope, case)
    assert_same_bits(found, run(ops.norm_rope, case))


def test_a_second_derivative_is_refused():
    case = draw()
    stream = case.streams[0].requires_grad_()
    pairs = interleaved_pairs(case.norms)
    q, _, _ = ops.norm_rope((stream, case.streams[1]), pairs, case.rotary, case.heads)
    (d_stream,) = torch.autograd.grad(q.square().sum(), stream, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_rope_backward"):
        torch.autograd.grad(d_stream.sum(), stream)


def test_a_fake_cuda_tensor_only_infers():
    with FakeTensorMode():
        streams = [torch.empty(1, n, 200, device="cuda") for n in (3, 4)]
        pairs = [(torch.empty(16, device="cuda"),) * 2] * 2
        q, k, v = ops.norm_rope(streams, pairs, (torch.empty(7, 16, device="cuda"),) * 2, 4)
    assert all((t.shape, t.device.type) == ((1, 7, 4, 16), "cuda") for t in (q, k, v))


one = lambda place, change: (
    lambda items: [change(item) if i == place else item for i, item in enumerate(items)]
)
BAD = [
    ({"streams": lambda _: ()}, "streams must be one tensor or two, txt first, in a tuple, got 0"),
    ({"streams": lambda s: s[0]}, "streams must be one tensor or two, .* got Tensor"),
    ({"streams": lambda s: [*s, s[0]]}, "streams must be one tensor or two, .* got 3"),
    ({"streams": one(0, lambda _: None)}, r"streams\[0\] must be a tensor, got NoneType"),
    ({"streams": one(1, lambda s: s[0])}, r"streams\[1\] must be \[B, S, C\] and not empty, got"),
    ({"streams": one(0, lambda s: s[:, :0])}, r"streams\[0\] must be .* got shape \(2, 0, 144\)"),
    ({"streams": one(0, lambda s: s.mT.contiguous().mT)}, r"streams\[0\] must have a last stride"),
    ({"streams": one(1, lambda s: s.int())}, r"streams\[1\] must be bfloat16, .* got torch.int32"),
    ({"streams": one(1, lambda s: s.half())}, "streams must agree in B, dtype and device, got 2"),
    ({"streams": one(1, lambda s: s[:1])}, "streams must agree in B, .* got 2 .* and 1 "),
    ({"streams": one(1, lambda s: s.to("meta"))}, "streams must agree in .* and 2 .* on meta"),
    ({"streams": one(1, lambda s: s[..., :99])}, r"streams\[1\] must have 3 \* H \* D = 144 col"),
    ({"heads": lambda _: 4}, r"streams\[0\] must have 3 \* H \* D = 192 columns or more, .* 144"),
    ({"heads": lambda _: 0}, "heads must be a positive integer, got 0"),
    ({"heads": lambda _: 3.0}, r"heads must be a positive integer, got 3\.0"),
    ({"heads": lambda _: True}, "heads must be a positive integer, got True"),
    ({"rotary": lambda t: t[0]}, "rotary must be two tables, cos and sin, got Tensor"),
    ({"rotary": one(0, lambda _: 1)}, "cos of rotary must be .* got int"),
    ({"rotary": one(1, lambda t: t[:9])}, r"sin of rotary must be \[16, D\] float32, .* got \(9,"),
    ({"rotary": one(0, lambda t: t.double())}, "cos of rotary must be .* got .* torch.float64"),
    ({"rotary": one(0, lambda t: t.to("meta"))}, "cos of rotary must be .* on cpu, got .* on meta"),
    ({"rotary": one(0, lambda t: t[:, :7])}, r"cos of rotary must be .* got \(16, 7\)"),
    ({"rotary": one(0, lambda t: t[:, :8])}, r"rotary must hold tables of one shape, got \(16, 8"),
    ({"rotary": one(1, lambda t: t.clone().requires_grad_())}, "sin of rotary must not require"),
    ({"norms": lambda n: n[:1]}, "norms must be a pair of weights for each of 2 streams, got 1"),
    ({"norms": lambda _: None}, "norms must be a pair of weights .* got NoneType"),
    ({"norms": one(1, lambda n: n[0])}, r"norms\[1\] must be the weights of q and of k, got tens"),
    ({"norms": one(0, lambda n: (n[0], None))}, r"norms\[0\] must hold a \[16\] .* of k, got None"),
    ({"norms": one(0, lambda n: (n[0][:8], n[1]))}, r"norms\[0\] must hold .* of q .* got \(8,\)"),
    ({"norms": one(1, lambda n: (n[0].int(), n[1]))}, r"norms\[1\] .* got \(16,\) torch.int32"),
    ({"norms": one(1, lambda n: (n[0], n[1].to("meta")))}, r"norms\[1\] .* on cpu, got .* meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses(change, message):
    case = draw()
    good = {
        "streams": case.streams, "norms": interleaved_pairs(case.norms),
        "rotary": case.rotary, "heads": case.heads,
    }  # fmt: skip
    ops.norm_rope(**good)
    bad = good | {name: f(good[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=f"^norm_rope: .*{message}"):
        ops.norm_rope(**bad)


def test_one_message_lists_every_reason():
    case = draw()
    bad = [case.streams[0][..., :9], case.streams[1][..., :8]]
    with pytest.raises(ValueError, match="norm_rope: ") as error:
        ops.norm_rope(bad, [(None, case.norms[0])], case.rotary, case.heads)
    for words in ("streams[0] must", "streams[1] must", "norms must"):
        assert words in str(error.value)


def test_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from sda_fast import ops\n"
        "x, w, t = torch.ones(1, 3, 96), torch.ones(16), torch.ones(6, 16)\n"
        "q, k, v = ops.norm_rope((x, x.requires_grad_()), [(w, w)] * 2, (t, 0 * t), 2)\n"
        "q.sum().backward(); assert (q - 1).abs().max() < 1e-5 and v.eq(1).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
