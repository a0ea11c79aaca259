"""In small, on a CPU in Triton's interpreter, what test_norm_rope_gpu checks at FLUX's sizes."""

import sys

import pytest
import torch

from csrc_triton import norm_rope
from csrc_triton.tiles import RowTile

from . import test_norm_rope_gpu as on_gpu

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
]

CPU = torch.device("cpu")
TINY = on_gpu.Size((3, 6), 2, 2, 16, dtype=torch.float32)


@pytest.fixture(autouse=True)
def tile(monkeypatch):
    operator = sys.modules["sda_fast.ops.norm_rope"]
    monkeypatch.setattr(operator, "choose_row_tile", lambda *_: RowTile(8, 2, 4))


def spoil(monkeypatch, launch, wrong):
    """From here on the first result of a launcher is slightly wrong."""
    right = getattr(norm_rope, launch)

    def spoiled(*args):
        results = right(*args)
        wrong(results[0])
        return results

    monkeypatch.setattr(norm_rope, launch, spoiled)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_tensors_in_one_wide_buffer(place):
    on_gpu.assert_far_is_near(TINY, CPU, place, 1 << 14)


def test_inputs_expanded_over_the_batch():
    on_gpu.assert_all_samples_alike(on_gpu.Size((3, 6), 1, 2, 16), 3, CPU)


def test_a_sample_that_leaks_into_another_is_noticed(monkeypatch):
    spoil(monkeypatch, "launch_norm_rope", lambda q: q[-1].add_(1e-3 * (len(q) > 1)))
    with pytest.raises(AssertionError, match=r"^(?!.*reference allows)"):
        on_gpu.assert_all_samples_alike(on_gpu.Size((3, 6), 1, 2, 16), 3, CPU)


def test_a_replay_that_goes_by_old_inputs_is_noticed():
    on_gpu.assert_follows_its_inputs(lambda step: step, TINY, CPU)

    def frozen(step):
        results = step()
        return lambda: results

    with pytest.raises(AssertionError, match="result 0"):
        on_gpu.assert_follows_its_inputs(frozen, TINY, CPU)


def test_one_wrong_gradient_is_noticed(monkeypatch):
    spoil(monkeypatch, "launch_norm_rope_backward", lambda d_streams: d_streams[-1][-1].mul_(1.01))
    with pytest.raises(AssertionError, match="d_stream 1: error"):
        on_gpu.assert_good(TINY.draw(CPU))


def test_what_a_forward_may_hold_is_what_it_asks_for(monkeypatch):
    asked, empty = [], torch.empty

    def count(*args, **options):
        asked.append(empty(*args, **options))
        return asked[-1]

    case = TINY.draw(CPU)
    held = sum(t.nbytes for t in on_gpu.forward(case))
    monkeypatch.setattr("csrc_triton.norm_rope.torch.empty", count)
    on_gpu.forward(case)
    assert sum(t.nbytes for t in asked) == held
