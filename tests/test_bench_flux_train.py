"""``bench flux-train``: cases, variants, the search for the largest batch."""

from dataclasses import replace

import pytest
import torch

from bench import flux_model
from bench.flux import COMPILE_S
from bench.flux_cases import CONFIGS, TRAIN_CASES, TRAIN_GOALS, TRAIN_SMALL, select_flux_train
from bench.flux_model import run_stock
from bench.flux_train import MOST_SMALL, MOST_TRIES, VARIANTS, FluxTrain, TrainWork, largest
from bench.measure import Deadline
from sda_fast.cost import flux_flops
from sda_fast.fast_checkpoints import POLICIES

from .test_bench_measure import bench_small

CPU = torch.device("cpu")
CASE = TRAIN_SMALL[0]


def measured(*names, case=CASE, **options):
    variants = [replace(VARIANTS[name], gpu=False) for name in names]
    return {r["variant"]: r for r in FluxTrain(variants, CPU, 1, **options).measure(case)}


def test_cases_are_those_the_goals_speak_of():
    assert [case.name for case in TRAIN_GOALS] == [
        "train-512-b4", "train-1024-b1", "train-512-b8", "train-1024-b2",
    ]  # fmt: skip
    assert {(c.model, c.num_txt) for c in TRAIN_GOALS} == {("dev", 128)}
    assert len(TRAIN_CASES) == len(TRAIN_GOALS) + len(TRAIN_SMALL)
    assert select_flux_train("train-512-*") == [TRAIN_GOALS[0], TRAIN_GOALS[2]]
    with pytest.raises(ValueError, match="names like train-512-b4, got 'step-512-b1'"):
        select_flux_train("step-512-b1")


def test_each_policy_takes_part():
    assert {f"ours-{policy}" for policy in POLICIES} < VARIANTS.keys()
    suite = FluxTrain(list(VARIANTS.values()), CPU, 1)
    few = {v.name for v in suite.competitors(replace(CASE, goal=False))}
    assert few == {f"ours-{policy}" for policy in POLICIES}


def test_a_step_gives_the_gradient_of_the_positions_alone():
    suite = FluxTrain([], CPU, 1)
    work = suite.work(CASE)
    ready = suite.prepare(VARIANTS["ours-none"], CASE, work)
    out, grad = ready.step()
    assert out.shape == work.given["hidden_states"].shape
    assert grad.shape == work.given["encoder_hidden_states"].shape
    assert not out.requires_grad
    again = ready.step()
    assert again[1].equal(grad)
    assert all(t.grad is None for t in work.given.values())
    assert all(p.grad is None for p in work.frozen.transformer.parameters())
    assert work.rulers[True].faults((out, grad)) == []


def test_pictures_come_with_gradients_of_their_own():
    suite = FluxTrain([], CPU, 1)
    frozen = suite.shelf.get(CASE, CPU)
    work = TrainWork.make(replace(CASE, batch=4), frozen, CPU)
    assert work.d_out[:2].equal(work.d_out[2:])
    assert not work.d_out[0].equal(work.d_out[1])


def test_who_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        "bench.flux_train.run_stock", lambda t, given, mask: run_stock(t, given, None)
    )
    found = measured("ours-none", "stock")
    assert found["ours-none"]["status"] == "ok"
    assert found["stock"]["status"] == "failed"
    assert "d_positions is off by" in found["stock"]["reason"]
    assert found["stock"]["p50_ms"] is None


def test_the_compiled_step_goes_the_same_way(monkeypatch):
    monkeypatch.setitem(flux_model.COMPILE, "backend", "eager")
    limit = torch._dynamo.config.recompile_limit
    assert measured("compiled-mask")["compiled-mask"]["status"] == "ok"
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()
    late = measured("compiled-mask", deadline=Deadline.after(2 * COMPILE_S - 1))["compiled-mask"]
    assert late["reason"] == "no time was left to compile it"


@pytest.mark.parametrize("most", [1, 2, 7, 32])
@pytest.mark.parametrize("first", [1, 2, 8, 50])
def test_the_largest_batch_is_found_in_few_tries(most, first):
    for limit in range(most + 3):
        tried = []

        def fits(n, limit=limit, tried=tried):
            tried.append(n)
            return n <= limit

        found, by = largest(fits, first, most, Deadline())
        assert found == min(limit, most)
        assert by == ("bound" if limit >= most else "memory")
        assert len(tried) == len(set(tried)) <= MOST_TRIES
        assert all(1 <= n <= most for n in tried)


def test_the_search_ends_in_time_and_says_so():
    assert largest(lambda n: True, 4, 32, Deadline.after(-1)) == (0, "time")
    ends = [100.0, 100.0, -1.0]

    class Passing:
        def left(self):
            return ends.pop(0)

    assert largest(lambda n: True, 4, 32, Passing()) == (8, "time")


def test_a_batch_that_is_out_of_memory_does_not_fit(monkeypatch):
    make = TrainWork.make

    def scarce(case, frozen, device):
        if case.batch > 2:
            raise torch.OutOfMemoryError("full")
        return make(case, frozen, device)

    monkeypatch.setattr(TrainWork, "make", scarce)
    found = measured("ours-none", "ours-full")
    assert (found["ours-none"]["largest_batch"], found["ours-none"]["largest_batch_by"]) == (
        2, "memory",
    )  # fmt: skip
    assert found["ours-full"]["largest_batch"] is None
    one = measured("ours-none", case=replace(CASE, goal=False))
    assert one["ours-none"]["largest_batch"] is None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("flux-train", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    assert [(r["case"], r["variant"]) for r in records] == [(CASE.name, name) for name in VARIANTS]
    for record in records:
        gpu = VARIANTS[record["variant"]].gpu
        assert record["status"] == ("skipped" if gpu else "ok"), record
        assert record["pass"] == "forward+backward"
        each = flux_flops(CONFIGS["tiny"], CASE.num_txt, CASE.num_img, backward=True)
        assert record["flops"] == CASE.batch * each
        assert gpu or record["error"] < 1e-4
    assert (records[0]["largest_batch"], records[0]["largest_batch_by"]) == (MOST_SMALL, "bound")
    assert "pictures/s" in said
    assert f"{len(records)} records in" in said
