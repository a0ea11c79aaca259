"""Small tables on the device: made once, refused in a capture, alive as long as a graph reads."""

import pytest
import torch

from sda_fast.ops import device_tables, rope3d_kernels

CPU = torch.device("cpu")


@pytest.fixture
def in_capture(monkeypatch):
    monkeypatch.setattr(device_tables, "capturing", lambda: True)


def test_frequencies_first_needed_inside_a_captured_graph_are_refused(in_capture):
    rope3d_kernels._pairs.cache_clear()
    with pytest.raises(RuntimeError, match="rope3d_attention must run once with these axes before"):
        rope3d_kernels._pairs((4, 6, 6), 1e4, CPU)


def test_frequencies_that_a_graph_was_captured_with_outlive_the_cache(monkeypatch):
    pairs = rope3d_kernels._pairs((4, 6, 6), 77.0, CPU)
    monkeypatch.setattr(device_tables, "capturing", lambda: True)
    coords = torch.zeros(2, 3)
    found = rope3d_kernels._rotations((coords, coords, (4, 6, 6), 77.0), CPU)
    assert found[0].pairs is pairs
    rope3d_kernels._pairs.cache_clear()
    assert any(kept is pairs for kept in device_tables._captured.values())


def test_a_table_of_inference_mode_serves_training_too():
    rope3d_kernels._pairs.cache_clear()
    with torch.inference_mode():
        pairs = rope3d_kernels._pairs((4, 6, 6), 1e4, CPU)
    assert not pairs.is_inference()


def test_a_default_device_does_not_catch_the_table():
    rope3d_kernels._pairs.cache_clear()
    with torch.device("meta"):
        assert rope3d_kernels._pairs((4, 6, 6), 1e4, CPU).device == CPU
