"""``bench claims``: what is measured, trainings in processes of their own, the command."""

import json
import math
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel

from bench import claims_training
from bench.claims import Bench, run
from bench.claims_list import CLAIMS
from bench.claims_measure import (
    ATTRIBUTES,
    FRAMES,
    Measure,
    answers,
    fit_probe,
    right_changes,
    whole_ways,
)
from bench.claims_training import (
    BLIND,
    PLANS,
    TRAINED,
    Plan,
    Trainer,
    blinded,
    save_blind_dino,
)
from bench.measure import Deadline
from bench.records import append_record, read_records
from sda_fast.scenes.edits import sample_edits
from sda_fast.scenes.models import build_tokenizer
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL
from train.config import override
from train.recipes import scenes_adapter

from .test_bench import run as bench
from .tiny_scenes import WIDTH, tiny_scenes_pipeline
from .train_processes import Run

PLAN = Plan(steps=1, batch=2, seeds=1, scenes=8, jobs=1, denoise=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny pipeline that reads captions, and the pipeline."""
    pipe = tiny_scenes_pipeline()
    tokenizer = build_tokenizer(SMALL)
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    pipe.flux.register_modules(
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval(),
        tokenizer_2=tokenizer,
    )
    folder = tmp_path_factory.mktemp("models") / "model"
    pipe.save_pretrained(folder)
    return folder, pipe


@pytest.fixture(scope="module")
def measure(model):
    return Measure(model[1], SMALL, PLAN)


def test_the_parser_reads_clean_renders(measure):
    scenes = measure.scenes()
    found = measure._scored(render(scenes, SMALL.size), scenes)
    assert sum(found["matched"]) == sum(found["truth"]) == sum(len(s.objects) for s in scenes)
    assert sum(found["iou"]) > 0.98 * sum(found["truth"])
    others = measure._scored(render(scenes[::-1], SMALL.size), scenes)
    assert sum(others["matched"]) < sum(others["truth"])


def test_a_new_object_is_told_from_old_ones(measure):
    drawn = sample_edits(SMALL, "test", 0, 60)
    edits = [edit for edit in drawn if edit.operation == "add"][:4]
    old = [float(len(edit.source.objects)) for edit in edits]
    for scenes, new, stayed in (
        ([e.target for e in edits], [1.0] * 4, old),
        ([e.source for e in edits], [0.0] * 4, old),
        ([replace(e.target, objects=e.target.objects[-1:]) for e in edits], [1.0] * 4, [0.0] * 4),
    ):
        found = measure._mixed(edits, render(scenes, SMALL.size))
        assert found == {"new": new, "scenes": [1.0] * 4, "stayed": stayed, "old": old}


def test_changes_are_counted_by_where_they_lead():
    # one pair, one attribute that changes: shared with the first end, with the second
    to_first, to_second = [2.0, 1.0, 2.0, 0.0], [0.0, 0.0, 1.0, 1.0]
    shared = torch.zeros(4, 1, 2, len(ATTRIBUTES), dtype=torch.float64)
    shared[:, 0, 0, 0], shared[:, 0, 1, 0] = torch.tensor(to_first), torch.tensor(to_second)
    found = right_changes(shared)
    assert (found["place"], found["place_of"]) == ([4.0], [5.0])
    assert (found["color"], found["color_of"]) == ([0.0], [0.0])
    whole = whole_ways(shared)
    assert (whole["place"], whole["color"], whole["place_of"]) == ([0.0], [1.0], [1.0])
    back = right_changes(shared.flip(0))
    assert (back["place"], back["place_of"]) == ([1.0], [5.0])


def test_a_way_of_renders_goes_the_right_way(measure):
    scenes = measure.scenes()
    ends = scenes[:4], scenes[4:]
    pictures = [render(end, SMALL.size) for end in ends]
    jump = [pictures[i > 2] for i in range(FRAMES)]
    shared = measure._shared(jump, ends)
    assert shared.shape == (FRAMES, 4, 2, len(ATTRIBUTES))
    assert min(min(column) for column in whole_ways(shared).values()) == 1
    back = measure._shared([*jump[:-1], pictures[0]], ends)
    assert sum(right_changes(back)["place"]) < sum(right_changes(back)["place_of"])
    assert sum(whole_ways(back)["place"]) < 4


def test_a_probe_reads_what_lies_in_the_space_it_learned():
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(4, 12, generator=generator)  # three classes and none
    named = torch.randint(4, (200,), generator=generator)
    tokens = words[named] + 0.1 * torch.randn(200, 12, generator=generator)
    probe = fit_probe(tokens, named, 3, seed=0)
    truth = torch.randint(3, (30,), generator=generator)
    positions = words[3].expand(30, 5, -1).clone()
    positions[:, 2] = words[truth]
    assert torch.equal(answers(probe(positions)), truth)
    assert (answers(probe(positions)) == truth.roll(1)).float().mean() < 0.7
    # what is not kept says nothing
    positions[:, 4] = words[(truth + 1) % 3] * 2
    keep = torch.arange(5).expand(30, -1) < 4
    assert torch.equal(answers(probe(positions), keep), truth)
    assert not torch.equal(answers(probe(positions)), truth)


def test_every_variant_of_the_shipped_model_is_measured(measure):
    found = measure.rules(0) | measure.mixing(0) | measure.interpolation(0) | measure.probe(0)
    asked = {v for claim in CLAIMS.values() for v in claim.variants} - TRAINED.keys()
    assert found.keys() == asked
    sizes = {v: {len(column) for column in columns.values()} for v, columns in found.items()}
    half = {v: {4} for v in found if v.startswith("way")}
    assert sizes == {variant: {8} for variant in asked} | half
    assert found["overlap"] == measure.rules(0)["overlap"]
    assert found["overlap"] != measure.rules(1)["overlap"]
    assert found["mix_none"]["old"] == found["mix_new"]["old"]


def test_an_adapter_is_measured_like_the_shipped_one(measure, model):
    found = measure.adapter(model[1].adapter, 0)
    overlap = measure.rules(0)["overlap"]
    assert {name: found[name] for name in overlap} == overlap
    emb = measure._read(measure.scenes())
    rank = torch.tensor(found["rank"])
    assert len(rank) == 8
    assert rank.gt(1).all()
    assert rank.le(min(emb.tokens.shape[1:])).all()


def test_a_blind_dino_sees_nothing(model, tmp_path):
    encoder = model[1].adapter.encoder
    pictures = torch.rand(2, 3, 32, 32)
    half = encoder.clip.config.hidden_size
    seen, blind = (e(pictures)[0] for e in (encoder, blinded(encoder)))
    assert torch.equal(seen[..., :half], blind[..., :half])
    assert (blind[..., half:] == 0).all()
    assert seen[..., half:].abs().mean() > 0.01
    folder = save_blind_dino(encoder, tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    assert weights
    assert not any(weight.any() for weight in weights.values())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert save_blind_dino(encoder, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_budget_scales_steps_and_scenes():
    plan = PLANS["cpu"]
    assert plan.scaled(1.0, plan.seeds) == plan
    half, twice = plan.scaled(0.5, 3), plan.scaled(2.0, 5)
    assert (half.steps, half.scenes, half.seeds) == (plan.steps // 2, plan.scenes // 2, 3)
    assert (twice.steps, twice.scenes, twice.seeds) == (2 * plan.steps, plan.scenes, 5)
    for budget, seeds, fault in (
        (0.0, 3, "budget"),
        (float("nan"), 3, "budget"),
        (1.0, 0, "seeds"),
    ):
        with pytest.raises(ValueError, match=f"{fault} must be"):
            plan.scaled(budget, seeds)


def trainer(folder, plan=PLAN, seconds=60.0):
    parts = {name: folder / name for name in ("flux", "clip", "dino", "blind")}
    return Trainer(plan, parts, folder / "runs", torch.device("cpu"), Deadline.after(seconds))


def test_the_trainer_takes_every_variant(tmp_path):
    told = trainer(tmp_path)
    configs = {
        variant: override(
            scenes_adapter(), [f"{k}={v}" for k, v in told.settings(variant, 3).items()]
        )
        for variant in TRAINED
    }
    base = configs["base"]
    assert (base.seed, base.steps, base.folder) == (3, 1, tmp_path / "runs" / "base-3")
    changed = {
        variant: {
            field
            for field in config.__dataclass_fields__
            if field != "name" and getattr(config, field) != getattr(base, field)
        }
        for variant, config in configs.items()
    }
    trees = dict.fromkeys(("positions_64", "positions_128", "grid_28", "grid_32"))
    assert changed == {
        "base": set(),
        **{variant: {"tokens_per_node"} for variant in trees},
        "no_rope": {"rope"},
        "no_penalty": {"penalty"},
        BLIND: {"dino"},
    }
    assert configs["grid_32"].tokens_per_node == (0, 0, 2)


def pretend(monkeypatch, folder, script):
    """Let a shell script stand in for the interpreter of trainings."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_a_finished_training_is_not_begun_again(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, "exit 1")
    done = tmp_path / "runs" / "base-0" / "export" / "adapter"
    done.mkdir(parents=True)
    with trainer(tmp_path) as training:
        assert isinstance(training.train("base", 0).exception(), RuntimeError)
        (done / "config.json").write_text("{}")
        assert training.train("base", 0).result() == done


def test_a_training_that_fails_says_why(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, "echo no room; exit 3")
    with (
        trainer(tmp_path, seconds=math.inf) as training,
        pytest.raises(RuntimeError, match="base-0 ended with 3: no room"),
    ):
        training.train("base", 0).result()


def test_trainings_end_with_the_time(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, "exec sleep 60")
    began = time.monotonic()
    with trainer(tmp_path, seconds=0.3) as training:
        for future in [training.train("base", seed) for seed in range(2)]:
            with pytest.raises(TimeoutError, match="no time was left"):
                future.result()
    assert time.monotonic() - began < 30


def test_leaving_ends_what_still_runs(tmp_path, monkeypatch):
    pretend(monkeypatch, tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    began = time.monotonic()

    def interrupted():
        with trainer(tmp_path) as training:
            futures.extend(training.train("base", seed) for seed in range(2))
            while not (tmp_path / "pid").exists():
                time.sleep(0.01)
            raise KeyboardInterrupt

    futures = []
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 30
    assert isinstance(futures[0].exception(), RuntimeError)
    assert futures[1].cancelled() or isinstance(futures[1].exception(), TimeoutError)


@pytest.fixture
def dino(model, measure, tmp_path):
    """All that the claim "dino" needs; the adapter of "base" is there as if trained before."""
    about = {"gpu": None, "processor": "x86_64", "versions": {}, "commit": "c0ffee", "run": "1"}
    found = Bench(measure, model[0], tmp_path / "work", tmp_path / "claims.jsonl", about)
    name = f"{found.setting(trained=True)['decoder']}-1x2"
    model[1].adapter.save_pretrained(tmp_path / "work" / name / "base-0" / "export" / "adapter")
    return found


class Forked:
    """In the place of a Popen of ``python -m train``: the same, forked with all imports done."""

    def __init__(self, command, env, **options):
        assert command[1:4] == ["-m", "train", "scenes-adapter"]
        assert env["OMP_NUM_THREADS"]
        self.run = Run(Forked.folder, arguments=command[3:])
        self.pid = self.run.ranks[0].pid

    def communicate(self, timeout):
        (self.returncode,) = self.run.wait()
        return self.run.said(), None


def test_what_is_missing_is_trained_and_measured(dino, monkeypatch, tmp_path):
    """One real training, on a blind DINOv2."""
    monkeypatch.setattr(claims_training.subprocess, "Popen", Forked)
    Forked.folder = tmp_path
    assert run(dino, ["dino"], Deadline.after(300.0)) == []
    records = read_records(dino.file)
    assert {r["variant"] for r in records} == {"base", BLIND}
    base, blind = sorted(records, key=lambda r: r["variant"])
    assert base["setting"] == blind["setting"]
    assert base["setting"]["steps"] == 1
    assert base["scenes"]["truth"] == blind["scenes"]["truth"]
    folder = next(dino.work.glob("*"))
    config = json.loads((folder / f"{BLIND}-0" / "config.json").read_text())
    assert config["dino"] == str(folder / "blind")
    # all is there now: nothing is started
    monkeypatch.setattr(claims_training.subprocess, "Popen", None)
    assert run(dino, ["dino"], Deadline.after(300.0)) == []
    assert read_records(dino.file) == records


def test_without_time_nothing_is_measured_and_it_is_told(dino):
    faults = run(dino, ["dino", "rules"], Deadline.after(-1.0))
    assert [r["variant"] for r in read_records(dino.file)] == ["base"]
    assert sorted(fault.partition(":")[0] for fault in faults) == [
        f"{BLIND}, seed 0",
        "rules, seed 0",
    ]
    assert all("no time was left" in fault for fault in faults)


def command(folder, out, **options):
    names = {"--model": folder, "--out": out, "--work": out / "work", "--budget": 0.01}
    return bench("claims", names | {f"--{name}": value for name, value in options.items()})


def test_the_command_extends_what_is_there(model, tmp_path, monkeypatch):
    monkeypatch.setitem(claims_training.PLANS, "cpu", replace(PLAN, seeds=3))
    code, said = command(model[0], tmp_path, claims="rules", seeds=2)
    assert code == 0
    assert "rules: " in said
    first = (tmp_path / "claims.jsonl").read_text()
    assert command(model[0], tmp_path, claims="rules,mixing", seeds=3)[0] == 0
    assert (tmp_path / "claims.jsonl").read_text().startswith(first)
    found = [(r["variant"], r["seed"]) for r in read_records(tmp_path / "claims.jsonl")]
    assert len(found) == len(set(found)) == 18
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"claims": "rulse"}, "claims must be of positions, hierarchy"),
        ({"budget": 0}, "budget must be positive"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, tmp_path, options, fault):
    code, said = command(model[0], tmp_path / "out", **{"claims": "rules"} | options)
    assert code == 2
    assert fault in said
    assert not (tmp_path / "out").exists()


def test_a_torn_file_of_results_is_refused(model, tmp_path):
    append_record(tmp_path / "claims.jsonl", {"variant": "base"})
    with (tmp_path / "claims.jsonl").open("a") as file:
        file.write('{"variant": "fl')
    before = (tmp_path / "claims.jsonl").read_bytes()
    code, said = command(model[0], tmp_path, claims="rules")
    assert code == 2
    assert "claims.jsonl:2 is not JSON" in said
    assert (tmp_path / "claims.jsonl").read_bytes() == before
