"""The demo: its files, its numbers, its page, and the sheets that it draws."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sda_fast.cli import app
from sda_fast.cli import demo as demo_module
from sda_fast.cli.demo import COUNT, FRAMES, run_demo
from sda_fast.cli.demo_report import COLD, HEAT_COLUMNS, PNG_UP_TO, WARM, data_uri, heat
from sda_fast.cli.sheets import (
    LEVEL_COLORS,
    Tile,
    contact_sheet,
    draw_hierarchy,
    draw_node,
    enlarge,
)
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import to_pil
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL, Scene, SceneObject, sample_scenes
from tests.tiny_scenes import SIZE, STEPS, tiny_scenes_pipeline

FILES = ["contact_sheet.png", "interpolation.png", "metrics.json", "report.html", "transplant.png"]
RATES = {"precision", "recall", "count", "color", "shape", "size", "miou", "background"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_scenes_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def out(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "demo"
    assert run_demo(out, model, seed=4) == out / "report.html"
    return out


class Page(HTMLParser):
    """Collects what a page asks for, and its text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags, self.scripts = [], [], {}
        self._script = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.addresses += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "script":
            self._script = attrs.get("id", "code")
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script:
            self.scripts[self._script] += data


def decoded(address):
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


def test_it_writes_its_files_and_nothing_else(out):
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in FILES:
        if name.endswith(".png"):
            Image.open(out / name).load()
    # a triple of a source, what came of it and the hierarchy, 192 pixels each, twice a row
    sheet = Image.open(out / "contact_sheet.png")
    assert sheet.width > 6 * 192
    assert sheet.height > COUNT / 2 * 192


def test_metrics(out, model):
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["model"], metrics["seed"], metrics["steps"]) == (model, 4, STEPS)
    assert len(metrics["pictures"]) == COUNT
    for record in [*metrics["pictures"], metrics["mean"]]:
        assert set(record) >= RATES | {"psnr_db"}
        assert all(0 <= record[name] <= 1 for name in RATES)
    scenes = sample_scenes(SMALL, "test", 4, COUNT)
    assert [r["objects"] for r in metrics["pictures"]] == [len(s.objects) for s in scenes]
    assert metrics["ceiling"]["recall"] == metrics["ceiling"]["color"] == 1  # clean renders
    seconds = metrics["seconds"]
    assert set(seconds) >= {"load", "encode", "rebuild", "interpolate", "transplant", "score"}
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.01)
    assert "torch" in metrics["versions"]


def test_the_page_is_whole_in_itself(out):
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not re.search(r"url\(|@import|\bfetch\(|XMLHttpRequest|<link", text)
    places = re.findall(r"https?://[^\s\"'<]+", text)
    assert set(places) <= {"http://www.w3.org/2000/svg"}  # a name, nothing is fetched
    assert "{{" not in text
    assert all(attrs.get("alt") is not None for tag, attrs in page.tags if tag == "img")


def test_the_page_shows_the_pictures(out):
    page = Page((out / "report.html").read_text())
    data = json.loads(page.scripts["data"])
    sources = to_pil(render(sample_scenes(SMALL, "test", 4, COUNT), SIZE))
    assert [decoded(p["source"]).tobytes() for p in data["pictures"]] == [
        s.tobytes() for s in sources
    ]
    assert all(decoded(p["heat"]).size == (16, 28) for p in data["pictures"])
    assert len(data["frames"]) == FRAMES
    assert list(data["transplants"]) == ["/0", "/1", "/2", "/3"]
    assert data["grid"] == [8, 8]
    assert len({*data["frames"]}) > 1


def test_one_seed_one_result(out, model, tmp_path):
    run_demo(tmp_path, model, seed=4)
    for name in FILES:
        if name.endswith(".png"):
            assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def draw_sources(shift):
    """A decoder that is as good as it gets: the sources, moved by some pixels."""

    def draw(painter, emb, size, words):
        scenes = sample_scenes(SMALL, "test", painter.seed, COUNT)
        pictures = render(scenes, SIZE).roll(shift, dims=2)
        return to_pil(pictures[torch.arange(len(emb)) % COUNT])

    return draw


def test_a_perfect_decoder_gets_full_marks(model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module._Painter, "draw", draw_sources(0))
    page = run_demo(tmp_path, model).read_text()
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for record in [*metrics["pictures"], metrics["mean"], metrics["ceiling"]]:
        assert all(record[name] == 1 for name in RATES - {"miou"})
        assert record["miou"] > 0.97
    assert all(r["objects_right"] == r["objects"] for r in metrics["pictures"])
    assert metrics["mean"]["psnr_db"] == 80
    assert 'class="good"' in page
    assert 'class="bad"' not in page


def test_objects_far_from_their_place_are_missing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module._Painter, "draw", draw_sources(SIZE // 2))
    page = run_demo(tmp_path, model).read_text()
    mean = json.loads((tmp_path / "metrics.json").read_text())["mean"]
    assert mean["recall"] < 0.2
    assert mean["miou"] < 0.2
    assert ", missing" in page
    assert "which was not there" in page


def save_pictures(folder, names):
    folder.mkdir()
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (40 + 8 * i, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_own_pictures_give_a_page_without_scene_metrics(model, tmp_path):
    folder = save_pictures(tmp_path / "own", ["a.png", "<b>&[b].png", "c.jpg"])
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    command = ["demo", "--model", model, "--out", str(out), "--pictures", str(folder)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out / 'report.html'}\n"
    metrics = json.loads((out / "metrics.json").read_text())
    assert [set(r) for r in metrics["pictures"]] == [{"name", "psnr_db"}] * 3
    assert "ceiling" not in metrics
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;&amp;[b].png" in page
    assert "<b>&[b]" not in page


def test_a_tree_of_one_level_has_only_its_root_to_transplant(tmp_path):
    model = tmp_path / "flat"
    tiny_scenes_pipeline(tokens_per_node=(5,)).save_pretrained(model)
    page = Page(run_demo(tmp_path / "out", str(model)).read_text())
    assert list(json.loads(page.scripts["data"])["transplants"]) == ["/"]


def test_bad_input_is_refused_before_anything_is_written(model, tmp_path):
    folder = save_pictures(tmp_path / "own", ["a.png"])
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="pictures must be two or more"):
        run_demo(out, model, [folder])
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        run_demo(out, model, [folder, tmp_path / "none.png"])
    with pytest.raises(OSError, match="nowhere"):
        run_demo(out, str(tmp_path / "nowhere"))
    assert not out.exists()
    with pytest.raises(NotADirectoryError, match=r"a\.png"):
        run_demo(folder / "a.png", model)
    with pytest.raises(NotADirectoryError, match=r"a\.png is none"):
        run_demo(folder / "a.png" / "deeper", model)


def test_the_transplant_shows_a_whole_object_where_there_was_none():
    across = SceneObject("square", "blue", "large", 0.5, 0.5)
    low_left = SceneObject("circle", "red", "small", 0.75, 0.25)
    tops = (
        SceneObject("square", "blue", "small", 0.2, 0.2),
        SceneObject("square", "red", "small", 0.2, 0.8),
    )
    scenes = [Scene(objects, "plain", "plum") for objects in ((across,), (low_left,), tops)]
    assert demo_module._choose(scenes) == (2, 1, "/2")


def test_draw_hierarchy_draws_lines_where_nodes_end():
    black = Image.new("RGB", (192, 192))
    drawn = np.asarray(draw_hierarchy(black, Hierarchy((4, 2, 1))))
    colors = [tuple(bytes.fromhex(color[1:])) for color in LEVEL_COLORS]
    assert tuple(drawn[2, 100]) == colors[0]
    assert tuple(drawn[20, 96]) == tuple(drawn[96, 20]) == colors[1]
    assert tuple(drawn[20, 47]) == colors[2]
    assert not drawn[10:40, 10:40].any()
    # the root alone: nothing inside
    assert not np.asarray(draw_hierarchy(black, Hierarchy((4,))))[10:180, 10:180].any()
    # a level without positions is not drawn
    bare = np.asarray(draw_hierarchy(black, Hierarchy((4, 0, 1))))
    assert colors[1] not in {tuple(p) for p in bare.reshape(-1, 3)}


def test_draw_node_outlines_its_box():
    drawn = np.asarray(draw_node(Image.new("RGB", (64, 64)), Hierarchy((4, 2)), "/3"))
    assert drawn[32, 40].any()
    assert not drawn[:32].any()
    assert not drawn[:, :32].any()
    assert not drawn[45, 45].any()


def test_enlarge_keeps_small_pixels_square_and_the_aspect():
    small = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    large = enlarge(small, 12)
    assert large.size == (12, 8)
    assert (np.asarray(large)[::4, ::4] == np.asarray(small)).all()
    assert enlarge(Image.new("RGB", (1000, 500)), 100).size == (100, 50)


def test_contact_sheet_places_its_tiles():
    red, blue = (Image.new("RGB", (30, 30), color) for color in ("red", "blue"))
    sheet = np.asarray(contact_sheet([[Tile(red), Tile(blue)], [Tile(blue)]], "Title"))
    for color, count in (((255, 0, 0), 1), ((0, 0, 255), 2)):
        assert (sheet == color).all(-1).sum() == count * 900
    with pytest.raises(ValueError, match="rows"):
        contact_sheet([], "Title")


def test_heat_is_blue_below_and_amber_above():
    tokens = torch.tensor([[100.0, -100.0, 0.0, 0.0]])
    picture = heat(tokens)
    assert picture.size == (4, 1)
    assert picture.getpixel((1, 0))[2] > picture.getpixel((1, 0))[0]
    assert picture.getpixel((0, 0))[0] > picture.getpixel((0, 0))[2]
    assert heat(torch.zeros(2, 3)).getpixel((0, 0)) not in (COLD, WARM)
    assert heat(torch.randn(5, 4096)).size == (HEAT_COLUMNS, 5)


def test_small_pictures_are_embedded_without_loss_and_large_ones_as_jpeg():
    pixels = np.random.default_rng(0).integers(0, 256, (PNG_UP_TO, 9, 3), dtype=np.uint8)
    small = Image.fromarray(pixels)
    assert (np.asarray(decoded(data_uri(small))) == pixels).all()
    large = small.resize((9, PNG_UP_TO + 1))
    assert data_uri(large).startswith("data:image/jpeg;base64,")
    assert decoded(data_uri(large)).size == large.size
