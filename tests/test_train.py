import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from sda_fast.weights import digest
from train.__main__ import app, build_stage
from train.checkpoint import newest_valid, read_state
from train.config import override
from train.loop import train
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import read_log
from train.scenes_export import export_scenes

# Muon and autocast compute in bf16, which few CPUs can: each is tried in one test
TINY = ["steps=4", "batch_size=4", "warmup_steps=1", "log_every=1", "checkpoint_every=2"]
TINY += ["precision=fp32", "muon_lr=0", "eval_pictures=8"]


def tiny(recipe, out_dir, *more):
    config = RECIPES[recipe]()
    fits = [word for word in TINY if hasattr(config, word.partition("=")[0])]
    return override(config, [*fits, f"out_dir={out_dir}", *more])


def build(config):
    return build_stage(config, Ranks())


def newest(config):
    return newest_valid(config.folder / "checkpoints", pytest.fail)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """The stages an adapter needs, four steps each."""
    out_dir = tmp_path_factory.mktemp("runs")
    for recipe in ("scenes-text", "scenes-clip", "scenes-dino"):
        config = tiny(recipe, out_dir)
        train(config, build(config))
    return out_dir


def parents(out_dir):
    return (
        f"flux={out_dir}/scenes-text/export/flux",
        f"clip={out_dir}/scenes-clip/export/clip",
        f"dino={out_dir}/scenes-dino/export/dino",
    )


@pytest.mark.parametrize("recipe", ["scenes-adapter", "scenes-flat"])
def test_an_adapter_trains_through_a_decoder_that_stays_as_it_was(recipe, chain, tmp_path):
    config = tiny(recipe, tmp_path, *parents(chain), "eval_every=2")
    stage = build(config)
    frozen = [stage.frozen.flux.transformer, stage.frozen.encoder]
    before = [digest(module) for module in frozen]
    start = {k: t.clone() for k, t in stage.trained.state_dict().items()}
    train(config, stage)
    assert [digest(module) for module in frozen] == before
    moved = [k for k, t in stage.trained.state_dict().items() if not torch.equal(t, start[k])]
    assert "adapter.qformer.queries" in moved
    assert "adapter.mlp.0.weight" in moved
    rows = read_log(config.folder)
    assert list(rows) == [1, 2, 3, 4]
    assert rows[1]["loss"] == pytest.approx(
        rows[1]["flow"] + config.penalty * rows[1]["penalty"], rel=1e-4
    )
    assert rows[2]["eval/effective_rank"] > 1
    assert (config.folder / "sheets" / "000002.png").is_file()
    assert (config.folder / "report.html").is_file()
    assert (config.folder / "export" / "adapter" / "config.json").is_file()


def test_muon_and_half_precision_learn_too(chain, tmp_path):
    words = ["steps=1", "batch_size=1", "width=32", "num_layers=1", "num_heads=2"]
    words += ["precision=bf16", "muon_lr=3e-3"]
    config = tiny("scenes-adapter", tmp_path, *parents(chain), *words)
    stage = build(config)
    start = {k: t.clone() for k, t in stage.trained.state_dict().items()}
    train(config, stage)
    key = "adapter.qformer.layers.0.feed_forward.0.weight"
    assert not torch.equal(stage.trained.state_dict()[key], start[key])
    assert f"{key}/momentum_buffer" in read_state(newest(config), "optim/")


def test_a_run_does_not_go_on_under_another_config(tmp_path):
    config = tiny("scenes-dino", tmp_path)
    train(config, build(config))
    before = (config.folder / "config.json").read_text()
    for change, message in (
        ("seed=5", r"seed \(was 0, now 5\)"),
        ("batch_size=2", r"batch_size \(was 4, now 2\)"),
        ("steps=3", "steps must be at least the 4 that are done, got 3"),
    ):
        other = override(config, [change])
        with pytest.raises(ValueError, match=message):
            train(other, build(other))
        assert (config.folder / "config.json").read_text() == before
    longer = override(config, ["steps=6", "log_every=2"])
    train(longer, build(longer))
    assert newest(config).name == "step-000006"


def test_a_torn_line_of_the_log_costs_that_line_only(tmp_path):
    config = tiny("scenes-dino", tmp_path)
    train(config, build(config))
    log = config.folder / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 9, "lo')
    longer = override(config, ["steps=5"])
    train(longer, build(longer))
    assert sorted(read_log(config.folder)) == [1, 2, 3, 4, 5]


def test_the_export_takes_runs_of_one_world_and_replaces_nothing_in_vain(
    chain, tmp_path, monkeypatch
):
    for recipe in ("scenes-adapter", "scenes-flat"):
        config = tiny(recipe, chain)
        train(config, build(config))
    target, flat = tmp_path / "model", tmp_path / "flat"
    written = export_scenes(chain, target, flat)
    assert 5e6 < written < 16e6
    manifest = (target / "SHA256SUMS").read_bytes()
    monkeypatch.setattr("train.scenes_export.MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=f"at most 1000 bytes, got {written}"):
        export_scenes(chain, target, flat)
    assert (target / "SHA256SUMS").read_bytes() == manifest
    assert (flat / "config.json").is_file()
    about = chain / "scenes-flat" / "config.json"
    had = about.read_text()
    about.write_text(had.replace('"small"', '"full"'))
    with pytest.raises(ValueError, match="of one world"):
        export_scenes(chain, target, flat)
    about.write_text(had)


def test_an_encoder_of_another_kind_or_world_is_refused(chain, tmp_path):
    dino = chain / "scenes-dino/export/dino"
    with pytest.raises(ValueError, match="clip"):
        build(tiny("scenes-adapter", chain, f"clip={dino}"))
    with pytest.raises(ValueError, match="clip must be of world full"):
        build(tiny("scenes-adapter", chain, "world=full"))


def test_the_averaged_weights_are_what_is_exported(chain):
    path = newest(tiny("scenes-text", chain))
    model, ema = (read_state(path, f"{kind}/transformer.") for kind in ("model", "ema"))
    folder = chain / "scenes-text/export/flux/transformer"
    exported = load_file(folder / "diffusion_pytorch_model.safetensors")
    key = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(exported[key], ema[key])
    assert not torch.equal(exported[key], model[key])


def test_overrides_take_the_type_of_their_field():
    config = override(
        RECIPES["scenes-adapter"](),
        ["tokens_per_node=(8,2)", "rope=false", "rule=local", "muon_lr=1e-4", "steps=200"],
    )
    assert (config.tokens_per_node, config.rope, config.rule) == ((8, 2), False, "local")
    assert (config.muon_lr, config.steps) == (1e-4, 200)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stps=3", "unknown key 'stps'.*steps"),
        ("steps=many", "steps must be int, got 'many'"),
        ("rope=maybe", "rope must be bool, got 'maybe'"),
        ("rule=all", "rule must be .*got 'all'"),
        ("steps", "key=value, got 'steps'"),
        ("steps=0", "steps must be at least 1, got 0"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("stage=text", "stage belongs to the recipe"),
        ("steps=5", "warmup_steps 100 exceeds steps 5"),
    ],
)
def test_a_bad_override_is_named(assignment, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["scenes-adapter"](), [assignment])


def test_the_command_line_says_what_there_is_and_what_is_missing(tmp_path):
    runner = CliRunner()
    listed = runner.invoke(app, ["--list"])
    assert listed.exit_code == 0
    assert all(name in listed.output for name in [*RECIPES, "scenes-encoders"])
    unknown = runner.invoke(app, ["scenes-txt"])
    assert unknown.exit_code == 2
    assert "scenes-text" in unknown.output
    missing = runner.invoke(app, ["scenes-adapter", "--set", f"flux={tmp_path}/none"])
    assert missing.exit_code == 1
    assert "flux" in missing.output
    assert "not there" in missing.output
    assert list(tmp_path.iterdir()) == []
