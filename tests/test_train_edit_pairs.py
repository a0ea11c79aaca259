"""Editors learn from lists of pictures, and from what was precomputed of pictures or scenes."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from sda_fast.editors.llm import LLMEditor
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.scenes.edits import sample_edits
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL
from sda_fast.weights import digest, fingerprint
from tests.tiny_editing import (
    OF_PICTURES,
    TINY,
    build,
    newest,
    tiny,
    write_edits,
    write_parts,
    write_picture_adapter,
    write_picture_parts,
)
from tests.tiny_llm import write_base
from tests.train_processes import Run
from train.__main__ import app
from train.checkpoint import read_state
from train.config import override
from train.data.edit_pairs import open_edits, text_of, text_tensor
from train.data.source import open_source
from train.edit_data import precompute_edits, said
from train.export import export_run
from train.flux import precompute_for
from train.loop import train
from train.ranks import Ranks
from train.recipes import RECIPES
from train.report import read_log


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def picture_parts(tmp_path_factory):
    return write_picture_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_edits(tmp_path_factory.mktemp("edits"))


@pytest.fixture(scope="module")
def scene_pairs(parts, tmp_path_factory):
    """Ten edits of scenes, precomputed."""
    out = tmp_path_factory.mktemp("precomputed")
    config = tiny("scenes-edit-delta", out, parts, "micro_batch=4")
    assert precompute_edits(config, out / "pairs", Ranks(), 10)
    return out / "pairs"


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """A run's page is not drawn: it takes most of the time of so short a run."""
    monkeypatch.setattr("train.view.plot_run", lambda folder: None)


# --- lists of pictures ------------------------------------------------------------------------


def write_lines(folder, *rows):
    path = folder / "list.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def row(source="000.jpg", target="001.jpg", instruction="make one red"):
    return {"source": source, "target": target, "instruction": instruction}


def test_a_list_is_read_as_it_says(data):
    source = open_edits(data)
    assert len(source) == 14
    assert source.ids(0) == '["000.jpg", "001.jpg", "make the red one large"]'
    assert source.sizes.tolist() == 10 * [[40, 40]] + 4 * [[40, 80]]
    sample = source.read(0, (32, 32))
    single = open_source(data.parent)
    for name, number in (("source", 0), ("target", 1)):
        assert torch.equal(sample[name], single.read(number, (32, 32))["pictures"])
    assert text_of(sample["instruction"]) == "make the red one large"


def test_any_instruction_is_kept_as_it_was_said():
    for text in ("rot → rouge", "x" * 1024, "日本 " * 3 + "."):
        assert text_of(text_tensor(text)) == text


def test_a_list_that_is_kept_is_read_again_where_a_picture_has_changed(tmp_path):
    path, cache = write_edits(tmp_path / "a"), tmp_path / "b" / "index.safetensors"
    first = open_edits(path, cache).fingerprint
    made = cache.stat().st_mtime_ns
    assert open_edits(path, cache).fingerprint == first
    assert cache.stat().st_mtime_ns == made
    Image.new("RGB", (40, 40), "red").save(path.parent / "003.jpg", quality=90)
    assert open_edits(path, cache).fingerprint != first
    assert cache.stat().st_mtime_ns != made


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "000.jpg"', "line 2: .*delimiter"),
        ('["000.jpg", "001.jpg", "x"]', "line 2: must be an object with 'source', 'target', 'ins"),
        (row(target=3), "line 2: must be an object with"),
        (row(instruction=" "), "line 2: instruction must be a text that says something, got ' '"),
        (row(instruction="x" * 1025), "line 2: instruction must have at most 1024 bytes, got 1,02"),
        (row(source=""), "line 2: source must be the name of a file, got ''"),
        (row(instruction="\ud800"), "line 2: .*surrogates"),
        (row(instruction="make one red "), "line 2: is line 1 again"),
    ],
)
def test_a_line_that_says_nothing_is_named(line, message, data):
    path = write_lines(data.parent, row(), line)
    with pytest.raises(ValueError, match=rf"data: .*list.jsonl, {message}"):
        open_edits(path)


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (row(target="gone.jpg"), "gone.jpg: cannot be read"),
        (row(source="../x.jpg"), "../x.jpg: leads out of the folder"),
        (row(source="list.jsonl"), "list.jsonl: must be one of .jpg"),
        (row(target="012.jpg"), r"target must be as large as source, \(40, 40\), is \(40, 80\)"),
    ],
)
def test_a_pair_that_is_unfit_is_refused_by_name(odd, message, data):
    with pytest.raises(ValueError, match=rf"at most 1 % of unfit pictures, got 1(?s:.*){message}"):
        open_edits(write_lines(data.parent, row(), odd))


def test_of_many_pairs_few_may_be_unfit(data):
    rows = [row(instruction=f"make one red {n}") for n in range(200)]
    source = open_edits(write_lines(data.parent, *rows, row(target="012.jpg")))
    assert len(source) == 200
    assert list(source.refused) == ['["000.jpg", "012.jpg", "make one red"]']


def test_no_list_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data must be a file of JSON lines, got .*gone"):
        open_edits(tmp_path / "gone.jsonl")


# --- pictures ---------------------------------------------------------------------------------


def test_an_editor_learns_from_pictures(data, picture_parts, tmp_path):
    config = tiny("edit-t5-large", tmp_path, picture_parts, f"data={data}", "flow=0.5")
    config = override(config, ["mode=level", "eval_every=2"])
    stage = build(config)
    unseen = set(stage.data.unseen.ids)
    assert len(unseen) == 4
    batches = stage.batches(1)
    drawn = [batch for _ in range(8) for batch in next(batches)]
    every = {open_edits(data).ids(n) for n in range(14)}
    assert {name for batch in drawn for name in batch.ids} == every - unseen
    # the picture and its words stay together
    assert all(json.loads(b.ids[0])[2] == said(b)[0] for b in drawn)
    before = digest(stage.behind.frozen.flux.transformer)
    train(config, stage)
    assert digest(stage.behind.frozen.flux.transformer) == before
    row = read_log(config.folder)[2]
    assert row["loss"] == pytest.approx(row["edit"] + 0.5 * row["flow"], rel=1e-4)
    assert row["eval/unedited"] > 0
    assert (config.folder / "sheets/000002.png").is_file()
    editor = EmbeddingEditor.from_pretrained(config.folder / "export/editor")
    assert editor.config["adapter"] == fingerprint(stage.behind.adapter)
    card = (export_run(config.folder) / "README.md").read_text()
    assert "FLUX.1" in card
    assert str(tmp_path) not in card


def test_what_was_precomputed_of_pictures_trains_as_they_do(data, picture_parts, tmp_path):
    config = tiny("edit-t5-large", tmp_path / "a", picture_parts, f"data={data}", "flow=0.5")
    assert precompute_edits(config, tmp_path / "pairs", Ranks(), None)
    train(config, build(config))
    same = replace(config, data=None, pairs=tmp_path / "pairs", out_dir=tmp_path / "b")
    stage = build(same)
    train(same, stage)
    # the same are held out, and the same drawn
    names = {name.partition("/")[2] for name in stage.data.unseen.ids}
    assert names == set(build(replace(config, out_dir=tmp_path / "c")).data.unseen.ids)
    a, b = (read_log(c.folder) for c in (config, same))
    for step in a:
        for name in ("loss", "flow"):
            assert a[step][name] == pytest.approx(b[step][name], rel=5e-3)
    # without a decoder nothing but the adapter and the words is there
    alone = replace(same, flow=0.0, decoder="none", out_dir=tmp_path / "d")
    stage = build(alone)
    assert stage.behind.readers is None
    train(alone, stage)
    assert sorted(read_log(alone.folder)) == [1, 2]


def test_two_ranks_learn_what_one_does(data, picture_parts, tmp_path):
    words = [f"data={data}", "flow=0.5", "mode=delta", "eval_every=2"]
    one = tiny("edit-t5-large", tmp_path / "one", picture_parts, *words)
    train(one, build(one))
    two = tmp_path / "two"
    given = [*TINY, *OF_PICTURES, *picture_parts, *words, f"out_dir={two}"]
    command = ["edit-t5-large", *(part for word in given for part in ("--set", word))]
    ranks = Run(two, arguments=command, world=2)
    assert ranks.wait() == [0, 0], ranks.said()
    a, b = read_log(one.folder), read_log(two / one.name)
    for step in (1, 2):
        for name in ("loss", "edit", "gate", "flow"):
            assert a[step][name] == pytest.approx(b[step][name], rel=1e-3)
    assert a[2]["eval/loss"] == pytest.approx(b[2]["eval/loss"], rel=1e-3)


def test_a_language_model_learns_by_the_same_recipe(data, picture_parts, tmp_path):
    base = write_base(tmp_path / "base")
    about = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 128}
    (base / "config.json").write_text(json.dumps(about))
    words = [f"data={data}", f"llm={base}", "lora_rank=2", "flow=0.5", "adamw_lr=1e-2"]
    config = tiny("edit-llm", tmp_path / "runs", picture_parts, *words, "instructions=none")
    stage = build(config)
    frozen = {n: p.clone() for n, p in stage.editor.llm.named_parameters() if not p.requires_grad}
    train(config, stage)
    now = dict(stage.editor.llm.named_parameters())
    assert frozen
    assert all(torch.equal(now[name], t) for name, t in frozen.items())
    averaged = read_state(newest(config), "ema/editor.")
    assert averaged.keys() == stage.editor.state_dict().keys()
    assert any("lora" in name for name in averaged)
    for folder in (config.folder / "export/editor", export_run(config.folder, tmp_path / "llm")):
        editor = LLMEditor.from_pretrained(folder, base=base)
        assert all(torch.equal(t, averaged[name]) for name, t in editor.state_dict().items())
    card = (tmp_path / "llm/README.md").read_text()
    assert 'LLMEditor.from_pretrained("path/to/this", base="base")' in card
    assert str(tmp_path) not in card


# --- what is precomputed of scenes --------------------------------------------------------------


def test_shards_hold_the_positions_of_both_pictures(parts, scene_pairs, tmp_path):
    config = tiny("scenes-edit-delta", tmp_path, parts)
    stage = build(config)
    edits = sample_edits(SMALL, "train", 0, 10)
    (file,) = scene_pairs.glob("shard-*.safetensors")
    held = load_file(file)
    for name in ("source", "target"):
        pictures = render([getattr(edit, name) for edit in edits], SMALL.size)
        assert held[name].dtype == torch.bfloat16
        torch.testing.assert_close(held[name], stage.behind.tokens(pictures).bfloat16())
    assert torch.equal(held["latents"], stage.behind.latents(pictures))
    assert list(map(text_of, held["instruction"])) == [edit.instruction for edit in edits]


def test_an_editor_of_scenes_learns_from_shards(parts, scene_pairs, tmp_path):
    config = tiny("scenes-edit-delta", tmp_path, parts, f"pairs={scene_pairs}", "flow=0.5")
    stage = build(config)
    assert stage.num_pictures == 10
    batch = stage.batches_of(1, [range(4)])[0]
    rows = [int(name.rpartition(" ")[2]) for name in batch.ids]
    edits = sample_edits(SMALL, "train", 0, 10)
    assert said(batch) == [edits[row].instruction for row in rows]
    drawn = replace(
        batch,
        texts=tuple(said(batch)),
        tensors={
            name: render([getattr(edits[row], name) for row in rows], SMALL.size)
            for name in ("source", "target")
        },
    )
    ours, theirs = stage.losses(batch), stage.losses(drawn)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-2, atol=1e-3)
    train(config, stage)
    assert {"flow", "eval/written"} <= read_log(config.folder)[2].keys()
    anew = override(config, ["pairs=none", "steps=3"])
    with pytest.raises(ValueError, match=r"another config: pairs \(was"):
        train(anew, build(anew))


def test_pairs_of_another_making_are_refused(data, parts, picture_parts, scene_pairs, tmp_path):
    def refuse(config, error, message):
        with pytest.raises(error, match=message):
            build(config)
        assert not config.folder.exists()

    out = tmp_path / "runs"
    of_scenes = tiny("scenes-edit-level", out, parts, f"pairs={scene_pairs}")
    adapter = build(of_scenes).behind.adapter
    adapter.proj_out.bias.data.add_(1)
    adapter.save_pretrained(tmp_path / "other")
    other = override(of_scenes, [f"adapter={tmp_path / 'other'}"])
    refuse(
        other, ValueError, r"pairs must be precomputed as .*pairs: adapter \(was [0-9a-f-]{49}, n"
    )
    refuse(
        override(of_scenes, ["world=full"]), ValueError, r"pairs .*world \(was small, now full\)"
    )
    of_pictures = tiny("edit-t5-large", out, picture_parts, f"pairs={scene_pairs}")
    refuse(
        of_pictures, ValueError, "pairs must be precomputed as this run wants it.*adapter.*resol"
    )
    refuse(override(of_scenes, ["pairs=nowhere"]), FileNotFoundError, "pairs must be a folder, got")
    empty = override(of_scenes, [f"pairs={data.parent}"])
    refuse(empty, FileNotFoundError, "pairs must be a folder that precompute-edits finished, .*not")


def test_pairs_and_features_are_not_taken_for_each_other(data, picture_parts, tmp_path):
    config = tiny("edit-t5-large", tmp_path / "runs", picture_parts, f"data={data}")
    precompute_edits(config, tmp_path / "pairs", Ranks(), None)
    words = ["rehearsal=small", "resolution=32", "steps=2", "warmup_steps=1", "batch_size=4"]
    words += ["workers=0", "micro_batch=2", "precision=fp32", f"out_dir={tmp_path / 'runs'}"]
    adapter = override(RECIPES["rehearse"](), [*words, f"data={tmp_path / 'pairs'}"])
    with pytest.raises(ValueError, match=r"data must be precomputed as this run wants it.*adapter"):
        build(adapter)
    pictures = override(adapter, [f"data={data.parent}"])
    precompute_for(pictures, tmp_path / "features", Ranks())
    with pytest.raises(ValueError, match=r"pairs must be .* adapter \(was None, now"):
        build(override(config, [f"pairs={tmp_path / 'features'}"]))


def test_an_instruction_that_cannot_be_read_whole_is_refused_first(data, picture_parts, tmp_path):
    long = write_lines(data.parent, row(), row(instruction="red " * 60))
    config = tiny("edit-t5-large", tmp_path / "runs", picture_parts, f"data={long}")
    message = "instruction must fit 40 tokens, got 61: 'red red"
    with pytest.raises(ValueError, match=message):
        build(config)
    with pytest.raises(ValueError, match=message):
        precompute_edits(config, tmp_path / "pairs", Ranks(), None)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_precomputes_and_refuses(data, parts, picture_parts, tmp_path):
    def said_of(*command):
        result = CliRunner().invoke(app, ["precompute-edits", *command])
        return result.exit_code, " ".join(result.output.split())

    def given(config_parts, *more):
        words = (*config_parts, *more, f"out_dir={tmp_path / 'runs'}")
        return [part for word in words for part in ("--set", word)]

    to = tmp_path / "pairs"
    scenes = ["scenes-edit-level", "--to", str(to), *given(parts, "micro_batch=2")]
    for command, code, message in (
        (["scenes-adapter", "--to", str(to)], 2, "is of recipes of an editor, got scenes-adapter"),
        (scenes, 1, "--pairs must be at least 1 for scenes, got none"),
        ([*scenes, "--pairs", "0"], 1, "--pairs must be at least 1 for scenes, got 0"),
        (
            ["edit-t5-large", "--to", str(to), "--pairs", "3", *given(picture_parts)],
            1,
            "--pairs must be left out for pictures, got 3",
        ),
        (
            ["edit-t5-large", "--to", str(to), *given(picture_parts)],
            1,
            "data must be a file of JSON lines, got none: set data=... or pairs=...",
        ),
    ):
        found = said_of(*command)
        assert found[0] == code, found
        assert message in found[1]
    assert not list(tmp_path.iterdir())
    code, text = said_of(*scenes, "--pairs", "3")
    assert (code, "finished" in text) == (0, True), text
    assert len(open_source(to)) == 3
    code, text = said_of(*scenes, "--pairs", "4")
    assert code == 1
    assert "was begun otherwise: source (was" in text


def test_an_adapter_of_other_features_is_refused(data, picture_parts, parts, tmp_path):
    config = tiny("edit-t5-large", tmp_path, picture_parts, f"data={data}")
    wide = write_picture_adapter(tmp_path / "wide", channels=48)
    with pytest.raises(ValueError, match=r"adapter must give positions of the 32 channels .* 48"):
        build(override(config, [f"adapter={wide}"]))
    with pytest.raises(
        FileNotFoundError, match="what reads instructions must be given: instructio"
    ):
        build(override(config, ["instructions=none"]))
