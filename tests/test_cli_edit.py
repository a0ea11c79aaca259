"""The commands that change embeddings: edit, interpolate and mix."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from sda_fast.cli.edit_sheet import as_one, compare, in_words, save_edit_sheet
from sda_fast.cli.sheets import LEVEL_COLORS, Tile, draw_area, save_gif
from sda_fast.editors.script import ScriptEditor
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.pipeline import SemanticPipeline
from sda_fast.scenes.models import build_instruction_encoder
from sda_fast.scenes.world import SMALL
from tests.command_line import (
    BAD_INPUT,
    FAILED,
    lines,
    load_model,
    pixels,
    run,
    save_model,
    write_noise,
)
from tests.tiny_scenes import WIDTH, tiny_scenes_pipeline

TREE = Hierarchy((4, 2, 1))
GOLD = np.array([0xFF, 0xB3, 0x00])
SCRIPT = [
    {"op": "transplant", "other": "b", "node": "/1"},
    {"op": "swap", "nodes": ["/1/0", "/2/0"]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory)


@pytest.fixture(scope="module")
def pipe(model):
    return load_model(model)


@pytest.fixture
def pictures(tmp_path):
    sizes = {"a.png": (32, 32), "b.png": (48, 24), "c.png": (24, 24)}
    return [write_noise(tmp_path / name, size) for name, size in sizes.items()]


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.json"
    path.write_text(json.dumps(SCRIPT))
    return path


def outlined(picture):
    """bool [H, W]: where the outline of an area was drawn."""
    return (np.asarray(picture) == GOLD).all(-1)


def test_edit_by_a_script(model, pipe, pictures, script, tmp_path):
    a, b, _ = (pipe.encode(p) for p in pictures)
    b.save(tmp_path / "b.safetensors")
    flags = "--script", script, "--with", f"b={tmp_path / 'b.safetensors'}", "--seed", 4
    out = tmp_path / "out"
    found = lines(run("edit", pictures[0], *flags, "--model", model, "--out", out))
    assert found == [str(out / f"a.edited.{e}") for e in ("png", "safetensors", "sheet.png")]
    result = ScriptEditor({"b": b}).edit(a, json.dumps(SCRIPT))
    assert torch.equal(SemanticEmbedding.load(found[1]).tokens, result.embedding.tokens)
    both = pipe.decode(SemanticEmbedding.cat([a, result.embedding]), seed=4)
    assert pixels(Image.open(found[0])) == pixels(both[1])
    assert pixels(both[0]) != pixels(both[1])
    sheet = Image.open(found[2]).convert("RGB")
    assert sheet.width > 2 * 192
    # the quadrant /1 and the quarter /2/0, on both pictures
    first = outlined(sheet)[48 : 48 + 192, 20 : 20 + 192]
    second = outlined(sheet)[48 : 48 + 192, 20 + 192 : 20 + 2 * 192 + 20]
    assert first[:96, 96:].any()
    assert first[96:144, :48].any()
    assert not first[:96, :96].any()
    assert not first[96:, 96:].any()
    assert second.sum() == first.sum()


def tiny_editor(mode="delta"):
    """An editor of the tiny pipeline's embeddings; its gates are open here and there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "ff_width": 16}
        editor = EmbeddingEditor(TREE.tokens_per_node, WIDTH, 96, mode, **sizes).eval()
        if mode == "delta":
            torch.nn.init.normal_(editor.gate.weight)
    return editor


@pytest.fixture(scope="module", params=["own reader", "T5 of FLUX"])
def model_with_editor(request, tmp_path_factory):
    pipe, editor = tiny_scenes_pipeline(), tiny_editor()
    torch.manual_seed(1)
    tokenizer, reader = build_instruction_encoder(SMALL)
    if request.param == "T5 of FLUX":
        pipe.flux.register_modules(tokenizer_2=tokenizer, text_encoder_2=reader)
    editor.set_text_encoder(InstructionEncoder(tokenizer, reader))
    pipe.editor = editor
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def test_edit_by_words_one_after_the_other(model_with_editor, pictures, tmp_path):
    pipe = SemanticPipeline.from_pretrained(model_with_editor)
    pipe.flux.set_progress_bar_config(disable=True)
    words = "remove the red circle", "move the blue square to c-4"
    flags = "--model", model_with_editor, "--out", tmp_path / "out"
    picture, file, sheet = lines(run("edit", pictures[0], *words, *flags))
    source = pipe.encode(pictures[0])
    first = pipe.edit(source, words[0])
    second = pipe.edit(first, words[1])
    assert first.edited.any()
    assert not second.edited.all()
    assert torch.equal(SemanticEmbedding.load(file).tokens, second.embedding.tokens)
    drawn = pipe.decode(SemanticEmbedding.cat([source, second.embedding]))
    assert pixels(Image.open(picture)) == pixels(drawn[1])
    assert Image.open(sheet).width > 2 * 192


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["  "], "instruction must be a text that says something"),
        (["remove the red circle", "remove one " * 99], "instruction must fit 40 tokens, got 199"),
    ],
)
def test_an_instruction_that_cannot_be_followed_writes_nothing(
    words, named, model_with_editor, pictures, tmp_path
):
    out = tmp_path / "out"
    result = run("edit", pictures[0], *words, "--model", model_with_editor, "--out", out)
    assert result.exit_code == BAD_INPUT, result.exception
    assert named in result.stderr
    assert not out.exists()


def test_an_editor_with_broken_weights_is_1(pictures, tmp_path, monkeypatch):
    pipe, editor = tiny_scenes_pipeline(), tiny_editor("prefilled")
    editor.set_text_encoder(InstructionEncoder(*build_instruction_encoder(SMALL)))
    with torch.no_grad():
        editor.positions.fill_(float("nan"))
    pipe.editor = editor
    monkeypatch.setattr("sda_fast.cli.edit_commands.load_pipeline", lambda *_, **options: pipe)
    result = run("edit", pictures[0], "remove one", "--out", tmp_path / "out")
    assert result.exit_code == FAILED, result.exception
    assert "weights may be broken" in result.stderr


def test_edit_takes_an_embedding_of_several_pictures(model, pipe, pictures, tmp_path):
    emb = pipe.encode(pictures[:2])
    emb.save(tmp_path / "both.safetensors")
    (tmp_path / "s.json").write_text('[{"op": "zero", "node": "/0/0"}]')
    flags = "--script", tmp_path / "s.json", "--model", model, "--out", tmp_path
    found = lines(run("edit", tmp_path / "both.safetensors", *flags))
    assert [path.rpartition("/")[2] for path in found] == [
        "both.edited.png",
        "both-2.edited.png",
        "both.edited.safetensors",
        "both.edited.sheet.png",
    ]
    edited = SemanticEmbedding.load(found[2])
    expected = pipe.decode(SemanticEmbedding.cat([emb, edited]))[2:]
    assert [pixels(Image.open(path)) for path in found[:2]] == [pixels(e) for e in expected]
    assert Image.open(found[3]).height > 2 * 192


def test_interpolate_takes_pictures_and_embeddings(model, pipe, pictures, tmp_path):
    a, b, _ = (pipe.encode(p) for p in pictures)
    b.save(tmp_path / "b.safetensors")
    flags = "--frames", 3, "--node", "/1", "--mode", "lerp", "--model", model, "--out", tmp_path
    found = lines(run("interpolate", pictures[0], tmp_path / "b.safetensors", "--gif", *flags))
    *frames, strip, file, film = found
    expected = pipe.interpolate(a, b, 3, mode="lerp", nodes=["/1"])
    assert [pixels(Image.open(f)) for f in frames] == [pixels(e) for e in expected]
    assert frames[0].endswith("a-to-b.0.png")
    assert pixels(expected[0]) != pixels(expected[2])
    assert Image.open(strip).width > 3 * 128
    way = a.interpolate(b, 3, "lerp", ["/1"])
    assert torch.equal(SemanticEmbedding.load(file).tokens, way.tokens)
    assert torch.equal(way.tokens[0], a.tokens[0])
    assert film.endswith("a-to-b.gif")
    with Image.open(film) as shown:
        stays = [frame.info["duration"] for frame in ImageSequence.Iterator(shown)]
        assert (shown.format, sum(stays)) == ("GIF", 3 * 150)  # equal neighbours are one frame


def test_mix(model, pipe, pictures, tmp_path):
    given = [pipe.encode(p) for p in pictures]
    flags = [part for weight in (1, 0, 3) for part in ("--weight", weight)]
    flags += ["--node", "/1", "--node", "/2/0", "--model", model, "--out", tmp_path]
    found = lines(run("mix", *pictures, *flags))
    ends = ("png", "safetensors", "sheet.png")
    assert found == [str(tmp_path / f"a-b-c.mixed.{end}") for end in ends]
    mixed = SemanticEmbedding.mix(given, [1, 0, 3], ["/1", "/2/0"])
    assert torch.equal(SemanticEmbedding.load(found[1]).tokens, mixed.tokens)
    drawn = pipe.decode(SemanticEmbedding.cat([*given, mixed]))
    assert pixels(Image.open(found[0])) == pixels(drawn[-1])
    assert Image.open(found[2]).width > 4 * 192

    file = lines(run("mix", *pictures[:2], "--model", model, "--out", tmp_path))[1]
    halves = SemanticEmbedding.mix(given[:2], [1, 1])
    assert torch.equal(SemanticEmbedding.load(file).tokens, halves.tokens)


def bad_command(kind, model, pictures, script, tmp_path):
    good, flags = pictures[0], ["--model", model]
    named = ["--with", f"b={pictures[1]}"]
    bad, binary = tmp_path / "bad.json", tmp_path / "binary.json"
    bad.write_text('[{"op": "zero", "node": "/9"}]')
    binary.write_bytes(b"\xff\xfe\x00")
    both, other = tmp_path / "both.safetensors", tmp_path / "other.safetensors"
    SemanticEmbedding(torch.zeros(2, TREE.num_tokens, WIDTH), TREE).save(both)
    SemanticEmbedding(torch.zeros(1, 12, WIDTH), Hierarchy((4, 2))).save(other)
    edit = ["edit", good, "--script", script, *flags]
    return {
        "no instruction": (["edit", good, *flags], "INSTRUCTION or a --script, got neither"),
        "no editor": (["edit", good, "remove one", *flags], "--model must have an editor"),
        "both": ([*edit, "remove one"], "INSTRUCTION or a --script, got both"),
        "with alone": (["edit", good, "remove one", *named, *flags], "--with gives names to"),
        "with without name": ([*edit, "--with", str(good)], "--with must be NAME=FILE"),
        "with twice": ([*edit, *named, *named], "'b' twice"),
        "with of nothing": ([*edit, "--with", "b=none.png"], "none.png"),
        "no script": (["edit", good, "--script", tmp_path / "none.json", *flags], "none.json"),
        "binary script": (["edit", good, "--script", binary, *flags], "binary.json"),
        "bad script": (["edit", good, "--script", bad, *flags], "operation 0 (zero): node: path"),
        "unknown name": (edit, "operation 0 (transplant): other must be one of []"),
        "other tree": ([*edit, "--with", f"b={other}"], "other 'b' must agree in hierarchy"),
        "rule": ([*edit, *named, "--rule", "global"], "global"),
        "mix of one": (["mix", good, *flags], "two or more, got 1"),
        "weights": (["mix", good, good, "--weight", 1, *flags], "a number for each of 2"),
        "negative": (["mix", good, good, "--weight", 2, "--weight", -1, *flags], "below 0"),
        "no weight": (["mix", good, good, "--weight", 0, "--weight", 0, *flags], "one above"),
        "nan": (["mix", good, good, "--weight", 1, "--weight", "nan", *flags], "finite"),
        "mix of many": (["mix", both, good, *flags], "both.safetensors must hold one picture"),
        "mix of trees": (["mix", good, other, *flags], "embeddings[1] must agree in hierarchy"),
        "mix node": (["mix", good, good, "--node", "/7", *flags], "'/7'"),
        "way of many": (["interpolate", good, both, *flags], "must hold one picture, got 2"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "no instruction",
        "no editor",
        "both",
        "with alone",
        "with without name",
        "with twice",
        "with of nothing",
        "no script",
        "binary script",
        "bad script",
        "unknown name",
        "other tree",
        "rule",
        "mix of one",
        "weights",
        "negative",
        "no weight",
        "nan",
        "mix of many",
        "mix of trees",
        "mix node",
        "way of many",
    ],
)
def test_bad_input_is_2_with_a_message_and_writes_nothing(kind, model, pictures, script, tmp_path):
    command, named = bad_command(kind, model, pictures, script, tmp_path)
    out = tmp_path / "out"
    result = run(*command, "--out", out)
    assert result.exit_code == BAD_INPUT, result.exception
    assert result.stdout == ""
    assert named in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("role", ["picture", "script", "with"])
def test_an_input_is_never_overwritten(role, model, pictures, script, tmp_path):
    path = {"picture": pictures[0], "script": script, "with": pictures[1]}[role]
    before = path.read_bytes()
    (tmp_path / "a.edited.sheet.png").symlink_to(path)
    flags = "--script", script, "--with", f"b={pictures[1]}", "--model", model
    result = run("edit", pictures[0], *flags, "--out", tmp_path)
    assert result.exit_code == BAD_INPUT
    assert "a.edited.sheet.png" in result.stderr
    assert path.read_bytes() == before
    assert not (tmp_path / "a.edited.png").exists()


def make(seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    return SemanticEmbedding(torch.randn(batch, 28, 8, generator=generator), TREE)


def test_a_chain_is_shown_as_one_edit():
    emb = make()
    first = ScriptEditor().edit(emb, '[{"op": "zero", "node": "/0/0"}]')
    second = ScriptEditor().edit(first, '[{"op": "zero", "node": "/3/3"}]')
    whole = as_one(second)
    assert whole.source is emb
    assert whole.embedding is second.embedding
    assert whole.touched == (("/0/0", "/3/3"),)
    assert in_words(whole).startswith("2 of 28 positions edited; change 0.07, at most 1.00 in /0/0")


def test_compare_edits_what_differs():
    emb, other = make(0, 2), make(1, 2)
    result = compare(emb, emb.transplant(other, "/2/1"))
    assert result.touched == (("/2/1",),) * 2
    assert not compare(emb, emb).edited.any()


def test_an_area_of_any_shape_is_outlined():
    area = torch.zeros(40, 60, dtype=torch.bool)
    area[10:30, 20:60] = True
    area[20:40, 0:40] = True
    rim = outlined(draw_area(Image.new("RGB", (60, 40), "white"), area))
    inner = torch.zeros_like(area)
    inner[13:27, 23:57] = True
    inner[23:37, 3:37] = True
    inner[13:37, 23:37] = True
    # where the two parts meet there is no line
    assert (rim == (area & ~inner).numpy()).all()
    assert tuple(GOLD) == tuple(int(LEVEL_COLORS[0][i : i + 2], 16) for i in (1, 3, 5))


def test_nothing_is_outlined_where_all_may_change(tmp_path):
    emb, tile = make(), Tile(Image.new("RGB", (32, 32)))
    some = save_edit_sheet(
        [[tile]], compare(emb, emb.transplant(make(1), "/0")), "t", tmp_path / "s"
    )
    assert outlined(Image.open(some)).any()
    whole = save_edit_sheet([[tile]], compare(emb, make(1)), "t" * 500, tmp_path / "w")
    assert not outlined(Image.open(whole)).any()
    assert Image.open(whole).width < 2000


def test_a_gif_is_whole_or_not_there(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    path = save_gif(frames, tmp_path / "a.gif", milliseconds=80)
    with Image.open(path) as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (3, 80, 0)
        for number, frame in enumerate(frames):
            film.seek(number)
            assert film.convert("RGB").tobytes() == frame.tobytes()
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_gif(frames[::-1], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
