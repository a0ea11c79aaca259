"""``bench training``: the step, what it is held to, who takes part, the trainer beside it."""

import weakref
from dataclasses import replace

import pytest
import torch

from bench import flux_model, training_check, training_variants
from bench.flux import COMPILE_S, free_memory
from bench.flux_model import run_stock
from bench.measure import Deadline
from bench.training import Training
from bench.training_cases import CASES, GOALS, SMALL, select_training
from bench.training_step import PARTS
from bench.training_trainer import (
    SMALL_STEPS,
    STEPS,
    WARM_UP,
    read_rows,
    rehearse,
    run_trainer,
    settings,
    summary,
    write_pictures,
)  # fmt: skip
from bench.training_variants import VARIANTS
from sda_fast.adapter_config import PRESETS
from sda_fast.images import load_image
from sda_fast.reference.rope3d_attention import rope3d_attention

from .test_bench_measure import bench_small

CPU = torch.device("cpu")
CASE = SMALL[0]
OURS = ("ours", "ours-attention-out")


def measured(*names, **options):
    variants = [replace(VARIANTS[name], gpu=False) for name in names]
    return {r["variant"]: r for r in Training(variants, CPU, 1, **options).measure(CASE)}


@pytest.fixture(scope="module")
def work():
    return Training([], CPU, 1).work(CASE)


def test_the_large_cases_are_those_the_goals_speak_of():
    names = ["training-512-b8", "training-1024-b2", "trainer-512-b8"]
    assert [case.name for case in GOALS] == names
    assert select_training("training-*") == list(GOALS[:2])
    assert len(CASES) == len(GOALS) + len(SMALL)
    config = PRESETS["reference"].config
    for case in GOALS:
        assert (case.flux.model, case.flux.dtype) == ("dev", torch.bfloat16)
        assert case.flux.tree.tokens_per_node == config["tokens_per_node"]
        assert case.pictures().shape == (case.flux.batch, 3, *case.picture)
        # two rows and columns of what the VAE gives are a token
        channels = 4 * case.vae["latent_channels"]
        assert case.flux.config["in_channels"] == channels
        assert case.picture[0] == 2 * 8 * case.flux.grid[0]


@pytest.mark.parametrize("name", [*OURS, "stock"])
def test_a_step_learns_all_it_can_and_leaves_all_as_it_was(work, name):
    models = work.models
    before = [p.clone() for p in (*models.parameters, *models.frozen.transformer.parameters())]
    step = VARIANTS[name].ready(work).step
    loss, *grads = step()
    taken = {int(state["step"]) for state in models.optimizer.state.values()}
    assert len(taken) == 1
    assert len(models.optimizer.state) == len(models.parameters)
    assert [g.shape for g in grads] == [p.shape for p in models.parameters]
    assert all(g.isfinite().all() and g.any() for g in grads)
    again = step()
    assert all(a.equal(b) for a, b in zip((loss, *grads), again, strict=True))
    after = [*models.parameters, *models.frozen.transformer.parameters()]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))
    assert all(a.equal(b) for a, b in zip(models.average, models.parameters, strict=True))
    assert all(p.grad is None for p in after)


def test_parts_end_in_their_order(work):
    step = VARIANTS["ours"].ready(work).step
    ended = []
    step.run(ended.append)
    assert ended == list(PARTS)
    assert list(step.parts(2)) == list(PARTS)
    assert min(step.parts(1).values()) > 0


def one_gradient_halved(results, names):
    at = names.index("qformer.layers.0.cross_attention.norm_k.weight")
    return [r / 2 if i == at else r for i, r in enumerate(results)]


def test_the_yardstick_lets_right_results_pass_and_no_others(work):
    ruler = work.rulers[True]
    right = VARIANTS["ours"].ready(work).step()
    notes = {}
    assert ruler.noting(notes).faults(right) == []
    assert 0 < notes["error"] < 1e-5
    assert ruler.notes == {}
    (fault,) = ruler.faults(one_gradient_halved(right, ruler.names))
    assert fault.startswith("qformer.layers.0.cross_attention.norm_k.weight is off by")
    (fault,) = ruler.faults([right[0] * 1.001, *right[1:]])
    assert fault.startswith("loss is off by")
    assert ruler.faults(right[:-1]) == [f"it gave {len(right) - 1} results, not {len(right)}"]
    assert ruler.faults([right[0], *(g[None] for g in right[1:])])[-1].startswith("and ")
    assert "loss is off by nan" in ruler.faults([right[0] * float("nan"), *right[1:]])[0]


def test_luck_of_plain_torch_in_one_parameter_is_not_asked_of_others(work, monkeypatch):
    exact, own = torch.tensor([10.0, 0.0]), torch.tensor([10.0, 0.1])
    answers = iter([[exact] * 4, [own, own, exact, own]])
    monkeypatch.setattr(training_check, "loss_and_gradients", lambda *_: next(answers))
    limit = training_check.training_yardstick(work.models, work.given).limit
    assert limit == pytest.approx([0.125, 0.2, 0.2, 0.2], rel=1e-4)


def test_in_bfloat16_a_mask_that_is_not_obeyed_and_a_dropped_rotation_show(monkeypatch):
    half = {"dtype": torch.bfloat16}
    encode = replace(CASE.encode, adapter=replace(CASE.encode.adapter, **half))
    case = replace(CASE, flux=replace(CASE.flux, **half), encode=encode)
    work = Training([], CPU, 1).work(case)
    assert {p.dtype for p in work.models.parameters} == {torch.float32}
    ruler = work.rulers[True]
    for name in (*OURS, "stock"):
        notes = {}
        assert ruler.noting(notes).faults(VARIANTS[name].ready(work).step()) == [], name
        assert notes["error"] < 0.1
    stock = VARIANTS["stock"].ready(work).step
    with monkeypatch.context() as patch:
        patch.setattr(training_variants, "run_stock", lambda t, i, mask: run_stock(t, i, None))
        assert ruler.faults(stock())
    bare = lambda q, k, v, *_, norms: rope3d_attention(q, k, v, None, None, norms=norms)
    monkeypatch.setattr("sda_fast.qformer.rope3d_attention", bare)
    assert ruler.faults(VARIANTS["ours"].ready(work).step())


def test_who_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(training_variants, "run_stock", lambda t, i, mask: run_stock(t, i, None))
    found = measured("ours", "stock")
    assert found["ours"]["status"] == "ok"
    assert found["ours"]["mfu"] == pytest.approx(
        found["ours"]["flops"] / found["ours"]["p50_ms"] * 1e3 / 1e12
    )
    assert found["stock"]["status"] == "failed"
    assert " is off by " in found["stock"]["reason"]
    assert (found["stock"]["p50_ms"], found["stock"]["pictures_per_s"]) == (None, None)


def test_the_compiled_step_goes_the_same_way_and_nothing_is_held_after(monkeypatch):
    monkeypatch.setitem(flux_model.COMPILE, "backend", "eager")
    limit = torch._dynamo.config.recompile_limit
    suite = Training([replace(VARIANTS["stock-compiled"], gpu=False)], CPU, 1)
    (record,) = suite.measure(CASE)
    torch._dynamo.config.recompile_limit = limit
    assert record["status"] == "ok", record
    held = weakref.ref(suite.shelf.models.frozen.transformer)
    suite.shelf.clear()
    torch.compiler.reset()
    free_memory(CPU)
    assert held() is None
    late = measured("stock-compiled", deadline=Deadline.after(2 * COMPILE_S - 1))
    assert late["stock-compiled"]["reason"] == "no time was left to compile it"


@pytest.fixture(autouse=True)
def roofs(monkeypatch):
    """Records of a suite that is not started by its command."""
    measure = Training.measure

    def with_roofs(self, case):
        return measure(replace(self, about={"roofs": {"matmul": 1e12}, **self.about}), case)

    monkeypatch.setattr(Training, "measure", with_roofs)


def row(step, seconds=0.5, wait=0.01, **more):
    return {
        "step": step,
        "seconds": seconds,
        "pictures_per_s": 8 / seconds,
        "data_wait": wait,
    } | more


def test_what_a_log_says_of_waits():
    first = [row(5, 9.0, 0.9), row(10, 7.0, 0.8, checkpoint_stall=3.0)]
    assert len(first) == WARM_UP
    saved = row(20, 0.7, 0.03, checkpoint_stall=0.2, mfu=0.1, memory_gib=70.0)
    rows = [*first, row(15, mfu=0.5, memory_gib=60.0), saved, row(25), row(30, 0.6)]
    found = summary(rows)
    assert found["reps"] == 4
    assert found["p50_ms"] == 500  # of those without a checkpoint
    assert found["pictures_per_s"] == 16
    assert found["data_wait"] == 0.01
    assert (found["mfu"], found["memory_gib"]) == (0.5, 70.0)
    assert found["checkpoint_stall_s"] == 0.2
    assert found["checkpoint_stall_steps"] == pytest.approx(0.4)
    assert set(summary(first).values()) == {0, None}
    only = summary([*first, row(15, checkpoint_stall=0.1)])
    assert (only["p50_ms"], only["checkpoint_stall_steps"]) == (500, 0.2)


def test_logs_are_read_for_rows_of_steps(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "rehearse").mkdir()
    lines = ['{"step": 5, "seconds": 1.0}', '{"step": 5, "eval/loss": 1.0}']
    (tmp_path / "rehearse/log.jsonl").write_text("\n".join(lines) + "\n")
    assert read_rows(tmp_path) == [{"step": 5, "seconds": 1.0}]


def test_the_trainer_gets_pictures_and_keys_that_it_knows(tmp_path):
    from train.config import override
    from train.recipes import RECIPES

    write_pictures(tmp_path, 2, 48)
    files = sorted(tmp_path.iterdir())
    assert [load_image(file).size for file in files] == [(48, 48)] * 2
    assert files[0].read_bytes() != files[1].read_bytes()
    for case, steps in ((GOALS[2], STEPS), (SMALL[1], SMALL_STEPS)):
        given = settings(case, tmp_path, tmp_path / "runs")
        config = override(RECIPES["rehearse"](), [f"{k}={v}" for k, v in given.items()])
        assert (config.steps, config.batch_size) == (steps, case.flux.batch)
        assert config.rehearsal == ("small" if case is SMALL[1] else "full")
        assert config.resolution == case.picture[0]
        # a save shows in the row after it, which must count
        assert WARM_UP * config.log_every <= config.checkpoint_every < steps


def test_a_trainer_that_fails_or_takes_too_long_says_so():
    status, reason = run_trainer({"stpes": 1}, CPU, 60.0)
    assert status == "failed"
    assert reason.startswith("it ended with 2: ")
    assert "unknown key 'stpes'" in reason
    record = rehearse(SMALL[1], CPU, Deadline.after(0.1))
    assert (record["status"], record["p50_ms"]) == ("skipped", None)
    assert "no time was left" in record["reason"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("training", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    wanted = [(CASE.name, name) for name in VARIANTS] + [(SMALL[1].name, "ours-trainer")]
    assert [(r["case"], r["variant"]) for r in records] == wanted
    for record in records[:-1]:
        gpu = VARIANTS[record["variant"]].gpu
        assert record["status"] == ("skipped" if gpu else "ok"), record
        assert gpu or list(record["parts_ms"]) == list(PARTS)
        assert gpu or record["error"] < 1e-4
    trainer = records[-1]
    assert trainer["status"] == "ok", trainer["reason"]
    assert trainer["reps"] > 0
    assert 0 <= trainer["data_wait"] <= 1
    assert trainer["checkpoint_stall_s"] > 0
    assert trainer["p50_ms"] > 0
    assert "pictures/s, data wait" in said
