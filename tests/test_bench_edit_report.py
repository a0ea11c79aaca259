"""Tables of ``bench edit`` and ``bench edit-speed`` from records made up."""

import pytest

from bench.edit_report import AIMS, LENGTH, edit_section, edit_tables, latest_edits
from bench.edit_speed_report import speed_tables
from sda_fast.scenes.edits import OPERATIONS

from .test_bench_edit_speed import speed_record


def metrics(**means):
    return {n: {"mean": m, "low": m - 0.01, "high": m + 0.03} for n, m in means.items()}


def record(variant, part="test", step=0, run="1", operations=None, **more):
    about = {
        name: more.pop(name) for name in ("mode", "editor", "decoder", "scenes") if name in more
    }
    means = {"success": 0.5, "preserved": 0.6, "kept": 0.7} | more
    return {
        "suite": "edit", "part": part, "variant": variant, "step": step, "n": 256,
        "metrics": metrics(**means),
        "operations": {
            o: {"n": 50, "metrics": metrics(success=s)} for o, s in (operations or {}).items()
        },
        "decoder": "d1", "reader": "r1", "scenes": 512, "seeds": 3, "steps": 20, "run": run,
        "versions": {"torch": "2.13.0"}, "commit": "c0ffee",
    } | about  # fmt: skip


def finished(**more):
    return [record(variant, **more) for variant in ("source", "target", "caption")]


def lines(text):
    return {" ".join(line.split()) for line in text.splitlines()}


def row(text, start):
    (found,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def verdicts(*records):
    return lines(edit_tables([*finished(), *records]))


EDITOR = {"mode": "level", "editor": "e1"}


def test_a_split_has_a_row_of_each_variant_in_order():
    more = {"over_edit": 0.25, "place": 0.5, "psnr": 21.25, "leakage": 0.125, "same": 0.0}
    shown = record("shipped", operations=dict.fromkeys(OPERATIONS, 0.875), **EDITOR, **more)
    text = edit_tables([record("mine", mode="delta", editor="e2"), shown, *finished()])
    assert row(text, "**shipped** (level)") == [
        "**shipped** (level)", "256", "0.500 ±0.020", *5 * ["0.88"], "0.600 ±0.020",
        "0.700 ±0.020", "0.250 ±0.020", "0.500 ±0.020", "21.2 ±0.0", "0.125 ±0.020", "0.000 ±0.020",
    ]  # fmt: skip
    assert row(text, "no edit")[-5:] == ["–"] * 5
    starts = ["| no edit", "| the target", "| caption", "| **shipped**", "| **mine** (delta)"]
    places = [text.index(start) for start in starts]
    assert places == sorted(places)
    assert text.count("unseen scenes") == 1


def test_every_split_has_a_table_of_its_own():
    text = edit_tables([*finished(), record("target", "held_out_pairs", success=0.25)])
    assert "| held-out colour × shape" in text
    assert "held-out count" not in text
    assert text.index("unseen scenes") < text.index("held-out colour × shape")


def test_chains_show_what_is_left_after_each_edit():
    steps = [record("shipped", "chains", k, success=1 - k / 10, **EDITOR) for k in range(1, 5)]
    text = edit_tables([*finished(), *steps])
    cells = row(text, "**shipped** (level)")
    assert cells[2:] == [*(f"{1 - k / 10:.2f} / 0.60 / 0.70" for k in range(1, 5)), "–"]
    assert len(cells) == 2 + LENGTH
    assert "aim of" not in text  # no editor was measured on the test split


def test_aims_are_those_of_the_shipped_editor():
    found = verdicts(
        record("best", mode="level", editor="e2", success=1.0),
        record("shipped", **EDITOR, preserved=0.9, kept=0.95,
               operations={"add": 0.8, "remove": 0.79}),
        record("shipped", "held_out_pairs", **EDITOR, operations={"add": 0.6, "remove": 0.7}),
    )  # fmt: skip
    assert {
        "| add, success | ≥ 0.80 | 0.800 | met |",
        "| remove, success | ≥ 0.80 | 0.790 | missed |",
        "| add, held-out colour × shape, success | ≥ 0.60 | 0.600 | met |",
        "| remove, held-out colour × shape, success | ≥ 0.60 | 0.700 | met |",
        "| add, held-out operation × shape, success | ≥ 0.60 | – | not measured |",
        "| preserved, against the true scene | ≥ 0.90 | 0.900 | met |",
        "| preserved, above the caption rewritten | ≥ 0.20 | 0.300 | met |",
        "| kept, above the caption rewritten | ≥ 0.20 | 0.250 | met |",
        "| positions bit-identical in mode delta | ≥ 0.70 | – | not measured |",
    } <= found
    assert any(line.startswith("| aim of the editor shipped") for line in found)


def test_without_a_shipped_editor_aims_are_those_of_the_best():
    found = verdicts(
        record("worse", mode="level", editor="e2", success=0.3, kept=0.1),
        record("better", mode="delta", editor="e3", success=0.4, kept=0.2, same=0.75),
    )
    assert any(line.startswith("| aim of the editor better") for line in found)
    assert "| kept, against the picture without the edit | ≥ 0.90 | 0.200 | missed |" in found
    assert "| positions bit-identical in mode delta | ≥ 0.70 | 0.750 | met |" in found


def test_the_aim_of_mode_delta_is_asked_of_an_editor_of_that_mode():
    shipped = record("shipped", same=0.9, **EDITOR)
    closed = record("other", mode="delta", editor="e2", same=0.5)
    said = "| positions bit-identical in mode delta | ≥ 0.70 | 0.500 | missed |"
    assert said in verdicts(shipped, closed)
    unmeasured = "| positions bit-identical in mode delta | ≥ 0.70 | – | not measured |"
    assert unmeasured in verdicts(shipped)


def test_an_aim_over_a_baseline_that_is_missing_is_not_called_met():
    found = lines(edit_tables([record("shipped", preserved=0.9, **EDITOR)]))
    assert "| preserved, above the caption rewritten | ≥ 0.20 | – | not measured |" in found
    assert len(AIMS) == len([line for line in found if "≥" in line])


def test_records_of_several_runs_of_one_model_stand_together():
    old = [*finished(run="1"), record("shipped", run="1", success=0.1, **EDITOR)]
    new = [record("shipped", run="2", success=0.2, **EDITOR)]
    latest = latest_edits(old + new)
    assert latest["test", "shipped", 0]["metrics"]["success"]["mean"] == 0.2
    assert latest["test", "caption", 0]["run"] == "1"


def test_records_of_an_editors_older_weights_are_left_out():
    old = [record("shipped", p, **EDITOR) for p in ("test", "held_out_pairs")]
    latest = latest_edits([*finished(), *old, record("shipped", mode="delta", editor="e2")])
    assert latest["test", "shipped", 0]["editor"] == "e2"
    assert ("held_out_pairs", "shipped", 0) not in latest


@pytest.mark.parametrize("other", [{"decoder": "d2"}, {"scenes": 8}])
def test_a_try_on_another_model_or_fewer_scenes_does_not_take_the_place(other):
    tried = record("shipped", **EDITOR, **other)
    latest = latest_edits([*finished(), tried])
    assert latest.keys() == {("test", v, 0) for v in ("source", "target", "caption")}
    # but one that is whole does
    whole = latest_edits([*finished(), *finished(**other), record("source", run="9")])
    name, value = next(iter(other.items()))
    assert {r[name] for r in whole.values()} == {record("source")[name]}
    whole = latest_edits([*finished(), *finished(**other)])
    assert {r[name] for r in whole.values()} == {value}
    # and alone it is shown
    assert latest_edits([tried]).keys() == {("test", "shipped", 0)}


def test_without_records_it_says_so():
    text = edit_section([])
    assert "`python -m bench edit` takes them" in text
    assert "`bench/h100.sh edit-speed` takes them" in text


def test_the_section_has_both():
    text = edit_section([*finished(), speed_record("ours-level", 2.0)])
    assert "unseen scenes" in text
    assert "`t5-large-128-b1`" in text
    assert all(word in text for word in ("d1", "r1", "torch 2.13.0", "c0ffee"))


# --- speed ------------------------------------------------------------------------------------


def test_modes_are_held_against_autoregression_of_the_same_run():
    old = speed_record("ours-autoregressive", 1e6, run="0")
    records = [
        speed_record("ours-autoregressive-graph", 240.0, graph=True),
        speed_record("ours-autoregressive", 900.0),
        speed_record("ours-level", 30.0),
        speed_record("ours-level-graph", 24.5, graph=True),
        speed_record("ours-prefilled-graph", 9.0, graph=True),
        speed_record("ours-delta", None, status="skipped", reason="no time was left"),
    ]
    text = speed_tables([old, *records])
    found = lines(text)
    assert {
        "| autoregressive ÷ level | t5-large-128-b1 | ≥ 10.0 | 9.80 | missed |",
        "| autoregressive ÷ prefilled | t5-large-128-b1 | ≥ 25.0 | 26.67 | met |",
        "| autoregressive ÷ level | t5-base-128-b1 | ≥ 10.0 | – | not measured |",
        "| autoregressive, CUDA graph | t5-large-128-b1 | ≤ 250 ms | 240.0 ms | met |",
    } <= found
    assert "| ours-level | 30.00 | 27.00 – 33.00 | 30.00 | 8.0 | 1.0 |" in found
    assert "no time was left" in text
    assert "No record of an H100" not in text


def test_records_of_a_cpu_are_shown_for_what_they_are():
    cpu = {"gpu": None, "case": "t5-base-128-b1"}
    records = [
        speed_record("ours-autoregressive", 5000.0, **cpu),
        speed_record("ours-level", 400.0, **cpu),
        speed_record("ours-level", 1.0, gpu="NVIDIA A100"),
    ]
    text = speed_tables(records)
    assert "| autoregressive ÷ level | t5-base-128-b1 | ≥ 10.0 | 12.50 | met |" in lines(text)
    assert "No record of an H100 yet" in text
    assert "t5-large-128-b1`" not in text
    assert "x86_64 CPU, 2 threads" in text
