import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from sda_fast import ops, reference
from sda_fast.coords import patch_coords
from sda_fast.hierarchy import Hierarchy
from sda_fast.reference.rope3d_attention import default_axes

from .numerics import DTYPES, LOGITS, assert_attention, draw_qkv, run_attention

TREE = Hierarchy((2, 1, 1))
AXES = {16: (4, 6, 6), 32: (8, 12, 12), 64: (16, 24, 24), 80: (20, 30, 30), 128: (32, 48, 48)}


def draw(
    heads: int = 2,
    head_dim: int = 16,
    grid: tuple[int, int] = (5, 3),
    logits: float | str = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor]]:
    """qkv, the output's gradient and the places of a tree's queries over a grid of patches."""
    coords = TREE.token_coords(*grid), patch_coords(*grid)
    query = 2, TREE.num_tokens, heads, head_dim
    q, k, v = draw_qkv(query, (2, grid[0] * grid[1], heads, head_dim), logits, torch.float32)
    if logits == "near-200":
        # turned back, so that the operator's rotation makes all logits large again
        q = reference.rope3d(q, -coords[0], AXES[head_dim])
        k = reference.rope3d(k, -coords[1], AXES[head_dim])
    return [t.to(dtype) for t in (q, k, v)], torch.randn(query).to(dtype), coords


def weights(head_dim, dtype=torch.float32, device=None):
    """Of norms of q and of k."""
    return [(1 + 0.3 * torch.randn(head_dim)).to(device, dtype) for _ in range(2)]


def bind(op, coords, **options):
    """`op` as f(q, k, v, weights of norms, if any) -> (out, lse)."""
    return lambda q, k, v, *norms: op(
        q, k, v, *coords, norms=norms or None, return_lse=True, **options
    )


def assert_good(qkv, d_out, coords, **options):
    op, right = ops.rope3d_attention, reference.rope3d_attention
    assert_attention(bind(op, coords, **options), bind(right, coords, **options), qkv, d_out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize(
    ("heads", "head_dim", "grid"),
    [(1, 16, (2, 3)), (3, 16, (5, 7)), (2, 64, (9, 4)), (1, 80, (3, 5)), (1, 128, (4, 4))],
)
def test_is_as_good_as_the_reference(heads, head_dim, grid, logits, dtype):
    assert_good(*draw(heads, head_dim, grid, logits, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_places_of_each_sample(dtype):
    qkv, d_out, (_, k_coords) = draw(dtype=dtype)
    q_coords = torch.rand(2, TREE.num_tokens, 3) * 64
    assert_good(qkv, d_out, (q_coords, k_coords))
    # the same samples one by one, each with its own places
    op = ops.rope3d_attention
    out = op(*qkv, q_coords, k_coords)
    for i in range(2):
        alone = op(*(t[i : i + 1] for t in qkv), q_coords[i], k_coords)
        assert torch.equal(out[i : i + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs_and_gradients(dtype):
    """Learned queries expanded over the batch, k and v two slices of one projection."""
    _, _, coords = draw()
    q = torch.randn(TREE.num_tokens, 2, 16, dtype=dtype).expand(2, -1, -1, -1)
    k, v = torch.randn(2, 15, 2, 2, 24, dtype=dtype)[..., 4:20].unbind(2)
    d_out = torch.randn(2, 2, TREE.num_tokens, 20, dtype=dtype).transpose(1, 2)[..., 4:]
    assert_good((q, k, v), d_out, coords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_output_gradient_equals_a_dense_one(dtype):
    qkv, d_out, coords = draw(dtype=dtype)
    expanded = torch.randn(1, dtype=dtype).expand(d_out.shape)
    op = bind(ops.rope3d_attention, coords)
    for a, b in zip(
        run_attention(op, qkv, expanded), run_attention(op, qkv, expanded.contiguous()), strict=True
    ):
        assert torch.equal(a, b)


def test_rotation_follows_its_formula():
    """Written with sines and cosines, one pair of numbers at a time."""
    axes, theta = (2, 4, 6), 100.0
    x, coords = torch.randn(1, 3, 1, 12, dtype=torch.float64), torch.randn(3, 3)
    expected = x.clone()
    for place in range(3):
        start = 0
        for axis, size in enumerate(axes):
            for i in range(size // 2):
                angle = coords[place, axis].item() * theta ** (-2 * i / size)
                a, b = x[0, place, 0, start : start + 2].tolist()
                turned = (
                    a * math.cos(angle) - b * math.sin(angle),
                    a * math.sin(angle) + b * math.cos(angle),
                )
                expected[0, place, 0, start : start + 2] = torch.tensor(turned)
                start += 2
    turned = reference.rope3d(x, coords, axes, theta)
    torch.testing.assert_close(turned, expected, atol=1e-6, rtol=0)


def test_rotation_is_the_one_of_flux():
    """Same pairs, same frequencies as diffusers' own, so that both speak of the same axes."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    coords = patch_coords(4, 5)
    x = torch.randn(2, 20, 3, 64)
    table = FluxPosEmbed(theta=10000, axes_dim=[16, 24, 24])(coords)
    theirs = apply_rotary_emb(x, table, sequence_dim=1)
    torch.testing.assert_close(reference.rope3d(x, coords, (16, 24, 24)), theirs)


def test_rotating_there_and_back_is_nothing():
    x, coords = torch.randn(2, 15, 2, 16), patch_coords(5, 3)
    back = reference.rope3d(reference.rope3d(x, coords, AXES[16]), -coords, AXES[16])
    torch.testing.assert_close(back, x)


def test_only_differences_of_place_count():
    qkv, _, coords = draw()
    shift = torch.tensor([1.0, 7.0, -3.0])
    moved = [c + shift for c in coords]
    out = ops.rope3d_attention(*qkv, *coords)
    torch.testing.assert_close(ops.rope3d_attention(*qkv, *moved), out, atol=1e-4, rtol=0)
    # and they do count
    assert (ops.rope3d_attention(*qkv, coords[0] + shift, coords[1]) - out).abs().max() > 0.05


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_places_and_no_places_are_plain_attention(dtype):
    qkv, d_out, coords = draw(dtype=dtype)
    plain = run_attention(bind(ops.rope3d_attention, (None, None)), qkv, d_out)
    zeros = [torch.zeros_like(c) for c in coords]
    for a, b in zip(
        plain, run_attention(bind(ops.rope3d_attention, zeros), qkv, d_out), strict=True
    ):
        assert torch.equal(a, b)
    assert_good(qkv, d_out, (None, None))
    q, k, v = (t.float().transpose(1, 2) for t in qkv)
    dense = scaled_dot_product_attention(q, k, v).transpose(1, 2)
    assert torch.equal(plain.out, dense.to(dtype))


def test_options_reach_the_operator():
    qkv, d_out, coords = draw()
    options = {"scale": 0.4, "axes": (2, 6, 8), "theta": 100.0}
    op, right = ops.rope3d_attention, reference.rope3d_attention
    default = op(*qkv, *coords)
    for name, value in options.items():
        got = op(*qkv, *coords, **{name: value})
        torch.testing.assert_close(got, right(*qkv, *coords, **{name: value}))
        assert (got - default).abs().max() > 1e-3
    del options["scale"]  # the yardstick assumes the default
    assert_good(qkv, d_out, coords, **options)


@pytest.mark.parametrize("head_dim", AXES)
def test_default_axes_keep_the_ratio(head_dim):
    assert default_axes(head_dim) == AXES[head_dim]


def test_gradcheck():
    qkv, _, coords = draw(heads=1, grid=(2, 2))
    qkv = [t.double().requires_grad_() for t in qkv]
    assert torch.autograd.gradcheck(
        lambda *t: ops.rope3d_attention(*t, *coords), qkv, fast_mode=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_alone_equals_itself_in_a_batch(dtype):
    qkv, d_out, coords = draw(dtype=dtype)
    op = bind(ops.rope3d_attention, coords)
    alone = run_attention(op, [t[1:] for t in qkv], d_out[1:])
    for a, b in zip(alone, run_attention(op, qkv, d_out), strict=True):
        assert torch.equal(a, b[1:])


def test_lse_has_no_gradient_and_a_second_derivative_is_refused():
    qkv, _, coords = draw()
    qkv = [t.requires_grad_() for t in qkv]
    out, lse = ops.rope3d_attention(*qkv, *coords, return_lse=True)
    assert not lse.requires_grad
    (dq,) = torch.autograd.grad(out.square().sum(), qkv[0], create_graph=True)
    with pytest.raises(RuntimeError, match="rope3d_attention_backward"):
        torch.autograd.grad(dq.sum(), qkv[1])


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_opcheck(rotated, normed):
    (q, k, v), d_out, coords = draw(dtype=torch.bfloat16)
    places = (*coords, None, 0.25, [4, 6, 6], 1e4)
    if not rotated:
        places = (None, None, None, 0.25, [], 1e4)
    norms = weights(16, torch.bfloat16, q.device) if normed else (None, None)
    op = torch.ops.sda_fast.rope3d_attention
    out, lse = op(q, k, v, *norms, *places)
    inputs = [t if t is None else t.clone().requires_grad_() for t in (q, k, v, *norms)]
    torch.library.opcheck(op.default, (*inputs, *places))
    torch.library.opcheck(
        torch.ops.sda_fast.rope3d_attention_backward.default,
        (d_out, q, k, v, out, lse, *norms, *places),
        test_utils=("test_schema", "test_faketensor"),
    )


class CrossAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.queries = torch.nn.Parameter(torch.randn(TREE.num_tokens, 2, 16))
        self.kv = torch.nn.Linear(8, 64)

    def forward(self, x: Tensor, q_coords: Tensor, k_coords: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2, 2, 16)).unbind(2)
        q = self.queries.expand(len(x), -1, -1, -1)
        return ops.rope3d_attention(q, k, v, q_coords, k_coords).flatten(2)


def test_compiles_whole_and_for_other_sizes():
    module = CrossAttention()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for h, w in ((3, 4), (5, 2), (2, 7)):
        x, coords = torch.randn(2, h * w, 8), (TREE.token_coords(h, w), patch_coords(h, w))
        grads = [
            torch.autograd.grad(f(x, *coords).square().sum(), list(module.parameters()))
            for f in (module, compiled)
        ]
        torch.testing.assert_close(*grads)


def test_recomputed_in_a_checkpoint_it_is_the_same():
    module, x = CrossAttention(), torch.randn(2, 12, 8, requires_grad=True)
    coords = TREE.token_coords(3, 4), patch_coords(3, 4)
    plain = torch.autograd.grad(module(x, *coords).square().sum(), x)[0]
    again = checkpoint(module, x, *coords, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(again.square().sum(), x)[0], plain)


def test_autocast_casts_q_k_v_and_leaves_the_places():
    (q, k, v), _, coords = draw()
    coords = [c + 0.01 for c in coords]  # not to be had in bf16
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.rope3d_attention(q, k.bfloat16(), v, *coords)
    assert out.dtype == torch.bfloat16
    cast = [t.bfloat16() for t in (q, k, v)]
    assert torch.equal(out, ops.rope3d_attention(*cast, *coords))


def test_a_fake_cuda_tensor_only_infers():
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 3, 2, 16, device="cuda") for _ in range(3))
        out = ops.rope3d_attention(q, k, v, None, None)
    assert (out.shape, out.device.type) == ((1, 3, 2, 16), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(15, 4), (1, 15), (0, 7)])
def test_padding_never_leaks(lengths, dtype):
    """Also of a sample without keys: out 0, lse -inf, and no gradient."""
    qkv, d_out, coords = draw(dtype=dtype)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    assert_good(qkv, d_out, coords, lengths=lengths)
    op = bind(ops.rope3d_attention, coords, lengths=lengths)
    before = run_attention(op, qkv, d_out)
    for i, length in enumerate(lengths):
        for t in qkv[1:]:
            t[i, length:] = float("nan")
    after = run_attention(op, qkv, d_out)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
    for i, length in enumerate(lengths):
        assert after.dk[i, length:].eq(0).all()
        assert after.dv[i, length:].eq(0).all()
        if length == 0:
            assert after.out[i].eq(0).all()
            assert after.lse[i].eq(float("-inf")).all()
            assert after.dq[i].eq(0).all()


BAD = [
    ({"k": lambda t: t.half()}, "k must have the dtype of q"),
    ({"k": lambda t: t[:, :, :1], "v": lambda t: t[:, :, :1]}, "k must have B, H, D of q"),
    ({"v": lambda t: t[:, :-1]}, "v must have the shape of k"),
    ({"k": lambda t: t[:, :0], "v": lambda t: t[:, :0]}, "k must not be empty"),
    ({"q_coords": lambda t: t[:-1]}, r"q_coords must be \[22, 3\] or \[2, 22, 3\], got"),
    ({"k_coords": lambda t: t[:, :2]}, r"k_coords must be \[15, 3\] or \[2, 15, 3\], got"),
    ({"k_coords": lambda t: t.expand(3, -1, -1)}, r"k_coords must be .* got shape \(3, 15, 3\)"),
    ({"q_coords": lambda t: t.double()}, "q_coords must be float32, got torch.float64"),
    ({"q_coords": lambda t: t.to("meta")}, "q_coords must be on the device of q, cpu, got meta"),
    ({"q_coords": lambda t: t.requires_grad_()}, "q_coords must not require a gradient"),
    ({"q_coords": lambda t: t.tolist()}, "q_coords must be a tensor or None, got list"),
    ({"k_coords": lambda t: t.numpy()}, "k_coords must be a tensor or None, got ndarray"),
    ({"lengths": lambda _: [3, 4]}, "lengths must be a tensor or None, got list"),
    ({"axes": lambda _: 16}, "axes must be 3 even sizes with the sum D = 16, got 16"),
    ({"axes": lambda _: "abc"}, "axes must be 3 even sizes"),
    ({"axes": lambda _: (4.0, 6.0, 6.0)}, "axes must be 3 even sizes"),
    ({"axes": lambda _: (False, 8, 8)}, "axes must be 3 even sizes"),
    ({"theta": lambda _: "10"}, "theta must be a positive finite number of at least 1e-06"),
    ({"theta": lambda _: float("inf")}, "theta must be a positive finite number"),
    ({"scale": lambda _: "1"}, "scale must be a positive finite number, got '1'"),
    ({"scale": lambda _: 3.4e38}, "scale must be a positive finite number"),
    ({"q_coords": lambda t: t / 0}, "q_coords must be finite"),
    ({"k_coords": lambda t: t * float("nan")}, "k_coords must be finite"),
    ({"k_coords": lambda _: None}, "q_coords and k_coords must be given together"),
    ({"axes": lambda _: (4, 6, 8)}, r"axes must be 3 even sizes with the sum D = 16, got"),
    ({"axes": lambda _: (5, 5, 6)}, "axes must be 3 even sizes"),
    ({"axes": lambda _: (8, 8)}, "axes must be 3 even sizes"),
    ({"axes": lambda _: (-4, 10, 10)}, "axes must be 3 even sizes"),
    ({"theta": lambda _: 0.0}, r"theta must be a positive finite number of .* got 0\.0"),
    ({"scale": lambda _: -0.1}, r"scale must be a positive finite number, got -0\.1"),
    ({"lengths": lambda _: torch.tensor([3]).int()}, r"lengths must be \[2\] int32"),
    ({"lengths": lambda _: torch.tensor([3, 4])}, "lengths must be .* torch.int64"),
    ({"lengths": lambda _: torch.tensor([3, 16]).int()}, "lengths must be 0 to S = 15"),
    ({"lengths": lambda _: torch.tensor([-1, 3]).int()}, "lengths must be 0 to S = 15"),
    ({n: lambda t: t[..., :12] for n in "qkv"}, "axes must be given for D = 12"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD)
def test_refuses(change, message):
    qkv, _, coords = draw()
    good = dict(zip(("q", "k", "v", "q_coords", "k_coords"), (*qkv, *coords), strict=True))
    ops.rope3d_attention(**good)
    bad = good | {name: f(good.get(name)) for name, f in change.items()}
    with pytest.raises(ValueError, match=f"^rope3d_attention: .*{message}"):
        ops.rope3d_attention(**bad)


@pytest.mark.parametrize("absent", [0, 1])
def test_reference_refuses_places_of_one_side_alike(absent):
    (q, k, v), _, coords = draw()
    coords = [None if side == absent else c for side, c in enumerate(coords)]
    messages = []
    for attention in (ops.rope3d_attention, reference.rope3d_attention):
        with pytest.raises(ValueError, match="must be given together") as error:
            attention(q, k, v, *coords)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_one_message_lists_every_reason():
    (q, k, v), _, (q_coords, k_coords) = draw()
    with pytest.raises(ValueError, match="rope3d_attention: ") as error:
        ops.rope3d_attention(q, k, v, q_coords[1:], k_coords.half(), axes=(1, 2, 3), theta=-1.0)
    for words in ("q_coords must", "k_coords must", "axes must", "theta must"):
        assert words in str(error.value)


def test_operators_need_neither_triton_nor_diffusers_nor_transformers():
    code = (
        "import sys\n"
        "for name in ('triton', 'diffusers', 'transformers'): sys.modules[name] = None\n"
        "import torch, sda_fast.ops as ops\n"
        "from sda_fast.hierarchy import Hierarchy\n"
        "q = torch.ones(1, 5, 1, 16)\n"
        "assert ops.hierarchical_attention(q, q, q, Hierarchy((1,)), 2, 2).eq(1).all()\n"
        "assert ops.rope3d_attention(q, q, q, None, None).eq(1).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
