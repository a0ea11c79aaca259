"""norm_rope at FLUX's sizes: what only a GPU can show, before anything is timed on it."""

from dataclasses import dataclass

import pytest
import torch

from bench.measure import Graph, peak_bytes
from sda_fast import ops

from .gpu_checks import (
    NEEDS_GPU,
    assert_repeats,
    assert_rows_alike,
    assert_same_bits,
    far_apart,
    other_work,
)
from .test_norm_rope import Case, assert_good, draw, run

pytestmark = NEEDS_GPU


@dataclass(frozen=True)
class Size:
    """FLUX's, unless told otherwise; what follows q, k and v belongs to the MLP."""

    lengths: tuple[int, ...]
    batch: int = 1
    heads: int = 24
    head_dim: int = 128
    beyond: int = 0
    dtype: torch.dtype = torch.bfloat16

    def draw(self, device) -> Case:
        sizes = self.lengths, self.heads, self.head_dim, self.dtype
        return draw(*sizes, batch=self.batch, beyond=self.beyond, device=device)


DOUBLE, SINGLE = Size((128, 4096)), Size((128 + 4096,), beyond=12288)


def results(case: Case, values=True):
    """q, k, v and every gradient."""
    return list(run(ops.norm_rope, case, values).values())


def forward(case: Case, values=True):
    pairs = list(zip(case.norms[::2], case.norms[1::2], strict=True))
    return [
        t
        for t in ops.norm_rope(case.streams, pairs, case.rotary, case.heads, values)
        if t is not None
    ]


def assert_far_is_near(size: Size, device, place, reach):
    """Neighbours in `place` of gradients, and of streams where they have it, lie far apart."""
    case = size.draw(device)
    assert_good(case)
    near = results(case)
    _, grads = far_apart(case.grads, place, reach)
    assert_same_bits(results(case._replace(grads=grads)), near)
    if place < 2:
        streams = [far_apart([s[:, :, None]], place, reach)[1][0][:, :, 0] for s in case.streams]
        assert_same_bits(results(case._replace(streams=streams)), near)


def assert_all_samples_alike(size: Size, batch, device):
    """Of inputs expanded over the batch; results and gradients of its whole size."""
    case = size.draw(device)
    expand = lambda tensors: [t.expand(batch, *t.shape[1:]) for t in tensors]
    many = case._replace(streams=expand(case.streams), grads=expand(case.grads))
    found = run(ops.norm_rope, many)
    one = {name: t for name, t in run(ops.norm_rope, case).items() if "norm" not in name}
    assert_good(case)
    assert_same_bits([found[name][:1] for name in one], list(one.values()))
    assert_rows_alike([found[name] for name in one], batch)


def assert_follows_its_inputs(make_graph, size: Size, device):
    """What is changed in place between replays: streams, norms, table and gradients."""
    case = size.draw(device)
    step = lambda: results(case)
    graph = make_graph(step)
    for _ in range(3):
        for t in (*case.streams, *case.norms, *case.rotary, *case.grads):
            t.normal_()
        assert_same_bits(graph(), step())


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("lengths", [(128, 1024), (128, 4096), (4224,), (77, 3601)], ids=str)
def test_sizes_of_flux_are_as_good_as_the_reference(lengths, batch, dtype, values, device):
    assert_good(Size(lengths, batch, beyond=3072, dtype=dtype).draw(device), values)


@pytest.mark.parametrize(("heads", "head_dim"), [(24, 128), (16, 64), (7, 32), (5, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_other_heads_are_as_good_as_the_reference(heads, head_dim, dtype, device):
    assert_good(Size((128, 1024), 2, heads, head_dim, dtype=dtype).draw(device))


@pytest.mark.parametrize("place", [0, 1, 2], ids=["batch", "tokens", "heads"])
def test_elements_more_than_2_31_apart(place, device):
    assert_far_is_near(Size((13, 51), 2, 2), device, place, 2**31 + 2**20)


@pytest.mark.parametrize("size", [DOUBLE, SINGLE], ids=["double", "single"])
def test_results_of_more_than_2_31_elements(size, device):
    one = sum(size.lengths) * size.heads * size.head_dim
    assert_all_samples_alike(Size(size.lengths), 2**31 // one + 2, device)


@pytest.mark.parametrize("size", [DOUBLE, SINGLE], ids=["double", "single"])
def test_100_repeats_beside_other_work_have_the_same_bits(size, device):
    case = size.draw(device)
    assert_repeats(lambda: results(case), 100, other_work(device))


@pytest.mark.parametrize("size", [DOUBLE, SINGLE], ids=["double", "single"])
def test_a_graph_gives_what_eager_gives_for_other_inputs_too(size, device):
    assert_follows_its_inputs(lambda step: Graph(step, None).fresh, size, device)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("size", [DOUBLE, SINGLE], ids=["double", "single"])
def test_a_forward_holds_its_results_and_nothing_else(size, values, device):
    """So that a slice of a projection is not copied."""
    case = size.draw(device)
    held = sum(t.nbytes for t in forward(case, values))
    assert peak_bytes(lambda: forward(case, values), device) <= held + 2**16
