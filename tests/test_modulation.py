"""Adaptive norms on the CPU: against float64, diffusers' own arithmetic, and what autograd asks."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from sda_fast import ops, reference

from .modulation_cases import GATED, KINDS, NAMES, PLAIN, assert_good, assert_same, draw, run
from .numerics import DTYPES

OPS = (PLAIN, GATED)
MODULATION = ("gate", "shift", "scale")
both = pytest.mark.parametrize("op", OPS)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_good_as_the_reference(kind, dtype, op):
    assert_good(op, *draw(op, dtype=dtype, kind=kind))


@both
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 16), (3, 7, 33), (1, 2, 9000), (1, 300, 8)])
def test_other_sizes_are_too(shape, op):
    assert_good(op, *draw(op, *shape))


@both
@pytest.mark.parametrize("rows", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_modulation_may_have_another_dtype(dtype, rows, op):
    assert_good(op, *draw(op, dtype=dtype, rows=rows))


def modules_of_flux(channels, dtype):
    from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero

    zero = AdaLayerNormZero(channels)
    continuous = AdaLayerNormContinuous(channels, channels, elementwise_affine=False, eps=1e-6)
    return zero.to(dtype), continuous.to(dtype)


def test_it_is_the_arithmetic_of_diffusers():
    """Of AdaLayerNormZero with the second norm of FLUX's block, and of AdaLayerNormContinuous."""
    channels = 24
    zero, continuous = modules_of_flux(channels, torch.float64)
    norm2 = torch.nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)
    x, attended = torch.randn(2, 2, 5, channels, dtype=torch.float64)
    vec = torch.randn(2, channels, dtype=torch.float64)

    normed, gate, shift_mlp, scale_mlp, _ = zero(x, emb=vec)
    shift, scale, *_ = zero.linear(zero.silu(vec)).chunk(6, 1)
    torch.testing.assert_close(ops.ada_norm(x, shift, scale), normed)
    residual = x + gate[:, None] * attended
    expected = norm2(residual) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    s, normed = ops.gated_ada_norm(x, attended, gate, shift_mlp, scale_mlp)
    torch.testing.assert_close((s, normed), (residual, expected))

    scale, shift = continuous.linear(continuous.silu(vec)).chunk(2, 1)
    torch.testing.assert_close(ops.ada_norm(x, shift, scale), continuous(x, vec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_is_nearer_to_float64_than_diffusers_in_half_precision(dtype):
    zero, _ = modules_of_flux(64, dtype)
    x, vec = torch.randn(2, 50, 64).to(dtype), torch.randn(2, 64).to(dtype)
    shift, scale, *_ = zero.linear(zero.silu(vec)).chunk(6, 1)
    exact = reference.ada_norm(x.double(), shift, scale)
    theirs, ours = zero(x, emb=vec)[0], ops.ada_norm(x, shift, scale)
    worst = [(t.double() - exact).square().mean() for t in (ours, theirs)]
    assert worst[0] < worst[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_norm_is_taken_of_the_residual_as_it_is_carried_on(dtype):
    inputs, _ = draw(GATED, dtype=dtype)
    s, normed = ops.gated_ada_norm(**inputs)
    assert torch.equal(normed, ops.ada_norm(s, inputs["shift"], inputs["scale"]))


@both
def test_eps_reaches_the_norm(op):
    inputs, _ = draw(op, kind="small")
    got, default = getattr(ops, op)(**inputs, eps=1e-2), getattr(ops, op)(**inputs)
    torch.testing.assert_close(got, getattr(reference, op)(**inputs, eps=1e-2))
    assert (got[-1] - default[-1]).abs().max() > 1e-3


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_gradients(dtype, op):
    """Tokens along the wrong axis or cut out of wider rows, one modulation for all samples."""
    inputs, d_outs = draw(op, dtype=dtype)
    inputs["x"] = torch.randn(5, 2, 40, dtype=dtype).transpose(0, 1)[..., 3:27]
    for name in set(MODULATION) & inputs.keys():
        inputs[name] = inputs[name][:1].expand(2, -1)
    assert_good(op, inputs, [d.mT.contiguous().mT for d in d_outs])
    expanded = [torch.randn(1, dtype=dtype).expand(d.shape) for d in d_outs]
    assert_good(op, inputs, expanded)
    dense = run(getattr(ops, op), inputs, [d.contiguous() for d in expanded])
    assert_same(run(getattr(ops, op), inputs, expanded), dense)
    for t in (*dense.out.values(), dense.grad["x"]):
        assert t.is_contiguous()


@both
def test_gradcheck(op):
    inputs, _ = draw(op, 2, 3, 6, torch.float64)
    function = lambda *t: getattr(ops, op)(**dict(zip(inputs, t, strict=True)))
    assert torch.autograd.gradcheck(function, [t.clone().requires_grad_() for t in inputs.values()])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_frozen_changes_nothing_for_the_rest(dtype, op):
    inputs, d_outs = draw(op, dtype=dtype)
    full = run(getattr(ops, op), inputs, d_outs)
    tokens = [name for name in inputs if name not in MODULATION]
    for frozen in range(8):
        learn = [n for i, n in enumerate(MODULATION) if n in inputs and not frozen >> i & 1]
        found = run(getattr(ops, op), inputs, d_outs, learn=[*tokens, *learn])
        assert_same(found, full._replace(grad={name: full.grad[name] for name in found.grad}))


@both
def test_what_is_frozen_gets_no_work_and_keeps_nothing(op):
    """Of the size of tokens only the input is kept, and y only where gate learns."""
    inputs, d_outs = draw(op)
    for learn, learns in (((), [False] * 3), (MODULATION, [True] * 3)):
        names = [n for n in inputs if n not in MODULATION or n in learn]
        kept, called = [], []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, f, types, args=(), kwargs=None):
                if f.name() == f"sda_fast::{op}_backward":
                    called.append(args[-1])  # noqa: B023
                return f(*args, **(kwargs or {}))

        leaves = {n: t.detach().requires_grad_(n in names) for n, t in inputs.items()}
        keep = lambda t: kept.append(t) or t  # noqa: B023
        with Watch(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            outs = getattr(ops, op)(**leaves)
            outs = outs if isinstance(outs, tuple) else (outs,)
            torch.autograd.grad(outs, [leaves[n] for n in names], d_outs)
        large = {t.data_ptr() for t in kept if t.shape == inputs["x"].shape}
        expected = [leaves["x"]] if op == PLAIN else [outs[0], *([leaves["y"]] if learn else [])]
        assert large == {t.data_ptr() for t in expected}
        assert called == [learns[: len(inputs) - len(d_outs)]]
        assert sum(t.nbytes for t in kept if t.shape == (2, 5, 2)) == 8 * 10


@both
def test_a_sample_alone_equals_itself_in_a_batch(op):
    inputs, d_outs = draw(op)
    together = run(getattr(ops, op), inputs, d_outs)
    alone = run(getattr(ops, op), {n: t[1:] for n, t in inputs.items()}, [d[1:] for d in d_outs])
    second = [{name: t[1:] for name, t in part.items()} for part in together]
    assert_same(alone, together._make(second))


@both
def test_a_second_derivative_is_refused(op):
    inputs, _ = draw(op)
    inputs["x"].requires_grad_()
    out = getattr(ops, op)(**inputs)
    total = sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))
    (dx,) = torch.autograd.grad(total, inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{op}_backward"):
        torch.autograd.grad(dx.sum(), inputs["x"])


@both
@pytest.mark.parametrize("learns", [True, False])
def test_opcheck(learns, op):
    inputs, d_outs = draw(op, dtype=torch.bfloat16)
    leaves = {n: t.clone().requires_grad_(learns or n not in MODULATION) for n, t in inputs.items()}
    forward = getattr(torch.ops.sda_fast, op).default
    torch.library.opcheck(forward, (*leaves.values(), 1e-6))
    *outs, stats = forward(*inputs.values(), 1e-6)
    rows = [inputs[name] for name in MODULATION if name in inputs]
    saved = (inputs["x"],) if op == PLAIN else (outs[0], inputs["y"] if learns else None)
    torch.library.opcheck(
        getattr(torch.ops.sda_fast, f"{op}_backward").default,
        (*d_outs, *saved, stats, *rows, [learns] * len(rows)),
        test_utils=("test_schema", "test_faketensor"),
    )


class Block(torch.nn.Module):
    """The two norms and the gated residual of a block."""

    def __init__(self, learns=True):
        super().__init__()
        self.modulation = torch.nn.Linear(8, 6 * 16).requires_grad_(learns)
        self.inner, self.outer = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

    def forward(self, x, vec):
        shift, scale, gate, *second, _ = self.modulation(vec).chunk(6, 1)
        y = self.inner(ops.ada_norm(x, shift, scale))
        s, normed = ops.gated_ada_norm(x, y, gate, *second)
        return s + self.outer(normed)


def gradients(function, block, x, vec):
    learned = [p for p in block.parameters() if p.requires_grad]
    return torch.autograd.grad(function(x, vec).square().sum(), [x, *learned])


@pytest.mark.parametrize("learns", [True, False])
def test_compiles_whole_and_for_other_sizes(learns):
    block = Block(learns)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch, length in ((2, 5), (3, 7), (1, 4)):
        x, vec = torch.randn(batch, length, 16, requires_grad=True), torch.randn(batch, 8)
        found = gradients(compiled, block, x, vec)
        torch.testing.assert_close(found, gradients(block, block, x, vec))


def test_recomputed_in_a_checkpoint_it_is_the_same():
    block = Block()
    x, vec = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 8)
    again = lambda *args: checkpoint(block, *args, use_reentrant=False)
    for a, b in zip(gradients(again, block, x, vec), gradients(block, block, x, vec), strict=True):
        assert torch.equal(a, b)


@both
def test_autocast_changes_nothing(op):
    inputs, _ = draw(op)
    with torch.autocast("cpu", torch.bfloat16):
        found = getattr(ops, op)(**inputs)
    for a, b in zip(found, getattr(ops, op)(**inputs), strict=True):
        assert torch.equal(a, b)


@both
def test_a_fake_cuda_tensor_only_infers(op):
    with FakeTensorMode():
        tokens, rows = torch.empty(2, 5, 16, device="cuda"), torch.empty(2, 16, device="cuda")
        out = getattr(ops, op)(*(rows if n in MODULATION else tokens for n in NAMES[op]))
        for t in out if isinstance(out, tuple) else (out,):
            assert (t.shape, t.device.type) == ((2, 5, 16), "cuda")


BAD = [
    ({"x": lambda t: t[0]}, r"x must be \[B, S, C\] and not empty, got shape \(5, 24\)"),
    ({"x": lambda t: t[:, :0]}, r"x must be .* not empty, got shape \(2, 0, 24\)"),
    ({"x": lambda t: t.mT.contiguous().mT}, r"x must have a last stride of 1, got strides"),
    ({"x": lambda t: t.int()}, "x must be bfloat16, float16, float32 or float64, got torch.int32"),
    ({"y": lambda t: t.half()}, "y must have the dtype of x, torch.float32, got torch.float16"),
    ({"y": lambda t: t[:, 1:]}, r"y must have the shape of x \(2, 5, 24\), got \(2, 4, 24\)"),
    ({"y": lambda t: t.to("meta")}, "y must be on the device of x, cpu, got meta"),
    ({"shift": lambda t: t[:1]}, r"shift must be \[B, C\] \(2, 24\), got shape \(1, 24\)"),
    ({"scale": lambda t: t[0]}, r"scale must be \[B, C\] \(2, 24\), got shape \(24,\)"),
    ({"gate": lambda t: t[:, None]}, r"gate must be \[B, C\] .*got shape \(2, 1, 24\)"),
    ({"scale": lambda t: t.mT.contiguous().mT}, "scale must have a last stride of 1"),
    ({"shift": lambda t: t.long()}, "shift must be bfloat16, .* got torch.int64"),
    ({"gate": lambda t: t.to("meta")}, "gate must be on the device of x, cpu, got meta"),
    ({"eps": lambda _: 0.0}, r"eps must be a positive finite number, got 0\.0"),
    ({"eps": lambda _: float("nan")}, "eps must be a positive finite number, got nan"),
]


@pytest.mark.parametrize(("op", "change", "message"), [
    (op, change, message) for op in OPS for change, message in BAD
    if change.keys() <= {*NAMES[op], "eps"}
])  # fmt: skip
def test_refuses(change, message, op):
    good = draw(op)[0] | {"eps": 1e-6}
    getattr(ops, op)(**good)
    bad = good | {name: f(good[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=f"^{op}: .*{message}"):
        getattr(ops, op)(**bad)


def test_one_message_lists_every_reason():
    x, row = torch.ones(2, 5, 24), torch.ones(2, 23)
    with pytest.raises(ValueError, match=r"^gated_ada_norm: ") as error:
        ops.gated_ada_norm(x, x.half(), row, row, row.int(), eps=-1.0)
    for words in ("eps must", "y must", "gate must", "shift must", "scale must"):
        assert words in str(error.value)


@both
def test_what_is_no_tensor_is_refused_by_name(op):
    for name in NAMES[op]:
        with pytest.raises(TypeError, match=f"^{op}: {name} must be a tensor, got NoneType"):
            getattr(ops, op)(**draw(op)[0] | {name: None})


def test_needs_no_triton():
    code = (
        "import sys\n"
        "for name in ('triton', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "import torch, sda_fast.ops as ops\n"
        "x, row = torch.ones(1, 2, 3, requires_grad=True), torch.ones(1, 3)\n"
        "s, normed = ops.gated_ada_norm(x, x, row, row, row)\n"
        "assert s.eq(2).all() and normed.eq(1).all()\n"
        "(s.sum() + normed.sum() + ops.ada_norm(x, row, row).sum()).backward()\n"
        "assert x.grad.eq(2).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
