"""Rotated attention at real sizes: what only a GPU can show, before anything is timed on it."""

from dataclasses import replace

import pytest
import torch

from bench.cases import THREE_LEVELS
from bench.check import RATIO, yardstick
from bench.measure import Graph, attention_step, peak_bytes
from bench.qformer_cases import SIDES, QFormerCase
from csrc_triton.tiles import ROPE3D_KERNELS, Problem, choose_tile, forced
from sda_fast import ops, reference
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops import rope3d_kernels
from sda_fast.reference.rope3d_attention import default_axes, rope3d

from .gpu_checks import (
    NEEDS_GPU,
    assert_a_capture_must_wait_for_a_run,
    assert_a_side_stream_may_run_first,
    assert_repeats,
    assert_rows_alike,
    assert_same_bits,
    far_apart,
    other_work,
)
from .numerics import LOGITS, LSE_CAP, assert_attention, draw_qkv, run_attention

pytestmark = NEEDS_GPU

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[1, 7], ids=["whole", "split"])
def parts(request, monkeypatch):
    """Into how many parts the keys are split, whatever the rule says."""
    monkeypatch.setattr(rope3d_kernels, "choose_parts", lambda *_: request.param)
    return request.param


def attend(places, **options):
    """Of q, k, v and, if any, the weights of norms."""
    return lambda q, k, v, *norms: ops.rope3d_attention(
        q, k, v, *places, norms=norms or None, **options
    )


def weights(case: QFormerCase, device):
    """Of norms of q and of k."""
    drawn = (1 + 0.3 * torch.randn(case.head_dim) for _ in range(2))
    return [weight.to(device, case.dtype) for weight in drawn]


def run(inputs, places, **options):
    """out, lse, dq, dk and dv."""
    return run_attention(attend(places, return_lse=True, **options), inputs[:3], inputs[3])


def faults(inputs, places, found):
    """Of out, lse and every gradient by the benchmark's yardstick, float64 head by head."""
    out, lse, *gradients = found
    exact, plain = (plain_lse(inputs, places, dtype) for dtype in (torch.float64, out.dtype))
    error, unavoidable = ((t - exact).abs().max().item() for t in (lse, plain))
    allowed = RATIO["out"] * unavoidable + LSE_CAP * max(1.0, exact.abs().max().item())
    good = lse.dtype == torch.float32 and error <= allowed  # NaN is not
    wrong = [] if good else [f"lse {lse.dtype} is off by {error:.2e}, allowed {allowed:.2e}"]
    return wrong + yardstick(inputs, None, places).faults((out, *gradients))


def plain_lse(inputs, places, dtype):
    """The reference's, sample by sample."""
    samples = zip(*(t.split(1) for t in inputs[:3]), strict=True)
    lse_of = lambda qkv: reference.rope3d_attention(*qkv, *places, return_lse=True)[1]
    return torch.cat([lse_of([t.to(dtype) for t in qkv]) for qkv in samples])


def assert_right(case: QFormerCase, device):
    inputs, places = case.inputs(device), case.places(device)
    assert faults(inputs, places, run(inputs, places)) == []


def assert_padding_is_as_if_not_there(case: QFormerCase, lengths, device):
    """By the yardstick sample by sample; the keys that a sample does not have are NaN."""
    q, k, v, d_out = case.inputs(device)
    q_places, k_places = case.places(device)
    for b, length in enumerate(lengths):
        k[b, length:], v[b, length:] = float("nan"), float("nan")
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    found = run((q, k, v, d_out), (q_places, k_places), lengths=counts)
    for b, length in enumerate(lengths):
        out, lse, dq, dk, dv = (t[b : b + 1] for t in found)
        assert dk[:, length:].eq(0).all()
        assert dv[:, length:].eq(0).all()
        if length == 0:
            assert out.eq(0).all()
            assert lse.eq(float("-inf")).all()
            assert dq.eq(0).all()
            continue
        one = [q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length], d_out[b : b + 1]]
        results = out, lse, dq, dk[:, :length], dv[:, :length]
        assert faults(one, (q_places, k_places[:length]), results) == [], f"sample {b}"


def assert_good_at(case: QFormerCase, logits, device, normed=False):
    """Of one of LOGITS after the rotation, by the tolerance of the tests; norms make others."""
    places = case.places(torch.device("cpu"))
    query = case.batch, case.tree.num_tokens, case.heads, case.head_dim
    q, k, v = draw_qkv(query, (case.batch, case.seq_len, *query[2:]), logits, torch.float32)
    if logits == "near-200":
        # turned back, so that the operator's rotation makes all logits large again
        axes = default_axes(case.head_dim)
        q, k = (rope3d(t, -c, axes) for t, c in zip((q, k), places, strict=True))
    inputs = [t.to(device, case.dtype) for t in (q, k, v)] + (weights(case, device) * normed)
    places = [c.to(device) for c in places]
    assert_attention(
        attend(places, return_lse=True),
        lambda q, k, v, *norms: reference.rope3d_attention(
            q, k, v, *places, norms=norms or None, return_lse=True
        ),
        inputs,
        torch.randn(query).to(device, case.dtype),
        rounds_operands=True,
    )


def assert_follows_its_inputs(make_graph, case: QFormerCase, backward, device):
    """What is changed in place between replays: tokens, weights of norms, places and lengths."""
    inputs, places, norms = case.inputs(device), case.places(device), weights(case, device)
    lengths = torch.full((case.batch,), case.seq_len, dtype=torch.int32, device=device)
    op = attend(places, lengths=lengths)
    step = attention_step(lambda q, k, v: op(q, k, v, *norms), inputs, backward)
    graph = make_graph(step)
    for length in (case.seq_len, 1, 0, case.seq_len // 2):
        for t in (*inputs, *norms):
            t.normal_()
        for t in places:
            t.add_(torch.randn_like(t))
        lengths[0] = length
        assert_same_bits(graph(), step())


def assert_far_is_near(case: QFormerCase, device, place, reach):
    inputs, places = case.inputs(device), case.places(device)
    near = run(inputs, places)
    assert faults(inputs, places, near) == []
    _, far = far_apart(inputs, place, reach)
    assert_same_bits(run(far, places), near)


def assert_all_samples_alike(case: QFormerCase, device):
    """Inputs expanded over the batch; results of its whole size."""
    one = replace(case, batch=1)
    inputs, places = one.inputs(device), one.places(device)
    found = run([t.expand(case.batch, -1, -1, -1) for t in inputs], places)
    assert faults(inputs, places, [t[:1] for t in found]) == []
    assert_rows_alike(found, case.batch)


def assert_alone_as_in_a_batch(case: QFormerCase, lengths, device):
    inputs, places = case.inputs(device), case.places(device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    sizes = case.tree.num_tokens, case.seq_len, case.batch * case.heads
    problem = Problem(case.dtype, case.head_dim, *sizes)
    # the table may take another tile for a sample alone
    with forced(**{name: choose_tile(name, "", problem) for name in ROPE3D_KERNELS}):
        together = run(inputs, places, lengths=counts)
        for b in range(case.batch):
            one = slice(b, b + 1)
            alone = run([t[one] for t in inputs], places, lengths=counts[one])
            assert_same_bits(alone, [t[one] for t in together])


def results_and_parts(case: QFormerCase, parts):
    """Bytes that a forward pass may hold."""
    rows = case.batch * case.heads * case.tree.num_tokens
    held = rows * (case.head_dim * case.dtype.itemsize + 4)
    return held + (parts * rows * (case.head_dim + 1) * 4 if parts > 1 else 0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("side", SIDES)
def test_sizes_of_the_benchmark_are_as_good_as_the_reference(side, batch, dtype, device):
    assert_right(QFormerCase("op", batch, side, dtype=dtype), device)


# not all of them: kernels of each are compiled, and test_rope3d_kernels has the rest in small
@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize(("head_dim", "dtype"), [(128, HALF[0]), (80, HALF[1]), (32, HALF[0])])
def test_other_head_dims_are_as_good_as_the_reference(head_dim, dtype, batch, device):
    assert_right(QFormerCase("op", batch, 27, 4, head_dim, dtype=dtype), device)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_float32_is_as_good_as_the_reference(head_dim, device):
    assert_right(QFormerCase("op", 2, 15, 2, head_dim, dtype=torch.float32), device)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_samples_have_keys_of_their_own_number(dtype, parts, device):
    case = QFormerCase("op", 6, 37, 2, dtype=dtype)
    assert_padding_is_as_if_not_there(case, (1369, 0, 1, 64, 700, 1368), device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("logits", LOGITS)
def test_extreme_logits(logits, dtype, parts, device):
    assert_good_at(QFormerCase("op", 2, 37, 2, dtype=dtype), logits, device)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_with_norms_it_is_as_good_as_the_reference(dtype, parts, device):
    assert_good_at(QFormerCase("op", 2, 37, 4, dtype=dtype), 1.0, device, normed=True)


@pytest.mark.parametrize("normed", [False, True])
def test_250_repeats_beside_other_work_have_the_same_bits(normed, parts, device):
    case = QFormerCase("op", 4, 37)
    *qkv, d_out = case.inputs(device)
    inputs, op = qkv + weights(case, device) * normed, attend(case.places(device), return_lse=True)
    assert_repeats(lambda: run_attention(op, inputs, d_out), 250, other_work(device))


@pytest.mark.parametrize("backward", [False, True])
def test_a_graph_gives_what_eager_gives_for_other_inputs_too(backward, parts, device):
    case = QFormerCase("op", 2, 37)
    assert_follows_its_inputs(lambda step: Graph(step, None).fresh, case, backward, device)


ATTEND = """
import torch
from sda_fast import Hierarchy, ops
from sda_fast.coords import patch_coords

tree = Hierarchy((32, 8, 4))
places = tree.token_coords(8, 8).cuda(), patch_coords(8, 8).cuda()
q, k, v = (torch.randn(1, n, 2, 64, device="cuda").bfloat16() for n in (128, 64, 64))
attend = lambda: ops.rope3d_attention(q, k, v, *places)
"""


def test_a_capture_before_the_first_run_is_refused_and_works_after_it():
    refusal = "rope3d_attention must run once with these axes before a CUDA graph is captured"
    assert_a_capture_must_wait_for_a_run(ATTEND, refusal)


def test_a_side_stream_may_run_first(parts, device):
    case = QFormerCase("op", 1, 37)
    # frequencies that nothing has asked for yet
    new = attend(case.places(device), theta=1234.5 + parts)
    step = attention_step(new, case.inputs(device), backward=True)
    assert_a_side_stream_may_run_first(step)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_elements_more_than_2_31_apart(place, parts, device):
    # as many queries as keys: 64
    case = QFormerCase("op", 2, 8, 2, tree=Hierarchy((16, 4, 2)))
    assert_far_is_near(case, device, place, 2**31 + 2**20)


def test_results_or_parts_of_more_than_2_31_elements(parts, device):
    case = QFormerCase("op", 2, 12)
    one = THREE_LEVELS.num_tokens * case.heads * case.head_dim
    assert_all_samples_alike(replace(case, batch=2**31 // (one * parts) + 2), device)


def test_a_sample_alone_equals_the_sample_in_a_batch(parts, device):
    assert_alone_as_in_a_batch(QFormerCase("op", 4, 37), (1369, 0, 700, 1), device)


@pytest.mark.parametrize("normed", [False, True])
def test_a_forward_holds_its_results_and_the_parts_and_nothing_else(normed, parts, device):
    case = QFormerCase("op", 1, 64)
    op, norms = attend(case.places(device)), weights(case, device) * normed
    step = attention_step(lambda q, k, v: op(q, k, v, *norms), case.inputs(device), backward=False)
    step()
    assert peak_bytes(step, device) <= results_and_parts(case, parts) + 2**16
