"""Small tables on the device: made once, refused in a capture, alive as long as a graph reads."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sda_fast.coords import patch_coords
from sda_fast.ops import device_tables, rope3d_kernels
from sda_fast.ops.device_tables import kept_table

HERE = torch.zeros(2, 3)


@pytest.fixture(autouse=True)
def empty():
    device_tables._table.cache_clear()


@pytest.fixture
def captured(monkeypatch):
    """From now on, as inside a capture."""
    return lambda: monkeypatch.setattr(device_tables, "capturing", lambda: True)


def coords(like=HERE):
    return kept_table(patch_coords, (3, 2), like, "it must run once")


def transforms(axes):
    return rope3d_kernels._transforms((HERE, HERE, axes, 1e4), None, HERE)


def test_it_is_made_once():
    assert coords() is coords()
    assert torch.equal(coords(), patch_coords(3, 2))
    assert kept_table(patch_coords, (2, 3), HERE, "") is not coords()


def test_first_needed_inside_a_captured_graph_it_is_refused(captured):
    captured()
    with pytest.raises(RuntimeError, match="it must run once before a CUDA graph is captured"):
        coords()


def test_what_a_graph_was_captured_with_outlives_the_cache(captured):
    table = coords()
    captured()
    assert coords() is table
    device_tables._table.cache_clear()
    assert any(kept is table for kept in device_tables._captured.values())


def test_one_of_inference_mode_serves_training_too():
    with torch.inference_mode():
        table = coords()
    assert not table.is_inference()


def test_a_default_device_does_not_catch_it():
    with torch.device("meta"):
        assert coords().device == HERE.device
        pairs = transforms((4, 6, 6))[0].pairs
    assert pairs.device == HERE.device


def test_a_fake_one_is_not_kept():
    with FakeTensorMode() as mode:
        assert coords(mode.from_tensor(HERE)).shape == (6, 3)
    assert torch.equal(coords(), patch_coords(3, 2))


def test_frequencies_are_kept(captured):
    first, second = (transforms((4, 6, 6))[0].pairs for _ in range(2))
    assert first is second
    captured()
    with pytest.raises(RuntimeError, match="rope3d_attention must run once with these axes before"):
        transforms((2, 6, 8))


def test_a_parameter_is_as_good_as_a_tensor():
    assert coords(torch.nn.Parameter(HERE)) is coords()
