"""``bench edit-speed``: the cases, what a result is held to, and faults that must be noticed."""

from dataclasses import replace

import pytest
import torch

from bench.edit_speed import (
    CASES,
    CPU,
    GOALS,
    SMALL,
    VARIANTS,
    EditSpeed,
    OwnWords,
    select_edit_speed,
)
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.t5_config import MODES, PRESETS

from .test_bench_measure import bench_small

HOME = torch.device("cpu")
ANYWHERE = [v for v in VARIANTS.values() if not v.gpu]


def speed_record(variant, p50, case="t5-large-128-b1", **more):
    spread = {"p20_ms": None, "p80_ms": None} if p50 is None else {
        "p20_ms": 0.9 * p50, "p80_ms": 1.1 * p50
    }  # fmt: skip
    return {
        "suite": "edit-speed", "case": case, "variant": variant, "label": variant,
        "pass": "forward", "mode": variant.split("-")[1], "status": "ok", "reason": None,
        "p50_ms": p50, **spread,
        "graph": False, "peak_bytes": 2**20, "batch": 1, "gpu": "NVIDIA H100", "driver": "580.1",
        "processor": "x86_64", "threads": 2, "nvml": None, "roofs": {"copy": 1e12, "matmul": 1e15},
        "versions": {"torch": "2.13.0"}, "commit": "c0ffee", "run": "1",
    } | more  # fmt: skip


def test_the_large_cases_are_the_presets_at_128_positions():
    assert [case.name for case in GOALS] == [
        "t5-large-128-b1", "t5-large-128-b16", "t5-xxl-128-b1", "t5-xxl-128-b16",
    ]  # fmt: skip
    assert [case.name for case in CPU] == [
        "scenes-28-b1", "scenes-28-b16", "t5-base-128-b1", "t5-base-128-b16",
    ]  # fmt: skip
    assert select_edit_speed("t5-large-*,t5-large-128-b1") == list(GOALS[:2])
    assert len(CASES) == 9
    with torch.device("meta"):
        editor = EmbeddingEditor(GOALS[2].tree.tokens_per_node, **PRESETS["t5-xxl"])
    assert editor.config["channels"] == editor.config["text_features"] == 4096


def test_every_mode_takes_part_in_every_way_it_has():
    assert {(v.mode, v.cache, v.graph) for v in VARIANTS.values()} == {
        *((mode, True, graph) for mode in MODES for graph in (False, True)),
        ("autoregressive", False, False),
        ("level", False, False),
    }
    assert all(VARIANTS[v.name] is v for v in VARIANTS.values())
    suite = EditSpeed(ANYWHERE, HOME, 1)
    assert set(suite.competitors(SMALL[0])) == set(ANYWHERE)
    assert all(v.cache for v in suite.competitors(CPU[2]))


def test_editors_of_a_case_share_a_decoder_and_are_the_same_each_time():
    editors = SMALL[0].editors(HOME)
    assert list(editors) == list(MODES)
    assert all(e.decoder is editors["delta"].decoder for e in editors.values())
    assert all(e.mode == mode and not e.training for mode, e in editors.items())
    for mode, again in SMALL[0].editors(HOME).items():
        state = editors[mode].state_dict()
        assert all(t.equal(state[name]) for name, t in again.state_dict().items())
        assert all(t.any() for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_is_timed(dtype):
    case = replace(SMALL[0], dtype=dtype)
    records = list(EditSpeed(ANYWHERE, HOME, 1).measure(case))
    assert [(r["variant"], r["status"]) for r in records] == [(v.name, "ok") for v in ANYWHERE]
    for r in records:
        assert 0 < r["error"] < (1e-5 if dtype == torch.float32 else 0.1)
        assert (r["batch"], r["positions"], r["reps"]) == (2, 27, 1)


def planted(monkeypatch, change):
    """The records where what an editor generates is changed; by mode."""
    generate = EmbeddingEditor.generate

    def wrong(editor, source, text, mask, **how):
        said = generate(editor, source, text, mask, **how)
        return replace(said, tokens=change(said.tokens.clone()))

    monkeypatch.setattr(EmbeddingEditor, "generate", wrong)
    return list(EditSpeed(ANYWHERE, HOME, 1).measure(SMALL[0]))


def one_position(tokens):
    tokens[1, 5] += 0.01
    return tokens


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens * 1.001,
        lambda tokens: tokens.roll(1, 1),
        lambda tokens: tokens.flip(0),
        lambda tokens: tokens * float("nan"),
        lambda tokens: tokens[:, :-1],
        one_position,
    ],
    ids=["scaled", "rolled", "pictures swapped", "NaN", "one short", "one position"],
)
def test_what_is_wrong_is_not_timed(monkeypatch, change):
    for r in planted(monkeypatch, change):
        assert (r["status"], r["p50_ms"]) == ("failed", None), r["variant"]


def test_a_gate_that_is_wrong_is_noticed():
    case = SMALL[0]
    editor, inputs = case.editors(HOME)["delta"], case.inputs(HOME)
    said = editor.generate(*inputs)
    ruler = OwnWords(editor, case.editors(HOME)["delta"].double(), inputs, {})
    assert ruler.faults([said.tokens, said.gate]) == []
    (fault,) = ruler.faults([said.tokens, said.gate + 0.01])
    assert fault.startswith("gate is off by")


def test_a_writer_that_loses_its_place_is_noticed(monkeypatch):
    """Keys that are kept at a wrong place: only autoregression with kept keys has them."""
    from sda_fast.editors.t5_decode import Writer

    step = Writer.step

    def lost(writer, editor):
        written = step(writer, editor)
        if int(writer.place) == 3:
            writer.place.sub_(1)
        return written

    monkeypatch.setattr(Writer, "step", lost)
    records = EditSpeed(ANYWHERE, HOME, 1).measure(SMALL[0])
    assert {r["variant"] for r in records if r["status"] != "ok"} == {"ours-autoregressive"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("edit-speed", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    assert [r["variant"] for r in records] == list(VARIANTS)
    for r in records:
        graph = r["variant"].endswith("-graph")
        assert r["status"] == ("skipped" if graph else "ok")
        assert (r["error"] is None) == graph
        assert r["suite"] == "edit-speed"
    assert f"{len(VARIANTS)} records in" in said


def test_full_sizes_are_for_a_gpu_and_the_rest_counts_on_a_cpu(monkeypatch, tmp_path, capsys):
    from bench.__main__ import main as bench

    monkeypatch.setattr("bench.command.current_device", lambda: HOME)
    options = ["edit-speed", "--out", str(tmp_path), "--limit-s", "0"]
    with pytest.raises(SystemExit) as stop:
        bench([*options, "--cases", "t5-large-128-b1"])
    assert stop.value.code == 2
    assert "there is no CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        bench(options)
    assert stop.value.code == 1  # no time for any
    assert "no time left for scenes-28-b1, scenes-28-b16, t5-base-128-b1" in capsys.readouterr().out
