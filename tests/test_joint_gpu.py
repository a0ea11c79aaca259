"""Joint attention at real sizes: what only a GPU can show, before anything is timed on it."""

from dataclasses import replace

import pytest
import torch

from bench.cases import CASES, THREE_LEVELS, Case
from bench.measure import Graph, attention_step, peak_bytes
from bench.tune_joint import Subject
from sda_fast import ops
from sda_fast.hierarchy import RULES
from sda_fast.ops import joint_kernels

from .attention_cases import Case as Sequence
from .attention_cases import draw
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
from .joint_tiles import check, implementations, on
from .numerics import LOGITS

pytestmark = NEEDS_GPU

# rows and columns of image tokens, heads: all of FLUX's where float64 takes them in seconds
SIZES = {
    "flux-512": (32, 32, 24),
    "flux-720x1280": (45, 80, 4),
    "flux-1024": (64, 64, 24),
    "flux-2048": (128, 128, 4),
}
FLUX_512 = CASES["flux-512-b1-tree32.8.4"]


def attend(case: Case, implementation: str, **more):
    return lambda q, k, v: ops.hierarchical_attention(
        q, k, v, case.tree, case.h, case.w, case.rule, implementation=implementation, **more
    )


def assert_right(case: Case, device, which=None):
    """out, lse and every gradient by the benchmark's yardstick, float64 head by head."""
    subject = Subject.of(case, device)
    for implementation in which or implementations(case.rule):
        with torch.no_grad():
            forward = attend(case, implementation, return_lse=True)(*subject.inputs[:3])
        assert subject.faults(("out", "lse"), forward) == [], implementation
        both = attention_step(attend(case, implementation), subject.inputs, backward=True)()
        assert subject.faults(("out", "dq", "dk", "dv"), both) == [], implementation


def assert_far_is_near(case: Case, implementation, device, place, reach):
    subject = Subject.of(case, device)
    unset = torch.full_like(subject.inputs[0], float("nan"))
    buffer, (*qkv, d_out, out) = far_apart([*subject.inputs, unset], place, reach)
    with torch.no_grad():
        near, near_lse = attend(case, implementation, return_lse=True)(*subject.inputs[:3])
        lse = attend(case, implementation, return_lse=True, out=out)(*qkv)[1]
    assert subject.faults(("out", "lse"), (near, near_lse)) == []
    assert_same_bits((out, lse), (near, near_lse))
    options = subject.layout, subject.scale, implementation
    found = joint_kernels.backward(d_out, tuple(qkv), (out, lse), *options)
    *near_qkv, near_d_out = subject.inputs
    expected = joint_kernels.backward(near_d_out, tuple(near_qkv), (near, lse), *options)
    assert subject.faults(("dq", "dk", "dv"), expected) == []
    assert_same_bits(found, expected)
    # nothing between was written
    assert int(buffer.isnan().sum()) == buffer.numel() - 5 * out.numel()


def assert_all_samples_alike(case: Case, device):
    """Inputs expanded over the batch; results of its whole size."""
    one = Subject.of(replace(case, batch=1), device)
    inputs = [t.expand(case.batch, -1, -1, -1) for t in one.inputs]
    results = attention_step(attend(case, "fused"), inputs, backward=True)()
    assert one.faults(("out", "dq", "dk", "dv"), [t[:1] for t in results]) == []
    assert_rows_alike(results, case.batch)


def assert_single_block(case: Case, implementation, device, mlp):
    """out into, and the gradient of out from, the first part of [B, S, H * D + mlp]."""
    q, k, v, _ = case.inputs(device)
    width = case.heads * case.head_dim
    wide = torch.full((case.batch, case.seq_len, width + mlp), 7.0, dtype=case.dtype, device=device)
    out = wide[..., :width].unflatten(-1, (case.heads, case.head_dim))
    with torch.no_grad():
        expected = attend(case, implementation, return_lse=True)(q, k, v)
        found = attend(case, implementation, return_lse=True, out=out)(q, k, v)
    assert found[0] is out
    assert_same_bits(found, expected)
    assert (wide[..., width:] == 7).all()
    wide[..., :width].normal_()
    wide[..., width:] = float("nan")
    d_out = wide[..., :width].unflatten(-1, (case.heads, case.head_dim))
    assert not d_out.is_contiguous()
    steps = [
        attention_step(attend(case, implementation), (q, k, v, g), backward=True)
        for g in (d_out, d_out.contiguous())
    ]
    assert_same_bits(*(step() for step in steps))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("size", SIZES)
def test_flux_sizes_are_as_good_as_the_reference(size, head_dim, rule, device):
    h, w, heads = SIZES[size]
    assert_right(Case(size, h, w, THREE_LEVELS, 1, heads, head_dim, rule=rule), device)


def test_five_levels_are_as_good_as_the_reference(device):
    assert_right(CASES["flux-1024-b1-tree32.8.4.2.1"], device)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_float32_is_as_good_as_the_reference(head_dim, device):
    case = Case("debug", 15, 18, THREE_LEVELS, 1, 2, head_dim, torch.float32, "local")
    assert_right(case, device, which=("fused",))


@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("rule", RULES)
def test_extreme_logits_at_512(rule, logits, device):
    case = Sequence(1, 2, 128, (32, 8, 4), 32, 32, {"rule": rule})
    qkv, d_out = draw(case, logits, torch.bfloat16)
    for implementation in implementations(rule):
        check(case, implementation, on(device, qkv), d_out.to(device))


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_250_repeats_beside_other_work_have_the_same_bits(implementation, device):
    case = CASES["flux-512-b8-tree32.8.4"]
    step = attention_step(attend(case, implementation), case.inputs(device), backward=True)
    assert_repeats(step, 250, other_work(device))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_a_graph_gives_what_eager_gives_for_other_inputs_too(implementation, backward, device):
    inputs = FLUX_512.inputs(device)
    step = attention_step(attend(FLUX_512, implementation), inputs, backward)
    graph = Graph(step, None)
    for seed in range(3):
        for old, new in zip(inputs, FLUX_512.inputs(device, seed), strict=True):
            old.copy_(new)
        assert_same_bits(graph.fresh(), step())


ATTEND = """
import torch
from sda_fast import Hierarchy, ops

tree = Hierarchy((32, 8, 4))
q, k, v = torch.randn(3, 1, 128 + 64, 2, 64, device="cuda").bfloat16()
attend = lambda: ops.hierarchical_attention(q, k, v, tree, 8, 8)
"""


def test_a_capture_before_the_first_run_is_refused_and_works_after_it():
    refusal = "hierarchical_attention must run once with these sizes before a CUDA"
    assert_a_capture_must_wait_for_a_run(ATTEND, refusal)


@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_a_side_stream_may_run_a_size_first(implementation, device):
    case = Case("side", 33, 30 + (implementation == "split"), THREE_LEVELS, 1, 4, 64)
    step = attention_step(attend(case, implementation), case.inputs(device), backward=True)
    assert_a_side_stream_may_run_first(step)


@pytest.mark.parametrize("place", [0, 1, 2], ids=["batch", "tokens", "heads"])
@pytest.mark.parametrize("implementation", ["fused", "split"])
def test_elements_more_than_2_31_apart(implementation, place, device):
    case = Case("far", 16, 16, THREE_LEVELS, 2, 2, 64)
    assert_far_is_near(case, implementation, device, place, 2**31 + 2**20)


def test_results_of_more_than_2_31_elements(device):
    one = FLUX_512.seq_len * FLUX_512.heads * FLUX_512.head_dim
    batch = 2**31 // one + 2
    assert_all_samples_alike(Case("many", 32, 32, THREE_LEVELS, batch), device)


@pytest.mark.parametrize("implementation", ["fused", "split"])
@pytest.mark.parametrize("picture", ["flux-512", "flux-1024"])
def test_the_concatenated_buffer_of_a_single_block(picture, implementation, device):
    assert_single_block(CASES[f"{picture}-b1-tree32.8.4"], implementation, device, 4 * 3072)


def test_a_forward_holds_its_results_and_nothing_for_the_mask(device):
    case = CASES["flux-1024-b1-tree32.8.4"]
    inputs = case.inputs(device)
    step = attention_step(attend(case, "fused"), inputs, backward=False)
    step()
    lse = 4 * case.batch * case.heads * case.seq_len
    assert peak_bytes(step, device) <= inputs[0].nbytes + lse + 2**16
    assert ops.mask_bytes(inputs[0], case.tree, case.h, case.w) <= 2**16


@pytest.mark.parametrize("implementation", ["auto", "fused", "split"])
def test_an_old_gpu_is_refused(implementation, device, monkeypatch):
    q, k, v, _ = FLUX_512.inputs(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match=r"compute capability 8\.0 or newer, got 7\.5"):
        attend(FLUX_512, implementation)(q, k, v)
