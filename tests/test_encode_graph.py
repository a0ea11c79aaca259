"""``encode(graph=True)``: the same embeddings, by graphs that know when they are stale."""

import copy

import pytest
import torch

from sda_fast import cuda_graphs
from sda_fast.cuda_graphs import GraphCache
from sda_fast.hierarchy import Hierarchy

from . import tiny_encoders
from .tape import TapePool
from .tiny_encoders import tiny_adapter, tiny_encoder


@pytest.fixture
def adapter(monkeypatch):
    monkeypatch.setattr(tiny_encoders, "DEPTH", 2)  # recording takes its time for every layer
    adapter = tiny_adapter(pooled_features=5, num_layers=1)
    adapter.set_encoder(tiny_encoder())
    return adapter


@pytest.fixture
def pool(adapter, monkeypatch):
    """The adapter's graphs are recorded on the CPU."""
    pool = TapePool()
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    adapter._graphs = GraphCache(make_pool=pool)
    return pool


def assert_same(adapter, *sizes):
    pictures = [torch.rand(1, 3, height, width) for height, width in sizes or [(32, 32)]]
    for pixels in pictures:
        found, expected = adapter.encode(pixels, graph=True), adapter.encode(pixels)
        torch.testing.assert_close(found.tokens, expected.tokens, rtol=0, atol=0)
        assert torch.equal(found.pooled, expected.pooled)


def test_embeddings_are_the_same_for_each_size(adapter, pool):
    assert_same(adapter, (32, 32), (40, 24), (32, 32), (24, 40))
    assert len(pool.tapes) == 3


def test_a_batch_of_sizes_goes_through_group_by_group(adapter, pool):
    sizes = [(32, 32), (40, 24), (32, 32)]
    from PIL import Image

    pictures = [Image.effect_noise(size, 50).convert("RGB") for size in sizes]
    found, expected = adapter.encode(pictures, graph=True), adapter.encode(pictures)
    assert torch.equal(found.tokens, expected.tokens)
    assert sorted(len(tape.inputs[0]) for tape in pool.tapes) == [1, 2]


def test_a_training_step_between_is_seen_without_a_new_capture(adapter, pool):
    assert_same(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    adapter(torch.randn(1, 16, adapter.in_features), (4, 4)).square().sum().backward()
    optimizer.step()
    assert_same(adapter)
    adapter.pooled.fill_(3)
    assert_same(adapter)
    assert len(pool.tapes) == 1


def test_grown_positions_are_captured_anew(adapter, pool):
    assert_same(adapter)
    adapter.grow(Hierarchy((4, 3, 1)))
    assert_same(adapter)
    assert len(pool.tapes) == 2


def test_loaded_layers_of_the_encoder_are_seen(adapter, pool):
    assert_same(adapter)
    with torch.no_grad():
        for parameter in adapter.encoder.parameters():
            parameter.mul_(1.5)
    assert_same(adapter)
    assert len(pool.tapes) == 1


def squash(adapter):
    adapter.encoder.squash = True


def other_mean(adapter):
    adapter.encoder.clip_mean = (0.1, 0.2, 0.3)


def no_rope(adapter):
    adapter.qformer.cross_attention_rope = False


@pytest.mark.parametrize("change", [squash, other_mean, no_rope])
def test_settings_that_change_are_seen(adapter, pool, change):
    assert_same(adapter, (48, 32))
    change(adapter)
    assert_same(adapter, (48, 32))
    assert len(pool.tapes) == 2


def test_with_gradient_checkpointing_on_nothing_is_recomputed(adapter, pool):
    """A checkpoint keeps the random state, which no capture can."""

    def refuse(*args, **kwargs):
        raise AssertionError("a checkpoint without gradients")

    adapter.enable_gradient_checkpointing(refuse)
    assert_same(adapter)


def move(adapter):
    adapter.double()


def replace_encoder(adapter):
    adapter.set_encoder(tiny_encoder("siglip"))


@pytest.mark.parametrize("change", [move, replace_encoder])
def test_moving_the_adapter_or_another_encoder_gives_the_graphs_up(adapter, pool, change):
    assert_same(adapter)
    change(adapter)
    assert pool.tapes[0].released
    assert len(adapter._graphs) == 0
    assert_same(adapter)


def test_under_inference_mode_first(adapter, pool):
    with torch.inference_mode():
        assert_same(adapter)
    assert_same(adapter)
    assert len(pool.tapes) == 1


def test_a_copy_has_graphs_of_its_own(adapter, pool):
    assert_same(adapter)
    other = copy.deepcopy(adapter)
    assert len(other._graphs) == 0
    with torch.no_grad():
        other.proj_out.weight.zero_()
    assert_same(adapter)


def test_nothing_of_it_is_saved(adapter, pool, tmp_path):
    assert_same(adapter)
    adapter.save_pretrained(tmp_path / "a")
    again = type(adapter).from_pretrained(tmp_path / "a")
    assert len(again._graphs) == 0


def test_a_cpu_is_refused(adapter):
    with pytest.raises(ValueError, match=r"needs all weights on one CUDA device, got \['cpu'\]"):
        adapter.encode(torch.rand(1, 3, 32, 32), graph=True)
