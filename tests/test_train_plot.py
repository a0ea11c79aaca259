"""The page of a run: everything inside, whatever the run has so far."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from train.plot import MOST_POINTS, curve_of, pick, plot_run
from train.report import JsonLines

EVIL = '<script>alert("&")</script>'


class Page(HTMLParser):
    """Elements, text and attributes; open ones must be closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.links, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for key, value in attrs if key in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def write_run(folder, steps=40, evaluations=True, sheets=3):
    log = JsonLines(folder)
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 5 / step, "flow": 4 / step, "penalty": 0.2, "grad_norm": 1.0}
        log.log(row | {"pictures_per_s": 400.0, "mfu": 0.57, "data_wait": 0.004, "lr": 1.0})
        if evaluations and step % 10 == 0:
            log.log({"step": step, "eval/loss": 0.4, "eval/mean_cosine": 0.1, "eval/odd": 7.0})
    log.close()
    (folder / "config.json").write_text(
        json.dumps({"name": f"run {EVIL}", "stage": "flux", "steps": 100, "tokens": [16, 4]})
    )
    (folder / "sheets").mkdir()
    for step in range(1, sheets + 1):
        Image.new("RGB", (32, 8), (step, 0, 0)).save(folder / "sheets" / f"{step:06d}.png")


def test_a_page_holds_curves_numbers_samples_and_the_config(tmp_path):
    write_run(tmp_path)
    path = plot_run(tmp_path)
    assert path == tmp_path / "report.html"
    text = path.read_text()
    page = Page(text)
    words = "\n".join(page.words)
    for part in (
        f"run {EVIL}", "Step 40 of 100. flux.", "Mean cosine of positions", "data wait", "penalty",
        "0.125 (step 40)", "[16, 4]", "step 3", "odd",
    ):  # fmt: skip
        assert part in words, part
    assert "No evaluation yet" not in words
    assert EVIL not in text
    assert page.tags.count("svg") == 8
    assert "script" not in page.tags
    # nothing is fetched: what is linked lies in the page
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    pictures = [link for link in page.links if link.startswith("data:image/png")]
    first = base64.b64decode(pictures[0].partition(",")[2])
    assert first == (tmp_path / "sheets" / "000001.png").read_bytes()
    assert len(pictures) == 3


def test_a_run_in_progress_is_shown_as_far_as_it_is(tmp_path):
    write_run(tmp_path, steps=1, evaluations=False, sheets=0)
    (tmp_path / "sheets" / "000002.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 2, "lo')
    words = "\n".join(Page(plot_run(tmp_path).read_text()).words)
    assert "Step 1 of 100" in words
    assert "No evaluation yet." in words
    assert "000002.png cannot be read." in words


def test_an_empty_log_and_a_torn_config_are_said(tmp_path):
    (tmp_path / "log.jsonl").touch()
    (tmp_path / "config.json").write_text('{"na')
    words = "\n".join(Page(plot_run(tmp_path).read_text()).words)
    for part in (
        "Nothing has been logged yet.",
        "There is no config.json.",
        "No sample sheet yet.",
    ):
        assert part in words


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder of a run, got .* without config\.json"):
        plot_run(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_or_never_there_leave_gaps(tmp_path):
    log = JsonLines(tmp_path)
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0), 1):
        log.log({"step": step, "loss": loss, "memory_gib": math.nan})
    page = Page(plot_run(tmp_path).read_text())
    assert page.tags.count("svg") == 1
    assert "last: 2" in page.words


def test_long_curves_are_thinned_by_means():
    rows = {step: {"step": step, "loss": float(step % 2)} for step in range(1, 2 * MOST_POINTS + 1)}
    x, y = curve_of(rows, "loss")
    assert len(x) == MOST_POINTS
    assert x[:2] == [1.5, 3.5]
    assert set(y) == {0.5}
    assert curve_of(rows, "flow") == ([], [])


def test_few_sheets_are_picked_evenly_with_both_ends():
    assert pick(list(range(7)), 12) == list(range(7))
    picked = pick(list(range(101)), 12)
    assert len(picked) == len(set(picked)) == 12
    assert (picked[0], picked[-1]) == (0, 100)
    assert max(np.diff(picked)) - min(np.diff(picked)) <= 1


def test_a_large_sheet_is_embedded_smaller(tmp_path):
    write_run(tmp_path, sheets=0)
    Image.new("RGB", (3072, 512)).save(tmp_path / "sheets" / "000007.png")
    link = next(k for k in Page(plot_run(tmp_path).read_text()).links if k.startswith("data:"))
    data = base64.b64decode(link.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (1536, 256)
