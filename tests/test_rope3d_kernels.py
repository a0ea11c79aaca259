"""The kernels of rotated attention against the reference, on the GPU or in Triton's interpreter."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from csrc_triton import tiles
from csrc_triton.tiles import Tile, choose_parts, forced
from sda_fast import ops, reference
from sda_fast.coords import patch_coords
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops import rope3d_kernels

from .interpreter.sanitizer import sanitized
from .numerics import DTYPES, LOGITS, assert_attention, draw_qkv, run_attention

pytestmark = pytest.mark.usefixtures("kernels")

TREE = Hierarchy((2, 1, 1))
AXES = {16: (4, 6, 6), 32: (8, 12, 12), 64: (16, 24, 24), 80: (20, 30, 30), 128: (32, 48, 48)}
SMALL = {name: Tile(16, 16, 4, 2) for name in tiles.ROPE3D_KERNELS}
LARGE = {name: Tile(32, 64, 4, 2) for name in tiles.ROPE3D_KERNELS}


# into how many parts the keys are split, whatever the rule says, and with which tiles: such that
# need several steps, and such that need one
WAYS = {
    "whole-small": (1, SMALL),
    "split-small": (3, SMALL),
    "whole-large": (1, LARGE),
    "split-large": (3, LARGE),
}


@pytest.fixture(params=["whole-small", "split-small"])
def way(request, monkeypatch):
    """One of WAYS; a GPU keeps the tiles of the table."""
    parts, sizes = WAYS[request.param]
    monkeypatch.setattr(rope3d_kernels, "choose_parts", lambda *_: parts)
    with forced(**({} if torch.cuda.is_available() else sizes)):
        yield


def ways(names, *values):
    """Parametrize: a way by name, then values."""
    return pytest.mark.parametrize(("way", *names.split()), values, indirect=["way"])


def draw(device, heads=1, head_dim=16, grid=(5, 7), logits=1.0, dtype=torch.float32):
    """qkv, the output's gradient, and the places of a tree's queries over a grid of patches."""
    coords = TREE.token_coords(*grid), patch_coords(*grid)
    query = 2, TREE.num_tokens, heads, head_dim
    q, k, v = draw_qkv(query, (2, grid[0] * grid[1], heads, head_dim), logits, torch.float32)
    if logits == "near-200":
        # turned back, so that the operator's rotation makes all logits large again
        q = reference.rope3d(q, -coords[0], AXES[head_dim])
        k = reference.rope3d(k, -coords[1], AXES[head_dim])
    qkv = [t.to(device, dtype) for t in (q, k, v)]
    return qkv, torch.randn(query).to(device, dtype), [c.to(device) for c in coords]


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
    functions = bind(op, coords, **options), bind(right, coords, **options)
    assert_attention(*functions, qkv, d_out, rounds_operands=True)


# each dtype meets each way and each kind of logits
@ways(
    "logits dtype",
    *(
        (way, logits, DTYPES[(i + j) % 3])
        for i, way in enumerate(WAYS)
        for j, logits in enumerate(LOGITS)
    ),
)
def test_is_as_good_as_the_reference(logits, dtype, way, device):
    assert_good(*draw(device, logits=logits, dtype=dtype))


@ways(
    "logits dtype",
    *(
        (way, logits, DTYPES[(i + j) % 3])
        for i, way in enumerate(WAYS)
        for j, logits in enumerate(LOGITS[::3])
    ),
)
def test_with_norms_too(logits, dtype, way, device):
    """Every gradient, those of the weights included; norms make all logits moderate, so two do."""
    qkv, d_out, coords = draw(device, logits=logits, dtype=dtype)
    assert_good([*qkv, *weights(16, dtype, device)], d_out, coords)


@ways("dtype", ("whole-small", torch.bfloat16), ("split-small", torch.float32))
def test_sharp_logits_by_large_weights_of_norms(dtype, way, device):
    qkv, d_out, coords = draw(device, dtype=dtype)
    assert_good([*qkv, *(5 * w for w in weights(16, dtype, device))], d_out, coords)


@pytest.mark.parametrize(("head_dim", "places"), [(32, True), (80, True), (128, True), (64, False)])
def test_norms_of_other_sizes(head_dim, places, device):
    qkv, d_out, coords = draw(device, 2, head_dim, (3, 5), dtype=torch.bfloat16)
    norms = weights(head_dim, torch.bfloat16, device)
    assert_good([*qkv, *norms], d_out, coords if places else (None, None))


def test_norms_with_padding_and_a_sample_without_keys(way, device):
    qkv, d_out, coords = draw(device)
    counts = torch.tensor((0, 16), dtype=torch.int32, device=device)
    norms = weights(16, device=device)
    assert_good([*qkv, *norms], d_out, coords, lengths=counts)
    op = bind(ops.rope3d_attention, coords, lengths=counts)
    before = run_attention(op, [*qkv, *norms], d_out)
    for i, length in enumerate(counts.tolist()):
        for t in qkv[1:]:
            t[i, length:] = float("nan")
    for a, b in zip(before, run_attention(op, [*qkv, *norms], d_out), strict=True):
        assert torch.equal(a, b)


def test_rows_of_zeros_and_large_rows_are_normed_as_the_reference_norms_them(way, device):
    (q, k, v), d_out, coords = draw(device)
    q[:, 0], k[:, 1], q[:, 2] = 0.0, 0.0, 1e-4 * q[:, 2]
    k[:, 3] *= 1e4
    assert_good([q, k, v, *weights(16, device=device)], d_out, coords)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "grid"),
    [(1, 16, (1, 1)), (2, 32, (2, 3)), (1, 64, (9, 4)), (1, 80, (3, 5)), (1, 128, (4, 4))],
)
def test_other_sizes_with_the_tiles_and_parts_of_the_table(heads, head_dim, grid, dtype, device):
    assert_good(*draw(device, heads, head_dim, grid, dtype=dtype))


def test_without_places_it_is_plain_attention_bit_for_bit(way, device):
    qkv, d_out, coords = draw(device, dtype=torch.bfloat16)
    nowhere = [torch.zeros_like(c) for c in coords]
    plain = run_attention(bind(ops.rope3d_attention, (None, None)), qkv, d_out)
    for a, b in zip(
        plain, run_attention(bind(ops.rope3d_attention, nowhere), qkv, d_out), strict=True
    ):
        assert torch.equal(a, b)
    assert_good(qkv, d_out, (None, None))


def test_only_distances_count(way, device):
    (q, k, v), _, coords = draw(device)
    out = ops.rope3d_attention(q, k, v, *coords)
    moved = ops.rope3d_attention(q, k, v, *(c + 10.0 for c in coords))
    torch.testing.assert_close(moved, out, rtol=0, atol=2e-5)


@ways("far", ("whole-small", 300.0), ("split-small", 5000.0))
def test_far_places_are_turned_as_the_reference_turns_them(far, way, device):
    """float32 angles: both are off by their size times 2**-24, not more."""
    (q, k, v), _, coords = draw(device)
    coords = [c + far for c in coords]
    exact = reference.rope3d_attention(*(t.double() for t in (q, k, v)), *coords)
    out = ops.rope3d_attention(q, k, v, *coords)
    assert (out.double() - exact).abs().max() < 8 * far * 2**-24


@ways("gradient", ("whole-small", "expanded"), ("split-small", "strided"))
def test_places_of_each_sample_and_strided_inputs(gradient, way, device):
    _, _, (_, k_coords) = draw(device)
    q_coords = (torch.rand(2, TREE.num_tokens, 3) * 64).to(device)
    q = torch.randn(TREE.num_tokens, 2, 16).to(device, torch.bfloat16).expand(2, -1, -1, -1)
    k, v = torch.randn(2, 35, 2, 2, 24).to(device, torch.bfloat16)[..., 4:20].unbind(2)
    if gradient == "expanded":
        d_out = torch.randn(1).to(device, torch.bfloat16).expand(2, TREE.num_tokens, 2, 16)
    else:
        d_out = torch.randn(2, 2, TREE.num_tokens, 20).to(device, torch.bfloat16)
        d_out = d_out.transpose(1, 2)[..., 4:]
        k_coords = (torch.rand(2, 35, 3) * 64).to(device)
    assert_good((q, k, v), d_out, (q_coords, k_coords))


@ways(
    "lengths dtype",
    ("whole-small", (35, 17), torch.bfloat16),
    ("split-small", (35, 17), torch.float32),
    ("split-small", (0, 16), torch.bfloat16),
)
def test_padding_never_leaks(lengths, dtype, way, device):
    """Also of a sample without keys: out 0, lse -inf, and no gradient."""
    qkv, d_out, coords = draw(device, dtype=dtype)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    assert_good(qkv, d_out, coords, lengths=counts)
    op = bind(ops.rope3d_attention, coords, lengths=counts)
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


@ways("layout", ("split-small", "strided"), ("whole-small", "expanded"))
def test_lengths_of_any_strides(layout, way, device):
    qkv, d_out, coords = draw(device)
    counts = torch.tensor([[17, 35], [35, 1]], dtype=torch.int32, device=device)
    counts = counts[:, 0] if layout == "strided" else counts[0, :1].expand(2)
    if torch.cuda.is_available():
        assert_good(qkv, d_out, coords, lengths=counts)
        return
    with sanitized() as report:
        assert_good(qkv, d_out, coords, lengths=counts)
    report.assert_clean()


def test_a_gradient_of_inf_leaves_padding_alone(way, device):
    qkv, d_out, coords = draw(device)
    counts = torch.tensor((20, 35), dtype=torch.int32, device=device)
    d_out[0, 0] = float("inf")
    found = run_attention(bind(ops.rope3d_attention, coords, lengths=counts), qkv, d_out)
    assert found.dk[0, 20:].eq(0).all()
    assert found.dv[0, 20:].eq(0).all()


def test_turned_back_before_it_is_plain_attention(way, device):
    """Rotated by -p, then by p in the kernels."""
    (q, k, v), _, coords = draw(device)
    back = [reference.rope3d(t, -c, AXES[16]) for t, c in zip((q, k), coords, strict=True)]
    out = ops.rope3d_attention(*back, v, *coords)
    torch.testing.assert_close(out, ops.rope3d_attention(q, k, v, None, None), rtol=0, atol=2e-5)


@ways("normed", ("whole-small", False), ("split-small", True))
def test_a_sample_alone_equals_itself_in_a_batch_and_again(normed, way, device):
    qkv, d_out, coords = draw(device, dtype=torch.bfloat16)
    norms = weights(16, torch.bfloat16, device) if normed else []
    op = bind(ops.rope3d_attention, coords)
    together, again = (run_attention(op, [*qkv, *norms], d_out) for _ in range(2))
    for a, b in zip(together, again, strict=True):
        assert torch.equal(a, b)
    alone = run_attention(op, [*(t[1:] for t in qkv), *norms], d_out[1:])
    for a, b in zip(alone[:5], together[:5], strict=True):  # all samples add to those of norms
        assert torch.equal(a, b[1:])


def test_storage_that_ends_in_nan(way, device):
    qkv, d_out, coords = draw(device, dtype=torch.bfloat16)
    padded = [torch.cat([t, torch.full_like(t, float("nan"))], 1) for t in (*qkv, d_out)]
    *qkv, d_out = (t[:, : t.shape[1] // 2] for t in padded)
    assert_good(qkv, d_out, coords)


@pytest.mark.parametrize("blocks", [1, 2, 3, 12, 22, 64])
@pytest.mark.parametrize("tiles_of", [1, 5, 16, 17, 131, 132, 500])
def test_the_rule_of_parts_fills_the_processors_and_no_more(tiles_of, blocks):
    parts = choose_parts(tiles_of, blocks, 132)
    in_part = -(-blocks // parts)
    assert parts == 1 or (parts * tiles_of <= 132 and in_part >= 2)
    assert (parts - 1) * in_part < blocks  # none is empty
    # to take one block less a part would be too many parts, or too small ones
    fewer = in_part - 1
    assert fewer < 2 or -(-blocks // fewer) * tiles_of > 132


@ways("rotated normed", ("split-small", True, True), ("whole-small", False, False))
def test_opcheck(rotated, normed, way, device):
    (q, k, v), d_out, coords = draw(device, grid=(2, 3), dtype=torch.bfloat16)
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

    def forward(self, x, q_coords, k_coords):
        k, v = self.kv(x).unflatten(-1, (2, 2, 16)).unbind(2)
        q = self.queries.expand(len(x), -1, -1, -1)
        return ops.rope3d_attention(q, k, v, q_coords, k_coords).flatten(2)


def test_compiles_whole_for_other_sizes_and_recomputes_in_a_checkpoint(device):
    module = CrossAttention().to(device)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    again = lambda *args: checkpoint(module, *args, use_reentrant=False)
    for h, w in ((3, 4), (5, 2)):
        x = torch.randn(2, h * w, 8).to(device)
        coords = TREE.token_coords(h, w).to(device), patch_coords(h, w).to(device)
        plain, traced, recomputed = (
            torch.autograd.grad(f(x, *coords).square().sum(), list(module.parameters()))
            for f in (module, compiled, again)
        )
        torch.testing.assert_close(traced, plain)
        for a, b in zip(recomputed, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sanitizer watches the interpreter")
@ways(
    "lengths normed",
    ("whole-small", None, False),
    ("split-small", (35, 16), False),
    ("split-small", None, True),
)
def test_no_stray_access_no_race_and_no_atomic(lengths, normed, way, device):
    qkv, d_out, coords = draw(device, dtype=torch.bfloat16)
    qkv += weights(16, torch.bfloat16) if normed else []
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    with sanitized() as report:
        run_attention(bind(ops.rope3d_attention, coords, lengths=counts), qkv, d_out)
    report.assert_clean()
