"""How close is close enough: the one tolerance of all attention operators, against float64.

Every result must have the right shape, dtype and pattern of inf and NaN, and its largest error must

- be at most a ratio times the error of the reference run in the same dtype, plus two roundings of
  the output dtype at the largest magnitude, and
- stay under a cap, since the ratio goes blind where the reference itself is poor (sharp softmax).

In half precision the root mean square of the error is capped too, or held to twice the reference's
where that is worse. Every limit allows for what no attention in blocks can avoid: a float32 logit
is off by about `2 * eps * |q| * |k| * scale`, and so is each probability, relatively; and
delta = rowsum(dO * O) is taken from the rounded output, which dq and dk inherit. A kernel that
multiplies rotated operands in half precision rounds them, as the reference does: its out and lse
are held to the reference's error where that is worse than the cap. Where q and k are normed
first, what is off in the gradients of normed rows goes on through the norm: divided by a row's root
mean square to dq and dk, added up over the rows, at random, to the gradients of the weights.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.check import GRADIENT_CAP, OUTPUT_CAP, RATIO
from sda_fast.reference.rope3d_attention import head_norm

RMS_RATIO = 2.0
# ratios and caps are the benchmark's: absolute for outputs, relative to max|ref| for gradients
RMS_CAP = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
LSE_CAP = 2e-5  # relative to max|ref|, absolute below 1

DTYPES = tuple(OUTPUT_CAP)
# inputs to try: standard deviation of q and k, or all logits near plus or minus 200
LOGITS = (0.1, 1.0, 5.0, "near-200")
EPS = torch.finfo(torch.float32).eps


class Attention(NamedTuple):
    """What an attention operator gives: results of the forward and the backward pass."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


class NormedAttention(NamedTuple):
    """The same, with the gradients of the weights of norms of q and k."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dq_norm: Tensor
    dk_norm: Tensor


def draw_qkv(
    query: Sequence[int], key: Sequence[int], logits: float | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q of shape `query`, k and v of shape `key`, [B, S, H, D], for one of LOGITS.

    The default scale, D ** -0.5, is assumed.
    """
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(key)
    if logits == "near-200":
        common = (200 / query[-1] ** 0.5) ** 0.5
        sign = torch.randint(0, 2, (*query[:-1], 1)) * 2 - 1
        q, k = 0.3 * q + sign * common, 0.3 * k + common
    else:
        q, k = q * logits, k * logits
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run_attention(
    op: Callable[..., tuple[Tensor, Tensor]],
    qkv: Sequence[Tensor],
    d_out: Tensor,
    dtype: torch.dtype | None = None,
) -> Attention | NormedAttention:
    """Run `op(q, k, v) -> (out, lse)` and its gradients, in another dtype if one is given.

    The weights [D] of norms of q and k may follow in qkv; op takes them, too, then. Without a
    dtype the very tensors, with their strides, go in.
    """
    if dtype is not None:
        qkv, d_out = [t.to(dtype) for t in qkv], d_out.to(dtype)
    qkv = [t.detach().requires_grad_() for t in qkv]
    out, lse = op(*qkv)
    results = out.detach(), lse.detach(), *torch.autograd.grad(out, qkv, d_out)
    return Attention(*results) if len(qkv) == 3 else NormedAttention(*results)


def assert_attention(
    op: Callable[..., tuple[Tensor, Tensor]],
    reference: Callable[..., tuple[Tensor, Tensor]],
    qkv: Sequence[Tensor],
    d_out: Tensor,
    rounds_operands: bool = False,
) -> None:
    """Fail unless op is as good as the reference in out, lse, dq, dk and dv.

    Both are called as f(q, k, v) and return out [B, S, H, D] and lse [B, H, S]. Of kernels that
    multiply turned or normed operands in half precision it is said that they round them. With
    five tensors in qkv the last two are weights of norms, and their gradients count, too.
    """
    dtype = qkv[0].dtype
    exact = run_attention(reference, qkv, d_out, torch.float64)
    eager = run_attention(reference, qkv, d_out, dtype)
    actual = run_attention(op, qkv, d_out)
    assert actual.lse.dtype == torch.float32, f"lse: {actual.lse.dtype}"
    assert {t.dtype for t in (actual.out, *actual[2:])} == {dtype}

    slack = _unavoidable(qkv, d_out, exact)
    rounds_operands &= dtype != torch.float32
    for name in exact._fields:
        a, e, x = getattr(actual, name), getattr(eager, name), getattr(exact, name)
        _assert_pattern(name, a, x)
        finite = x.isfinite()
        a, e, x = a[finite].double(), e[finite].double(), x[finite]
        largest = x.abs().max().item()
        rounding = torch.finfo(actual.lse.dtype if name == "lse" else dtype).eps * largest
        ratio = RATIO["out" if name == "lse" else name.removesuffix("_norm")]
        if name == "lse":
            cap = LSE_CAP * max(largest, 1.0)
        elif name == "out":
            cap = OUTPUT_CAP[dtype]
        else:
            cap = GRADIENT_CAP[dtype] * largest
        error, allowed = (a - x).abs().max().item(), ratio * (e - x).abs().max().item()
        if rounds_operands and name in ("out", "lse"):
            cap = max(cap, allowed + rounding)
        _assert_below(name, error, allowed + rounding + slack[name], "the reference allows")
        _assert_below(name, error, cap + slack[name], "the cap is")
        if name != "lse" and dtype in RMS_CAP:
            allowed = max(RMS_CAP[dtype] * _rms(x), RMS_RATIO * _rms(e - x))
            _assert_below(f"{name} (RMS)", _rms(a - x), allowed + slack[name], "allowed is")


def _unavoidable(
    qkv: Sequence[Tensor], d_out: Tensor, exact: Attention | NormedAttention
) -> dict[str, float]:
    """Errors of each result from rounded logits and, for dq and dk, from a rounded delta."""
    q, k, v, *weights = (t.double() for t in qkv)
    inverse, largest, rows = [1.0, 1.0], [1.0, 1.0], [1, 1]
    if weights:
        inverse = [x.square().mean(-1).add(1e-6).rsqrt().max().item() for x in (q, k)]
        largest = [weight.abs().max().item() for weight in weights]
        rows = [x[..., 0].numel() for x in (q, k)]
        q, k = (head_norm(x, weight) for x, weight in zip((q, k), weights, strict=True))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    d_p = (d_out.double().transpose(1, 2) @ v.mT).abs().max().item()
    delta = (d_out.double() * exact.out).square().sum(-1).sqrt().max().item()
    scale = q.shape[-1] ** -0.5
    logit = 2 * EPS * q.norm(dim=-1).max().item() * k.norm(dim=-1).max().item() * scale
    d_s = (logit * d_p + torch.finfo(qkv[0].dtype).eps / 2 * delta) * scale
    dq, dk = d_s * k.abs().max().item(), d_s * q.abs().max().item()
    return {
        "out": logit * exact.out.abs().max().item(),
        "lse": logit,
        "dq": dq * inverse[0] * largest[0],
        "dk": dk * inverse[1] * largest[1],
        "dv": logit * exact.dv.abs().max().item(),
        "dq_norm": dq * rows[0] ** 0.5,
        "dk_norm": dk * rows[1] ** 0.5,
    }


def _rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def _assert_below(name: str, error: float, limit: float, words: str) -> None:
    assert error <= limit, f"{name}: error {error:.2e}, {words} {limit:.2e}"


def _assert_pattern(name: str, actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape, f"{name}: {tuple(actual.shape)} != {tuple(exact.shape)}"
    odd = ~exact.isfinite()
    assert actual.isfinite().equal(~odd), f"{name}: inf or NaN where none belongs, or none"
    same = actual.double()[odd].nan_to_num().equal(exact[odd].nan_to_num())
    assert same, f"{name}: inf and NaN in each other's place"
