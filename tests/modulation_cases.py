"""Inputs for FLUX's adaptive norms, and the yardstick of numerics.py for what comes out of them."""

from typing import NamedTuple

import torch

from sda_fast import ops, reference

from .numerics import EPS, GRADIENT_CAP, OUTPUT_CAP, RATIO, RMS_CAP, RMS_RATIO

PLAIN, GATED = "ada_norm", "gated_ada_norm"
NAMES = {PLAIN: ("x", "shift", "scale"), GATED: ("x", "y", "gate", "shift", "scale")}

# what the rows of x may be like; a row is off by some common amount, and has its spread
KINDS = {
    "usual": lambda x: x,
    "small": lambda x: 1e-4 * x,  # eps counts
    "offset": lambda x: x + 30,
    "outlier": lambda x: x.index_fill(-1, torch.tensor([1]), 300.0),
    "constant": lambda x: torch.full_like(x, 3.0) + torch.arange(x.shape[1])[:, None],
    "large": lambda x: 3e3 * x,
}


class Results(NamedTuple):
    """Outputs and gradients by name."""

    out: dict
    grad: dict


def draw(
    op, batch=2, length=5, channels=24, dtype=torch.float32, rows=None, kind="usual", device="cpu"
):
    """Inputs by name, shift, scale and gate cut out of one row, and the gradients of the outputs.

    `rows` is the dtype of the modulation; that of x if none is given.
    """
    tokens = [torch.randn(batch, length, channels) for _ in range(4)]
    tokens[0] = KINDS[kind](tokens[0])
    modulation = torch.randn(batch, 6 * channels).to(device, rows or dtype).chunk(6, 1)
    x, y, d_s, d_normed = (t.to(device, dtype) for t in tokens)
    values = {"x": x, "y": y, "gate": modulation[2], "shift": modulation[3], "scale": modulation[4]}
    d_outs = (d_normed,) if op == PLAIN else (d_s, d_normed)
    return {name: values[name] for name in NAMES[op]}, d_outs


def run(function, inputs, d_outs, dtype=None, learn=None):
    """Outputs and gradients of a function of the inputs, in another dtype if one is given.

    `learn` names the inputs that need a gradient, all if None. Without a dtype the very tensors,
    with their strides, go in.
    """
    if dtype is not None:
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        d_outs = [t.to(dtype) for t in d_outs]
    learn = inputs if learn is None else learn
    inputs = {name: t.detach().requires_grad_(name in learn) for name, t in inputs.items()}
    outs = function(**inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [inputs[name] for name in learn]
    grads = torch.autograd.grad(outs, wanted, d_outs)
    names = ("s", "normed")[-len(outs) :]
    return Results(
        {name: out.detach() for name, out in zip(names, outs, strict=True)},
        dict(zip(learn, grads, strict=True)),
    )


def exact(op, inputs, d_outs, found):
    """In float64; the norm is taken of the s that was found, as it should be."""
    if op == PLAIN:
        return run(reference.ada_norm, inputs, d_outs, torch.float64)

    def from_rounded(x, y, gate, shift, scale):
        s = x + gate[:, None] * y
        rounded = s + (found.out["s"].double() - s).detach()
        return s, reference.ada_norm(rounded, shift, scale)

    return run(from_rounded, inputs, d_outs, torch.float64)


def assert_good(op, inputs, d_outs):
    """Fail unless the operator is as good as the reference, in outputs and in every gradient.

    Caps are relative to the largest magnitude, those of outputs too: they are not averages of
    values with unit variance.
    """
    actual = run(getattr(ops, op), inputs, d_outs)
    dtype = inputs["x"].dtype
    eager = run(getattr(reference, op), inputs, d_outs)
    for found in (actual, eager):
        assert {t.dtype for t in found.out.values()} == {dtype}
        assert {name: t.dtype for name, t in found.grad.items()} == {
            name: t.dtype for name, t in inputs.items()
        }
    right, right_eager = (exact(op, inputs, d_outs, found) for found in (actual, eager))
    for part, ratio, caps in zip(
        ("out", "grad"), (RATIO["out"], RATIO["dq"]), (OUTPUT_CAP, GRADIENT_CAP), strict=True
    ):
        for name, a in getattr(actual, part).items():
            x = getattr(right, part)[name]
            e = getattr(eager, part)[name].double() - getattr(right_eager, part)[name]
            name = name if part == "out" else f"d_{name}"
            assert a.shape == x.shape, f"{name}: {tuple(a.shape)} != {tuple(x.shape)}"
            error, largest = a.double() - x, x.abs().max().item()
            allowed = ratio * e.abs().max().item() + max(EPS, torch.finfo(a.dtype).eps) * largest
            cap = caps[a.dtype if a.dtype in caps else torch.float32] * largest
            worst = error.abs().max().item()
            assert worst <= allowed, (
                f"{name}: error {worst:.2e}, the reference allows {allowed:.2e}"
            )
            assert worst <= cap, f"{name}: error {worst:.2e}, the cap is {cap:.2e}"
            if a.dtype in RMS_CAP:
                allowed = max(RMS_CAP[a.dtype] * rms(x), RMS_RATIO * rms(e))
                assert rms(error) <= allowed, f"{name}: RMS of the error above {allowed:.2e}"


def rms(t):
    return t.square().mean().sqrt().item()


def assert_same(found, expected):
    """All outputs and gradients, bit for bit."""
    for part in Results._fields:
        a, b = getattr(found, part), getattr(expected, part)
        assert a.keys() == b.keys()
        for name, t in a.items():
            assert torch.equal(t, b[name]), f"{part} {name}"


def assert_far_is_near(op, reach, axis, **options):
    """Neighbours along an axis so far apart that the last is `reach` elements from the first."""
    inputs, d_outs = draw(op, **options)
    assert_good(op, inputs, d_outs)

    def spread(t):
        # the other axis within the gaps of this one
        strides = [t.shape[2], t.shape[2], 1]
        strides[axis] = -(-reach // (t.shape[axis] - 1) // 8) * 8
        assert strides[axis] >= t.shape[1 - axis] * t.shape[2]
        size = sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True)) + 1
        buffer = torch.full((size,), float("nan"), dtype=t.dtype, device=t.device)
        return buffer.as_strided(t.shape, strides).copy_(t)

    far = {name: spread(t) if t.ndim == 3 else t for name, t in inputs.items()}
    near = run(getattr(ops, op), inputs, d_outs)
    assert_same(run(getattr(ops, op), far, [spread(d) for d in d_outs]), near)


def assert_all_samples_alike(op, batch, **options):
    """Inputs expanded over the batch; results of its whole size."""
    inputs, d_outs = draw(op, batch=1, **options)
    expand = lambda t: t.expand(batch, *(-1,) * (t.ndim - 1))
    expanded = {name: expand(t) for name, t in inputs.items()}
    found = run(getattr(ops, op), expanded, [expand(d) for d in d_outs])
    one = run(getattr(ops, op), inputs, d_outs)
    for part in range(2):
        for name, t in found[part].items():
            assert t.shape[0] == batch
            # how many rows a program adds up goes by the number of all rows
            right = one[part][name] if t.ndim == 3 else t[:1]
            assert t.eq(right).all(), name
