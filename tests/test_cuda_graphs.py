"""Graphs are found again by kind, bounded in number and never stale."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from sda_fast import cuda_graphs
from sda_fast.cuda_graphs import GraphCache

from .tape import Tape, TapePool

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))


class Doubles(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), Doubles()).eval()


@pytest.fixture
def pool():
    return TapePool()


@pytest.fixture
def cache(pool):
    return GraphCache(limit=3, make_pool=pool)


def assert_right(cache, model, *shape):
    x = torch.randn(*(shape or (4, 6)), dtype=next(model.parameters()).dtype)
    found = cache.run(model, [x], [model])
    with torch.no_grad():
        assert torch.equal(found, model(x))


def test_one_graph_a_kind_of_input(cache, pool, model):
    for shape in [(4, 6), (5, 6), (4, 6), (5, 6)]:
        assert_right(cache, model, *shape)
    assert len(pool.tapes) == len(cache) == 2
    model.double()
    assert_right(cache, model, 4, 6)
    assert len(pool.tapes) == 3


def test_results_are_not_overwritten_by_the_next_call(cache, model):
    x = torch.randn(4, 6)
    first = cache.run(model, [x], [model])
    kept = first.clone()
    cache.run(model, [x + 1], [model])
    assert torch.equal(first, kept)
    assert not first.requires_grad


def test_weights_that_change_in_place_are_seen_without_a_new_capture(cache, pool, model):
    assert_right(cache, model)
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[1].running_mean.add_(1)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert_right(cache, model)
    assert len(pool.tapes) == 1


def move_data(model):
    model[0].weight.data = model[0].weight.data * 3


def replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight * 3)


def replace_buffer(model):
    model[1].running_mean = model[1].running_mean + 3


def assign_state(model):
    model.load_state_dict({k: v * 3 for k, v in model.state_dict().items()}, assign=True)


def replace_module(model):
    model[0] = nn.Linear(6, 6)


def replace_module_without_weights(model):
    model[2] = nn.ReLU()


def add_module(model):
    model.append(nn.Linear(6, 6))


def remove_module(model):
    del model[2]


def transpose_data(model):
    model[0].weight.data = model[0].weight.data.t()


def transpose_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().t())


CHANGES = [
    transpose_data,
    transpose_parameter,
    move_data,
    replace_parameter,
    replace_buffer,
    assign_state,
    replace_module,
    replace_module_without_weights,
    add_module,
    remove_module,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_lies_elsewhere_now_is_captured_again(cache, pool, model, change):
    assert_right(cache, model)
    change(model)
    assert_right(cache, model)
    assert len(pool.tapes) == 2
    assert pool.tapes[0].released
    assert len(cache) == 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_alone_would_be_stale(model, change):
    x = torch.randn(4, 6)
    with torch.no_grad():
        tape = Tape(model, [x])
        change(model)
        assert not torch.equal(tape([x]), model(x))


@pytest.mark.parametrize("modes", ["train", "autocast", "precision"])
def test_modes_that_change_the_launches_are_captured_anew(cache, pool, model, modes, monkeypatch):
    assert_right(cache, model)
    if modes == "train":
        model[1].train()  # the root is as it was
        cache.run(model, [torch.randn(4, 6)], [model])
    elif modes == "autocast":
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
        assert_right(cache, model)
    else:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            assert_right(cache, model)
        finally:
            torch.set_float32_matmul_precision(before)
    assert len(pool.tapes) == 2


def test_the_least_recently_used_goes_first(cache, pool, model):
    for rows in (1, 2, 3, 1, 4):
        assert_right(cache, model, rows, 6)
    assert len(cache) == 3
    assert [tape.released for tape in pool.tapes] == [False, True, False, False]
    for rows in (1, 3, 4):
        assert_right(cache, model, rows, 6)
    assert len(pool.tapes) == 4


def test_clear_gives_all_up(cache, pool, model):
    for rows in (1, 2):
        assert_right(cache, model, rows, 6)
    cache.clear()
    assert len(cache) == 0
    assert all(tape.released for tape in pool.tapes)
    assert_right(cache, model, 1, 6)


def test_a_copy_is_empty(cache, model):
    assert_right(cache, model)
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert (len(other), other.limit) == (0, 3)
    assert len(cache) == 1


def test_a_function_that_fails_leaves_the_others(cache, model):
    def fails(x):
        raise RuntimeError("no")

    assert_right(cache, model)
    with pytest.raises(RuntimeError, match="no"):
        cache.run(fails, [torch.randn(9, 6)], [model])
    assert len(cache) == 1
    assert_right(cache, model)
    assert_right(cache, model, 9, 6)


def test_threads_take_turns(cache, model):
    def many(rows):
        for _ in range(20):
            assert_right(cache, model, rows, 6)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(many, (1, 1, 2, 2)))


def test_inside_another_capture_the_function_runs_as_it_is(cache, pool, model, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "capturing", lambda: True)
    assert_right(cache, model)
    assert pool.tapes == []


def test_weights_on_several_devices_or_on_none_with_graphs_are_refused(cache, model, monkeypatch):
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"one CUDA device, got \['cpu', 'meta'\]"):
        cache.run(model, [x], [model, nn.Linear(2, 2, device="meta")])
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"one CUDA device, got \['cpu'\]"):
        cache.run(model, [x], [model])


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        GraphCache(0)


class Failing(TapePool):
    """A pool that a broken capture has spoilt."""

    spoilt = False

    def __call__(self, device):
        return Failing(self.tapes)

    def capture(self, function, inputs):
        assert not self.spoilt, "this pool is to be used no more"
        try:
            return super().capture(function, inputs)
        except RuntimeError:
            self.spoilt = True
            raise


def test_after_a_broken_capture_another_pool_is_taken(model):
    cache = GraphCache(make_pool=Failing())

    def fails(x):
        raise RuntimeError("no")

    assert_right(cache, model)
    with pytest.raises(RuntimeError, match="no"):
        cache.run(fails, [torch.randn(9, 6)], [model])
    assert_right(cache, model)
    assert_right(cache, model, 9, 6)


def test_about_tells_functions_apart(cache, pool, model):
    x = torch.randn(4, 6)
    for _ in range(2):
        assert torch.equal(cache.run(lambda t: t + 1, [x], [model], "one more"), x + 1)
        assert torch.equal(cache.run(lambda t: t + 2, [x], [model], "two more"), x + 2)
    assert len(pool.tapes) == 2


def test_modules_that_hold_each_other_and_weights_without_an_address(cache, model):
    model[2].parent = [model]
    model[2]._modules["parent"] = model
    assert_right_graph = cache.run(lambda t: t + 1, [torch.zeros(2)], [model])
    assert torch.equal(assert_right_graph, torch.ones(2))
    del model[2]._modules["parent"]
    fake = nn.Module()
    fake.weight = nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="needs plain weights"):
        cache.run(model, [torch.randn(4, 6)], [fake])
