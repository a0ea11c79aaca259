"""Adaptive norms at FLUX's sizes: what only a GPU can show, before anything is timed on it."""

import pytest
import torch

from bench.measure import Graph, peak_bytes
from sda_fast import ops

from .gpu_checks import NEEDS_GPU, assert_repeats, assert_same_bits, other_work
from .modulation_cases import (
    GATED,
    KINDS,
    PLAIN,
    assert_all_samples_alike,
    assert_far_is_near,
    assert_good,
    draw,
    run,
)

pytestmark = NEEDS_GPU

HALF = (torch.bfloat16, torch.float16)
both = pytest.mark.parametrize("op", [PLAIN, GATED])
# all tokens of a 1024 x 1024 picture with 128 positions
FLUX = {"length": 4224, "channels": 3072}


def step(op, inputs, d_outs, learn=None):
    """A function that gives all outputs and gradients in a row."""

    def call():
        found = run(getattr(ops, op), inputs, d_outs, learn=learn)
        return [*found.out.values(), *found.grad.values()]

    return call


@both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_sizes_of_flux_are_as_good_as_the_reference(batch, dtype, op, device):
    assert_good(op, *draw(op, batch, dtype=dtype, device=device, **FLUX))


@both
@pytest.mark.parametrize("channels", [1, 63, 512, 3000, 5120, 8192])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_other_widths(dtype, channels, op, device):
    assert_good(op, *draw(op, 2, 131, channels, dtype, device=device))


@both
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_rows(kind, op, device):
    assert_good(op, *draw(op, 2, 515, 3072, kind=kind, device=device))


@both
def test_250_repeats_beside_other_work_have_the_same_bits(op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device, **FLUX)
    assert_repeats(step(op, inputs, d_outs), 250, other_work(device))


@both
def test_a_graph_gives_what_eager_gives_for_other_inputs_too(op, device):
    inputs, d_outs = draw(op, 2, 515, 3072, torch.bfloat16, device=device)
    eager = step(op, inputs, d_outs)
    graph = Graph(eager, None)
    for _ in range(3):
        for t in (*inputs.values(), *d_outs):
            t.normal_()
        assert_same_bits(graph(), eager())


@both
@pytest.mark.parametrize("axis", [0, 1], ids=["batch", "tokens"])
def test_elements_more_than_2_31_apart(axis, op, device):
    options = {"dtype": torch.bfloat16, "device": device}
    assert_far_is_near(op, 2**31 + 2**20, axis, batch=2, length=64, channels=3072, **options)


@both
def test_results_of_more_than_2_31_elements(op, device):
    options = {"dtype": torch.bfloat16, "device": device}
    assert_all_samples_alike(op, 63, length=4224, channels=8192, **options)


@both
def test_a_forward_holds_its_results_and_the_statistics_and_nothing_else(op, device):
    inputs, d_outs = draw(op, dtype=torch.bfloat16, device=device, **FLUX)
    forward = lambda: getattr(ops, op)(**inputs)
    forward()
    rows, channels = 2 * FLUX["length"], FLUX["channels"]
    held = rows * (len(d_outs) * channels * 2 + 8)
    assert peak_bytes(forward, device) <= held + 2**16
