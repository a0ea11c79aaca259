"""In small, on a CPU in Triton's interpreter, what test_rope3d_gpu checks at real sizes."""

from dataclasses import replace

import pytest
import torch

from bench.qformer_cases import QFormerCase
from csrc_triton import rope3d_attention, rope3d_attention_backward
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops import rope3d_kernels

from . import test_rope3d_gpu as on_gpu
from .gpu_checks import assert_rows_alike, assert_same_bits, far_apart
from .numerics import DTYPES, LOGITS

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
]

CPU = torch.device("cpu")
# as many queries as keys: 16
TINY = QFormerCase("op", 2, 4, 2, 16, Hierarchy((4, 3)), torch.float32)


@pytest.fixture(params=[1, 3], ids=["whole", "split"])
def parts(request, monkeypatch):
    monkeypatch.setattr(rope3d_kernels, "choose_parts", lambda *_: request.param)
    return request.param


def spoil(monkeypatch, module, launch, place, wrong):
    """From here on one result of a launcher is slightly wrong."""
    right = getattr(module, launch)

    def spoiled(*args):
        results = right(*args)
        wrong(results[place])
        return results

    monkeypatch.setattr(module, launch, spoiled)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 80])
def test_a_small_case_is_as_good_as_the_reference(head_dim, dtype):
    on_gpu.assert_right(replace(TINY, head_dim=head_dim, dtype=dtype), CPU)


SPOILED = [
    (rope3d_attention, "launch_rope3d_attention", 0, "out is off by"),
    (rope3d_attention, "launch_rope3d_attention", 1, "lse torch.float32 is off by"),
    (rope3d_attention_backward, "launch_rope3d_dq", 0, "dq is off by"),
    (rope3d_attention_backward, "launch_rope3d_dkdv", 0, "dk is off by"),
    (rope3d_attention_backward, "launch_rope3d_dkdv", 1, "dv is off by"),
]


@pytest.mark.parametrize(("module", "launch", "place", "message"), SPOILED)
def test_one_wrong_result_is_noticed(module, launch, place, message, monkeypatch):
    spoil(monkeypatch, module, launch, place, lambda t: t[-1].mul_(1.01))
    with pytest.raises(AssertionError, match=message):
        on_gpu.assert_right(TINY, CPU)


@pytest.mark.parametrize(
    ("dtype", "parts"), zip(DTYPES, (1, 3, 3), strict=True), indirect=["parts"]
)
def test_keys_that_a_sample_does_not_have(dtype, parts):
    case = replace(TINY, batch=4, dtype=dtype)
    on_gpu.assert_padding_is_as_if_not_there(case, (16, 0, 1, 7), CPU)


def test_a_gradient_of_padding_is_noticed(monkeypatch):
    launch = "launch_rope3d_dkdv"
    spoil(monkeypatch, rope3d_attention_backward, launch, 1, lambda t: t[1, 7].fill_(1e-30))
    with pytest.raises(AssertionError):
        on_gpu.assert_padding_is_as_if_not_there(TINY, (16, 7), CPU)


@pytest.mark.parametrize("logits", LOGITS)
def test_extreme_logits_in_small(logits, parts):
    on_gpu.assert_good_at(replace(TINY, batch=1, dtype=torch.bfloat16), logits, CPU)


def test_norms_in_small(parts):
    on_gpu.assert_good_at(TINY, 1.0, CPU, normed=True)


@pytest.mark.parametrize("backward", [False, True])
def test_a_replay_that_goes_by_old_inputs_is_noticed(backward):
    on_gpu.assert_follows_its_inputs(lambda step: step, TINY, backward, CPU)

    def frozen(step):
        results = step()
        return lambda: results

    with pytest.raises(AssertionError, match="result 0"):
        on_gpu.assert_follows_its_inputs(frozen, TINY, backward, CPU)


@pytest.mark.parametrize(("place", "parts"), [(0, 3), (1, 1), (2, 3)], indirect=["parts"])
def test_tensors_in_one_wide_buffer(place, parts):
    on_gpu.assert_far_is_near(TINY, CPU, place, 1 << 14)


def test_the_wide_buffer_holds_its_tensors_and_nan():
    tensors = [torch.randn(2, 3, 2, 4) for _ in range(3)]
    for place in range(3):
        buffer, views = far_apart(tensors, place, 1000)
        assert all(view.equal(t) for view, t in zip(views, tensors, strict=True))
        assert int(buffer.isfinite().sum()) == 3 * tensors[0].numel()
        assert all(view.stride(place) * (view.shape[place] - 1) >= 1000 for view in views)
        assert views[0].untyped_storage().data_ptr() == views[2].untyped_storage().data_ptr()


def test_inputs_expanded_over_the_batch(parts):
    on_gpu.assert_all_samples_alike(replace(TINY, batch=3), CPU)


def test_a_sample_alone_in_small(parts):
    on_gpu.assert_alone_as_in_a_batch(TINY, (16, 5), CPU)


def test_a_sample_that_leaks_into_another_is_noticed(monkeypatch):
    leak = lambda t: t[-1].add_(1e-3 * t[0])
    spoil(monkeypatch, rope3d_attention, "launch_rope3d_attention", 0, leak)
    with pytest.raises(AssertionError, match="result 0"):
        on_gpu.assert_alone_as_in_a_batch(TINY, (16, 5), CPU)


def test_what_a_forward_may_hold_is_what_it_asks_for(parts, monkeypatch):
    asked, empty = [], torch.empty
    inputs, places = TINY.inputs(CPU), TINY.places(CPU)

    def count(*args, **options):
        asked.append(empty(*args, **options))
        return asked[-1]

    monkeypatch.setattr("csrc_triton.rope3d_attention.torch.empty", count)
    on_gpu.attend(places)(*inputs[:3])
    assert sum(t.nbytes for t in asked) == on_gpu.results_and_parts(TINY, parts)


def test_bits_tell_apart_what_is_equal():
    zero = torch.zeros(3)
    assert_same_bits([zero], [zero.clone()])
    with pytest.raises(AssertionError, match="result 1"):
        assert_same_bits([zero, zero], [zero, -zero])
    rows = torch.ones(3, 2)
    assert_rows_alike([rows, rows.bfloat16()], 3)
    with pytest.raises(AssertionError):
        assert_rows_alike([rows, rows.cumsum(0)], 3)
    with pytest.raises(AssertionError):
        assert_rows_alike([rows], 4)
