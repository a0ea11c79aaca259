import json
from dataclasses import replace

import pytest
import torch

from sda_fast.adapter import SemanticAdapter
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import digest
from tests.pictures import write_pictures
from tests.tiny_training import build, gradient, tiny
from train.__main__ import build_stage
from train.checkpoint import newest_valid, read_state
from train.config import override
from train.data.source import open_source
from train.flux import precompute_for
from train.frozen import find_parts
from train.loop import train
from train.nonfinite import replay
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import read_log
from train.state import State


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def test_a_run_on_pictures_leaves_frozen_what_is_frozen_and_saves_what_was_opened(data, tmp_path):
    config = tiny(tmp_path, data, "open_layers=1", "encoder_lr=1e-3")
    stage = build(config)
    frozen = stage.frozen
    parts = frozen.flux.transformer, frozen.flux.vae, frozen.encoder.clip
    before = [digest(part) for part in parts]
    opened = {name: t.clone() for name, t in frozen.encoder.trained_layers().items()}
    whole = {name: t.clone() for name, t in frozen.encoder.dino.state_dict().items()}
    train(config, stage)
    assert [digest(part) for part in parts] == before
    layers = frozen.encoder.trained_layers()
    assert all(not torch.equal(layers[n], t) for n, t in opened.items() if n.endswith("weight"))
    closed = {name for name in whole if f"dino.{name}" not in opened}
    now = frozen.encoder.dino.state_dict()
    assert any("layers" in n or "layer" in n for n in closed)
    assert all(torch.equal(now[n], whole[n]) for n in closed if "layer.1" not in n)

    adapter = SemanticAdapter.from_pretrained(config.folder / "export/adapter")
    fresh = build(config).frozen.encoder
    adapter.set_encoder(fresh)
    newest = newest_valid(config.folder / "checkpoints", pytest.fail)
    averaged = read_state(newest, "ema/encoder.")
    assert averaged.keys() == opened.keys()
    assert all(torch.equal(t, averaged[n]) for n, t in fresh.trained_layers().items())
    assert adapter.encode(sorted(map(str, data.glob("*.jpg")))[:2]).tokens.shape == (2, 12, 32)
    rows = read_log(config.folder)
    assert list(rows) == [1, 2, 3]
    assert {"loss", "flow", "penalty", "data_wait", "pictures_per_s"} <= rows[1].keys()
    assert {"eval/loss", "eval/mean_cosine", "eval/effective_rank"} <= rows[3].keys()


def test_held_out_pictures_are_never_trained_on(data, tmp_path):
    stage = build(tiny(tmp_path, data, "resolution=64"))
    unseen = set(stage.unseen.ids)
    assert len(unseen) == 4
    batches = stage.batches(1)
    steps = [next(batches) for _ in range(2 * stage.loader.order.steps_per_epoch)]
    drawn = {name for step in steps for batch in step for name in batch.ids}
    assert drawn == {file.name for file in data.glob("*.jpg")} - unseen
    assert {batch.size for step in steps for batch in step} == {(64, 64), (48, 80)}
    again = stage.batches_of(2, [range(4)])[0]
    assert again.ids == tuple(name for batch in steps[1] for name in batch.ids)


def test_what_was_precomputed_trains_as_the_pictures_do(data, tmp_path):
    config = tiny(tmp_path / "a", data)
    to = tmp_path / "shards"
    precompute_for(config, to, Ranks())
    train(config, build(config))
    same = replace(config, data=to, out_dir=tmp_path / "b")
    train(same, build(same))
    a, b = (read_log(c.folder) for c in (config, same))
    for step in a:
        assert a[step]["loss"] == pytest.approx(b[step]["loss"], rel=1e-4)
    other = tiny(tmp_path / "c", to, "resolution=64")
    with pytest.raises(
        ValueError, match=r"as this run wants it, got .*: resolution \(was 32, now 64\)"
    ):
        build(other)
    with pytest.raises(ValueError, match="must be pictures where encoder layers learn"):
        build(tiny(tmp_path / "d", to, "open_layers=1"))


def test_every_way_through_the_decoder_gives_the_same_gradient(data, tmp_path):
    found = []
    for ways in (
        ["decoder=stock"],
        ["decoder=fast"],
        ["decoder=fast", "recompute=attention-out"],
        ["decoder=stock", "recompute=full"],
        ["decoder=fast", "micro_batch=4"],
        ["decoder=fast", "micro_batch=1"],
    ):
        stage = build(tiny(tmp_path, data, *ways))
        found.append(gradient(stage, next(stage.batches(1))))
    (losses, grads), *others = found
    for other_losses, other in others:
        assert other_losses["loss"].item() == pytest.approx(losses["loss"].item(), rel=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(
                other[name], grad, rtol=2e-4, atol=2e-6 + 1e-4 * grad.abs().max()
            )


@pytest.mark.parametrize("rule", ["overlap", "isolated"])
def test_the_first_levels_alone_decode_alike_in_both_ways(rule, data, tmp_path):
    words = ["level_dropout=0.99", "tokens_per_node=4,2,1", f"rule={rule}"]
    stock, fast = (build(tiny(tmp_path, data, *words, f"decoder={d}")) for d in ("stock", "fast"))
    step = next(step for step in range(1, 99) if stock.levels(step) == 2)
    losses, other = (gradient(s, s.batches_of(step, [range(2)]))[0] for s in (stock, fast))
    assert other["flow"].item() == pytest.approx(losses["flow"].item(), rel=1e-5)


def test_fp8_is_near(data, tmp_path):
    exact, coarse = (
        gradient(stage, next(stage.batches(1)))[0]["flow"].item()
        for stage in (build(tiny(tmp_path, data, f"flux_precision={p}")) for p in ("bf16", "fp8"))
    )
    assert coarse != exact
    assert coarse == pytest.approx(exact, rel=0.05)


def test_frozen_encoders_and_latents_stay_in_half_precision(data, tmp_path):
    config = tiny(tmp_path, data, "precision=bf16")
    stage = build(config)
    state = State(config, stage, Ranks())
    pixels = torch.rand(1, 3, 32, 32)
    with state.precision():
        assert stage.features(pixels)[0].dtype == torch.bfloat16
        assert stage.frozen.latents(pixels).dtype == torch.bfloat16
    precompute_for(config, tmp_path / "shards", Ranks())
    sample = open_source(tmp_path / "shards").read(0, (32, 32))
    assert {t.dtype for t in sample.values()} == {torch.bfloat16}


def test_some_steps_decode_from_the_first_levels_alone(data, tmp_path):
    config = tiny(tmp_path, data, "level_dropout=0.5", "tokens_per_node=4,2,1")
    stage = build(config)
    levels = [stage.levels(step) for step in range(1, 401)]
    assert {levels.count(k) // 50 for k in (1, 2)} <= {1, 2}  # a quarter of 400 each, about
    assert 150 < levels.count(3) < 250
    step = levels.index(1) + 1
    batch = stage.batches_of(step, [range(2)])[0]
    seen = []
    velocity = stage.frozen.decoder.velocity
    stage.frozen.decoder.velocity = lambda x, t, emb, grid: (
        seen.append(emb.tree) or velocity(x, t, emb, grid)
    )
    assert stage.losses(batch)["loss"].isfinite()
    assert seen == [Hierarchy((4,))]


def test_too_many_broken_pictures_end_the_run_with_their_names(data, tmp_path):
    folder = write_pictures(tmp_path / "data")
    torn = folder / "004.jpg"
    torn.write_bytes(torn.read_bytes()[:-400])
    config = tiny(tmp_path, folder, "eval_pictures=1", "steps=8")
    with pytest.raises(
        ValueError, match=r"at most 1 % of pictures that cannot be read(.|\n)*004.jpg"
    ):
        train(config, build(config))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["data=none"], ValueError, "data must be a folder of pictures, got none"),
        (["data={tmp}/nothing"], FileNotFoundError, "data must be a folder, got .*nothing"),
        (["data={tmp}"], ValueError, "data must hold pictures"),
        (["micro_batch=3"], ValueError, "batch_size must be a multiple of micro_batch times ranks"),
        (["rehearsal=none"], FileNotFoundError, r"set flux=..., clip=..., dino=..."),
        (
            ["rehearsal=none", "flux={tmp}/f", "clip={tmp}", "dino={tmp}"],
            FileNotFoundError,
            "flux must be a folder, got .*/f",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:resolution 32")
def test_what_is_missing_is_named_before_anything_is_loaded(
    changes, error, message, data, tmp_path, monkeypatch
):
    monkeypatch.setattr("train.flux.frozen_flux", lambda *_: pytest.fail("loaded"))
    (tmp_path / "empty").mkdir()
    config = tiny(tmp_path / "runs", data, *(c.format(tmp=tmp_path / "empty") for c in changes))
    with pytest.raises(error, match=message):
        build(config)


def test_a_resolution_too_low_for_flux_is_warned_of(data, tmp_path):
    config = tiny(tmp_path, data, "rehearsal=none")
    with pytest.warns(UserWarning, match="FLUX behaves badly below 512"), pytest.raises(OSError):  # noqa: PT011
        build(config)
    with pytest.raises(FileNotFoundError, match="folders or hub ids"):
        find_parts(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["shard_flux=true", "flux_precision=fp8"], "flux_precision must be bf16 where shard_flux"),
        (["shard_flux=true", "decoder=stock"], "decoder must be fast where shard_flux"),
        (["decoder=stock", "flux_precision=fp8"], "flux_precision must be bf16 where decoder"),
        (["resolution=500"], "resolution must be a multiple of 16, got 500"),
        (["level_dropout=1"], "level_dropout must be 0 or more, below 1"),
        (["open_layers=-1"], "open_layers must be at least 0"),
        (["flux_precision=fp4"], "flux_precision must be"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        override(RECIPES["phase0-16"](), changes)


def test_the_phases_derive_from_one_another():
    made = {name: make() for name, make in RECIPES.items()}
    for config in made.values():
        parent = made.get(getattr(config, "parent", None))
        if parent is not None:
            old, new = parent.tokens_per_node, config.tokens_per_node
            assert all(b >= a for a, b in zip(old, new, strict=False))
            assert len(new) >= len(old)
    sizes = {
        n: Hierarchy(made[n].tokens_per_node).num_tokens for n in made if n.startswith("phase")
    }
    assert sizes == {
        "phase0-16": 16, "phase1-32": 32, "phase2-quadrants": 64, "phase3-112": 112,
        "phase3-128": 128, "phase3-64": 64, "phase4-768": 128, "phase4-1024": 128,
    }  # fmt: skip
    assert {made[n].open_layers for n in ("phase4-768", "phase4-1024")} == {4}
    assert json.loads(json.dumps(made["phase0-16"].resolution)) == 512


def test_a_step_of_a_sharded_run_is_computed_again_by_one_process(data, tmp_path):
    config = tiny(tmp_path, data)
    train(config, build(config))
    newest = newest_valid(config.folder / "checkpoints", pytest.fail)
    note = config.folder / "nonfinite/step-000003.json"
    note.parent.mkdir()
    about = {"step": 3, "state": f"../checkpoints/{newest.name}", "world_size": 2, "micro_batch": 2}
    note.write_text(json.dumps(about))
    found = replay(note, build_stage, Ranks())
    assert [row["rank"] for row in found] == [0, 1]
    assert all(row["finite"] for row in found)
    settings = config.folder / "config.json"
    settings.write_text(settings.read_text().replace('"shard_flux": false', '"shard_flux": true'))
    assert replay(note, build_stage, Ranks()) == found
