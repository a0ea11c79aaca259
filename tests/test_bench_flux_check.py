"""The yardstick of ``bench flux``: it takes what is right and notices what is not."""

import copy
from dataclasses import replace

import pytest
import torch

from bench.flux import rope_layers
from bench.flux_cases import SMALL, STEPS
from bench.flux_check import (
    CHECKED_STEPS,
    Launches,
    Noted,
    as_dtype,
    euler,
    first_steps,
    flux_yardstick,
    make_yardstick,
    one_step,
    rope_yardstick,
    step_and_gradient,
    streamed,
)
from bench.flux_levers import plain_norm_rope
from bench.flux_model import Frozen, run_stock

CPU = torch.device("cpu")
CASE = replace(SMALL[0], batch=4, grid=(8, 8))


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def case(request):
    return replace(CASE, dtype=request.param)


@pytest.fixture(scope="module")
def frozen(case):
    return Frozen(case, CPU)


def mask_of(case):
    return case.tree.attention_mask(*case.grid)[None, None]


@pytest.fixture(scope="module")
def rulers(case, frozen):
    given = case.inputs(CPU)
    return {
        masked: flux_yardstick(frozen, case, given, ["velocity"], one_step(mask))
        for masked, mask in ((True, mask_of(case)), (False, None))
    }


@torch.no_grad()
def test_cast_block_by_block_is_cast_whole(case, frozen):
    given = as_dtype(case.inputs(CPU), torch.float64, case.distinct)
    found = run_stock(streamed(frozen.twin(), torch.float64), given, mask_of(case))
    whole = run_stock(copy.deepcopy(frozen.transformer).double(), given, mask_of(case))
    assert found.equal(whole)
    assert frozen.transformer.dtype == case.dtype


@torch.no_grad()
def test_a_step_is_held_to_its_own_mask(case, frozen, rulers):
    given = case.inputs(CPU)
    right = frozen.fast(**given, return_dict=False)
    stock = run_stock(frozen.twin(), given, None)
    assert rulers[True].faults(right) == []
    assert rulers[False].faults([stock]) == []
    (fault,) = rulers[False].faults(right)
    assert fault.startswith("velocity is off by")
    assert rulers[True].faults([stock])
    assert rulers[True].error([stock]) > 0.05 > 2 * rulers[True].error(right)


@torch.no_grad()
def test_small_faults_are_noticed_wherever_they_are(case, frozen, rulers):
    ruler = rulers[True]
    (right,) = frozen.fast(**case.inputs(CPU), return_dict=False)
    assert ruler.faults([right * 1.05])
    second_round, last = right.clone(), right.clone()
    second_round[2] = right[3]  # a picture of another place in the batch
    assert ruler.faults([second_round])
    last[3, -1] += 0.5 * last[3, -1].norm() / last.shape[-1] ** 0.5
    (fault,) = ruler.faults([last])
    assert "off by" in fault
    lost = right.clone()
    lost[0, 0, 0] = float("nan")
    assert ruler.faults([lost])
    assert ruler.faults([right[:, 1:]]) == ["velocity is [4, 63, 16], not n * [2, 64, 16]"]
    assert ruler.faults([right[:3]])


def test_one_bad_row_among_good_ones_is_told():
    exact = torch.randn(1, 1000, 16, dtype=torch.float64)
    stock = exact.float() + 1e-3 * torch.randn(1, 1000, 16)
    ruler = make_yardstick(["velocity"], [exact], [stock])
    found = exact + 1e-3 * torch.randn_like(exact)
    assert ruler.faults([found]) == []
    found[0, 7] += 5e-3
    (fault,) = ruler.faults([found])
    assert fault.startswith("a row of velocity is off by")


def test_gradients_are_held_to_the_stock_ones(case, frozen):
    given, mask = case.inputs(CPU), mask_of(case)
    torch.manual_seed(0)
    half = torch.randn(2, *given["hidden_states"].shape[1:], dtype=case.dtype)
    d_out = half.repeat(2, 1, 1)
    compute = step_and_gradient(mask, d_out)
    ruler = flux_yardstick(frozen, case, given, ["velocity", "d_positions"], compute)
    out, grad = compute(frozen.twin(), given)
    assert ruler.faults([out, grad]) == []
    assert ruler.faults([out, 1.1 * grad])[0].startswith("d_positions is off by")
    assert ruler.faults([out, torch.zeros_like(grad)])
    unmasked = step_and_gradient(None, d_out)(frozen.twin(), given)
    assert len(ruler.faults(unmasked)) == 2


def test_times_are_those_that_the_weights_see():
    given = replace(CASE, dtype=torch.bfloat16).inputs(CPU)
    given["timestep"] = torch.tensor([0.7, 0.3, 0.7, 0.3])
    cast = as_dtype(given, torch.float32, 2)
    seen = (torch.tensor([0.7, 0.3]).bfloat16() * 1000).float()
    torch.testing.assert_close(cast["timestep"] * 1000, seen, rtol=1e-6, atol=0)
    assert cast["hidden_states"].shape[0] == 2
    assert cast["hidden_states"].dtype == torch.float32


def test_a_loop_is_held_in_its_first_steps(case, frozen):
    mask, given = mask_of(case), case.inputs(CPU)
    compute = first_steps(mask, case.dtype)
    ruler = flux_yardstick(frozen, case, given, ["latents"], compute)

    def velocity(shift):
        def at(i, x):
            t = torch.full((4,), 1 - (i + shift) / STEPS)
            with torch.no_grad():
                return frozen.fast(
                    **(given | {"timestep": t, "hidden_states": x}), return_dict=False
                )[0]

        return at

    notes = {}
    run = lambda shift: euler(velocity(shift), given["hidden_states"], 3, CHECKED_STEPS)
    right = run(0)
    held = Noted(ruler, notes, unchecked=1)
    assert held.faults(right) == []
    assert notes["error"] < 0.02
    still = given["hidden_states"]
    assert held.faults((still, right[1]))
    assert held.faults((right[0], right[1] * float("inf"))) == ["the last result is not finite"]


def test_what_is_lossy_has_more_room_but_not_any(frozen, rulers, case):
    with torch.no_grad():
        (right,) = frozen.fast(**case.inputs(CPU), return_dict=False)
        unmasked = run_stock(frozen.twin(), case.inputs(CPU), None)
    notes = {}
    lossy = Noted(rulers[True], notes, lossy=True)
    assert lossy.faults([right * 1.1]) == []
    assert notes["error"] == pytest.approx(0.1, rel=0.1)
    assert lossy.faults([right * 1.3])
    assert lossy.faults([unmasked])
    assert lossy.faults([right * float("nan")])
    assert notes["error"] is None
    assert lossy.faults([right[:, 1:]])
    assert Noted(rulers[True], {}).faults([right * 1.1])


@pytest.mark.parametrize("kind", ["norm-rope", "norm-rope-single"])
def test_every_launch_is_held_to_float64(frozen, case, kind):
    layer = rope_layers(replace(case, kind=kind), frozen, CPU)[0]
    ruler = rope_yardstick(layer)
    assert isinstance(ruler, Launches)
    right = [t for t in plain_norm_rope(**layer) if t is not None]
    assert len(right) == (2 if "single" in kind else 3)
    assert ruler.faults(right * 3) == []
    assert ruler.error(right * 3) < 0.01
    wrong = [*right, right[0].roll(1, 1), *right[1:]]
    (fault,) = ruler.faults(wrong)
    assert fault.startswith("q is off by")
    assert ruler.error(wrong) > 0.5
    (untouched,) = (layer["streams"][0][..., :32].unflatten(-1, (2, 16)),)
    assert ruler.faults([untouched, *right[1:]])
