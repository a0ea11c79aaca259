"""The kernels of norm_rope against the reference, on the GPU or in Triton's interpreter."""

import sys

import pytest
import torch

from csrc_triton.tiles import NORM_ROPE_KERNELS, RowTile, choose_row_tile
from sda_fast import ops

from .interpreter.sanitizer import sanitized
from .numerics import DTYPES
from .test_norm_rope import (
    LENGTHS,
    Calls,
    assert_good,
    assert_same_bits,
    draw,
    gradients_with_other_strides,
    interleaved_pairs,
    run,
)

pytestmark = pytest.mark.usefixtures("kernels")

in_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the sanitizer watches the interpreter"
)
# of 3 heads and 5, 11 or 13 tokens each leaves some of the last program's rows empty
TILES = {"small": RowTile(8, 2, 4), "large": RowTile(16, 4, 4)}


@pytest.fixture(autouse=True)
def tile(request, monkeypatch):
    """Several programs a stream, or with "large" one; a GPU keeps the tiles of the table."""
    if torch.cuda.is_available():
        return None
    tile = TILES[getattr(request, "param", "small")]
    operator = sys.modules["sda_fast.ops.norm_rope"]
    monkeypatch.setattr(operator, "choose_row_tile", lambda *_: tile)
    return tile


@pytest.fixture(params=LENGTHS)
def lengths(request):
    return LENGTHS[request.param]


# any two of these meet
@pytest.mark.parametrize(
    ("tile", "lengths", "scale", "values", "dtype"),
    [
        (("small", "large")[(i + j) % 2], ("two", "one")[(i // 2 + j) % 2], *given, dtype)
        for i, given in enumerate([(1e-3, True), (1.0, True), (5.0, True), (1.0, False)])
        for j, dtype in enumerate(DTYPES)
    ],
    indirect=["tile", "lengths"],
)
def test_is_as_good_as_the_reference(tile, lengths, scale, values, dtype, device):
    assert_good(draw(lengths, dtype=dtype, scale=scale, device=device), values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 16), (5, 32), (2, 64), (4, 128)])
def test_other_heads_are_as_good_as_the_reference(heads, head_dim, dtype, device):
    assert_good(draw((3, 4), heads, head_dim, dtype, device=device))


@pytest.mark.parametrize(
    ("values", "dtype", "lengths"),
    [
        (True, torch.bfloat16, "two"), (True, torch.float32, "one"),
        (False, torch.bfloat16, "one"), (False, torch.float32, "two"),
    ],
    indirect=["lengths"],
)  # fmt: skip
def test_slices_of_wider_projections(values, dtype, lengths, device):
    """NaN before and after them, up to the end of the storage, and rows of lengths of their own."""
    case = draw(lengths, dtype=dtype, device=device)
    streams = []
    for i, s in enumerate(case.streams):
        wide = torch.full((2, s.shape[1] + 1, s.shape[2] + 13 + i), float("nan"), dtype=dtype)
        wide = wide.to(device)[:, 1:, 5 : -8 - i]
        streams.append(wide.copy_(s))
        assert not wide.is_contiguous()
    found = run(ops.norm_rope, case._replace(streams=streams), values)
    assert_same_bits(found, run(ops.norm_rope, case, values))


def test_a_batch_of_other_strides(lengths, device):
    """Tokens before samples, and one sample for all."""
    case = draw(lengths, device=device)
    turned = [s.transpose(0, 1).contiguous().transpose(0, 1) for s in case.streams]
    assert_same_bits(run(ops.norm_rope, case._replace(streams=turned)), run(ops.norm_rope, case))
    one = [s[:1].expand(2, -1, -1) for s in case.streams]
    dense = [s.contiguous() for s in one]
    assert_same_bits(
        run(ops.norm_rope, case._replace(streams=one)),
        run(ops.norm_rope, case._replace(streams=dense)),
    )


@pytest.mark.parametrize(
    ("dtype", "lengths"), [(torch.bfloat16, "two"), (torch.float32, "one")], indirect=["lengths"]
)
def test_gradients_of_other_strides_equal_dense_ones(dtype, lengths, device):
    case = draw(lengths, dtype=dtype, device=device)
    strided, dense = gradients_with_other_strides(case)
    found = run(ops.norm_rope, case._replace(grads=strided))
    assert_same_bits(found, run(ops.norm_rope, case._replace(grads=dense)))
    assert_good(case._replace(grads=strided))


def test_tables_of_other_strides(device):
    """Halves of one table, and a table written column by column."""
    case = draw(device=device)
    expected = run(ops.norm_rope, case)
    halves = torch.cat(case.rotary, 1).chunk(2, 1)
    columns = tuple(t.T.contiguous().T for t in case.rotary)
    for rotary in (halves, columns, (halves[0], columns[1])):
        assert_same_bits(run(ops.norm_rope, case._replace(rotary=rotary)), expected)


def test_the_second_value_of_a_pair_is_not_read(device):
    case = draw(device=device)
    first = tuple(t.clone() for t in case.rotary)
    for t in first:
        t[:, 1::2] = float("nan")
    assert_same_bits(run(ops.norm_rope, case._replace(rotary=first)), run(ops.norm_rope, case))


def test_rows_of_zeros_and_large_rows(device):
    case = draw(device=device)
    for s in case.streams:
        s[:, 0], s[:, 1], s[:, 2] = 0.0, 1e-4 * s[:, 1], 1e4 * s[:, 2]
    assert_good(case)


def test_norms_of_other_dtypes_and_strides(device):
    """They may differ between the streams; a weight may be a column."""
    case = draw(dtype=torch.bfloat16, device=device)
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    norms = [w.to(dtype) for w, dtype in zip(case.norms, dtypes, strict=True)]
    norms[0] = torch.stack([norms[0], torch.full_like(norms[0], float("nan"))], 1)[:, 0]
    assert_good(case._replace(norms=norms))


def test_a_bad_value_stays_in_its_head(device):
    """In the forward pass and in the gradients of the streams."""
    case = draw(device=device)
    clean = run(ops.norm_rope, case)
    case.streams[1][1, 3, 16 + 5] = float("nan")  # q of head 1
    found = run(ops.norm_rope, case)
    assert found["q"][1, 5 + 3, 1].isnan().all()
    found["q"][1, 5 + 3, 1] = clean["q"][1, 5 + 3, 1]
    assert found["d_stream 1"][1, 3, 16:32].isnan().all()
    found["d_stream 1"][1, 3, 16:32] = clean["d_stream 1"][1, 3, 16:32]
    for name in ("q", "k", "v", "d_stream 0", "d_stream 1"):
        assert torch.equal(found[name], clean[name]), name


def test_a_sample_alone_equals_the_sample_in_a_batch(lengths, device):
    case = draw(lengths, device=device)
    together = run(ops.norm_rope, case)
    for b in range(2):
        cut = lambda tensors, b=b: [t[b : b + 1] for t in tensors]
        alone = run(ops.norm_rope, case._replace(streams=cut(case.streams), grads=cut(case.grads)))
        for name, t in alone.items():
            if "norm" not in name:  # what all samples add to
                assert torch.equal(t, together[name][b : b + 1]), name


def test_a_stream_alone_equals_two_that_share_their_norms(device):
    """A single block sees them joined."""
    case = draw(device=device)
    norms = case.norms[:2]
    two = run(ops.norm_rope, case._replace(norms=norms * 2))
    one = run(ops.norm_rope, case._replace(streams=[torch.cat(case.streams, 1)], norms=norms))
    for name in "qkv":
        assert torch.equal(one[name], two[name])
    assert torch.equal(one["d_stream 0"], torch.cat([two["d_stream 0"], two["d_stream 1"]], 1))


@pytest.mark.parametrize("learning", [(), (3,), (0, 1, 2, 3)])
def test_norms_learn_only_where_one_requires_it(learning, device):
    case = draw(device=device)
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


@pytest.mark.parametrize("tile", ["large"], indirect=True)
@pytest.mark.parametrize(("lengths", "values"), [((3, 4), True), ((5,), False)])
def test_opcheck(lengths, values, device):
    case = draw(lengths, dtype=torch.bfloat16, device=device)
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


@in_interpreter
@pytest.mark.parametrize("values", [True, False])
def test_no_stray_access_no_race_and_no_atomic(values, lengths, device):
    case = draw(lengths, dtype=torch.bfloat16, beyond=7, device=device)
    strided, _ = gradients_with_other_strides(case)
    with sanitized() as report:
        run(ops.norm_rope, case._replace(grads=strided), values)
    report.assert_clean()
    assert report.launches == 2, "one launch forward and one backward"


@in_interpreter
@pytest.mark.parametrize(("tile", "values"), [("small", True), ("large", False)], indirect=["tile"])
def test_each_element_is_read_and_written_once(values, tile, device):
    """Counted where all rows of all programs are there; each pair of the table once a program."""
    lengths, heads, head_dim = (16, 32), 4, 16
    case = draw(lengths, heads, head_dim, beyond=7, device=device)
    moved = 2 * 48 * heads * head_dim * (2 + values)  # one of q, k and v of both samples together
    streams = [s.requires_grad_() for s in case.streams]
    with sanitized() as report:
        results = ops.norm_rope(streams, interleaved_pairs(case.norms), case.rotary, heads, values)
    table = 2 * 48 * head_dim * (heads // tile.heads)  # cos and sin, pairs, of both samples
    weights = report.programs * 4 * head_dim
    assert (report.loads, report.stores) == (moved + table + weights, moved)
    qk = 2 * 48 * heads * head_dim * 2
    with sanitized() as report:
        torch.autograd.backward(results[: 2 + values], case.grads[: 2 + values])
    weights = report.programs * 4 * head_dim
    assert (report.loads, report.stores) == (moved + qk + table + weights, moved)


def test_every_call_gives_the_same_bits(lengths, device):
    case = draw(lengths, dtype=torch.bfloat16, device=device)
    first = run(ops.norm_rope, case)
    for seed in range(2):
        if torch.cuda.is_available():
            again = run(ops.norm_rope, case)
        else:
            with sanitized(seed):  # programs in another order
                again = run(ops.norm_rope, case)
        assert_same_bits(again, first)


def test_a_head_dim_that_the_kernels_do_not_take_runs_in_torch_on_the_cpu():
    case = draw(head_dim=80)
    with sanitized() as report:
        run(ops.norm_rope, case)
    assert report.launches == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("kernel", NORM_ROPE_KERNELS)
def test_the_rule_gives_each_thread_16_bytes_of_each_head(kernel, head_dim, dtype):
    tile = choose_row_tile(kernel, dtype, head_dim)
    assert tile.tokens * head_dim * dtype.itemsize == tile.num_warps * 32 * 16
    assert tile.tokens & (tile.tokens - 1) == tile.heads & (tile.heads - 1) == 0


def test_an_unknown_kernel_has_no_tile():
    with pytest.raises(ValueError, match="kernel 'norm_rope' has no tile"):
        choose_row_tile("norm_rope", torch.float32, 64)
