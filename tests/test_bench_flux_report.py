"""Goals and tables of ``bench flux`` and ``bench flux-train``, from records alone."""

import pytest

from bench.__main__ import main as bench
from bench.flux_cases import CONFIGS, GOALS, TRAIN_GOALS
from bench.flux_levers import LEVERS
from bench.flux_report import GOALS as WANTED
from bench.flux_report import flux_tables
from bench.flux_train import VARIANTS as TRAIN_VARIANTS
from bench.flux_variants import LAUNCHES, VARIANTS
from bench.records import append_record
from sda_fast.cost import flux_flops

ROOFS = {"copy": 3e12, "matmul": 800e12}


def record(case, variant, ms, run="1", **more):
    train = case.kind == "train"
    rope = case.kind.startswith("norm-rope")
    flops = case.batch * flux_flops(CONFIGS["dev"], 128, case.num_img, train)
    return {
        "case": case.name, "variant": variant.name, "label": variant.label, "kind": case.kind,
        "pass": "forward+backward" if train else "forward",
        "status": "ok" if ms else "skipped", "reason": None if ms else "it | cannot",
        "suite": "flux-train" if train else "flux", "batch": case.batch, "p50_ms": ms, "run": run,
        "steps": 28 if case.kind == "loop" else 1, "flops": None if rope else flops,
        "bytes": 3e9 if rope else None, "launches": LAUNCHES if rope else None,
        "error": 0.0123, "peak_bytes": 2**30 * case.batch, "largest_batch": None,
        "largest_batch_by": None, "gpu": "NVIDIA H100 80GB HBM3", "driver": "580",
        "roofs": ROOFS, "versions": {"torch": "2"}, "nvml": None, "commit": "c0ffee",
    } | more  # fmt: skip


def records(gpu="NVIDIA H100 80GB HBM3", **ms):
    """Of every case and variant; milliseconds by variant, None as skipped, 100 if not given."""
    found = []
    for case in (*GOALS, *TRAIN_GOALS):
        variants = TRAIN_VARIANTS if case.kind == "train" else VARIANTS
        for variant in variants.values():
            if case.kind == "train" or case.kind in variant.kinds:
                took = ms.get(variant.name.replace("-", "_"), 100.0)
                found.append(record(case, variant, took, gpu=gpu))
    return found


def verdicts(given):
    lines = [line.strip("|").split("|") for line in flux_tables(given).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 5]
    return {(cell[0], cell[1]): tuple(cell[2:]) for cell in cells[2 : 2 + len(WANTED)]}


def test_without_a_record_of_the_card_no_number_is_claimed():
    assert flux_tables([]) == (
        "Not measured: no record in bench/results/flux.jsonl yet; "
        "`bench/h100.sh flux flux-train` takes them on one H100."
    )
    assert flux_tables(records(gpu="NVIDIA A100")).startswith("Not measured: no record of an H100")


def test_goals_are_those_that_are_wanted():
    wanted = {key: cells[0] for key, cells in verdicts(records()).items()}
    assert wanted == {
        ("a step, bf16", "step-512-b1"): "≤ 25 ms",
        ("a step, bf16", "step-1024-b1"): "≤ 105 ms",
        ("share of the measured matmul roof", "step-512-b1"): "≥ 0.80",
        ("share of the measured matmul roof", "step-1024-b1"): "≥ 0.83",
        ("best compiled stock without mask ÷ ours", "step-512-b1"): "≥ 1.20",
        ("best compiled stock without mask ÷ ours", "step-1024-b1"): "≥ 1.10",
        ("stock eager with dense mask ÷ ours", "step-512-b1"): "≥ 2.0",
        ("stock eager with dense mask ÷ ours", "step-1024-b1"): "≥ 1.8",
        ("ours bf16 ÷ ours fp8", "step-512-b1"): "≥ 1.30",
        ("ours bf16 ÷ ours fp8", "step-1024-b1"): "≥ 1.35",
        ("pictures/s, forward and gradient, bf16, nothing recomputed", "train-512"): "≥ 17.0",
        ("pictures/s, forward and gradient, bf16, nothing recomputed", "train-1024"): "≥ 3.7",
        ("norm and rotation of q and k, share of the measured copy", "norm-rope-512"): "≥ 0.75",
        ("norm and rotation of q and k, share of the measured copy", "norm-rope-1024"): "≥ 0.80",
    }


def test_goals_are_met_at_their_bound_and_missed_beyond():
    ours = {"ours_graph": 105.0, "ours": 200.0, "ours_ahead": 110.0}
    found = verdicts(records(**ours, recipe=130.0, compiled=115.5, stock=188.0, ours_fp8=78.0))
    at = "step-1024-b1"
    assert found["a step, bf16", at] == ("≤ 105 ms", "105.0 ms", "met")
    assert found["a step, bf16", "step-512-b1"] == ("≤ 25 ms", "105.0 ms", "missed")
    # 67.04 TFLOP in 105 ms are 638 of 800 TFLOP/s
    assert found["share of the measured matmul roof", at] == ("≥ 0.83", "0.798", "missed")
    assert found["best compiled stock without mask ÷ ours", at] == ("≥ 1.10", "1.100", "met")
    assert found["best compiled stock without mask ÷ ours", "step-512-b1"][2] == "missed"
    assert found["stock eager with dense mask ÷ ours", at] == ("≥ 1.8", "1.79", "missed")
    assert found["ours bf16 ÷ ours fp8", at] == ("≥ 1.35", "1.346", "missed")
    assert found["ours bf16 ÷ ours fp8", "step-512-b1"][2] == "met"


def test_training_counts_the_best_batch_and_no_checkpoints():
    given = [r for r in records(ours_none=500.0, ours_full=1.0, stock=1.0) if r["suite"] != "flux"]
    found = verdicts(given)
    text = "pictures/s, forward and gradient, bf16, nothing recomputed"
    assert found[text, "train-512"] == ("≥ 17.0", "16.00", "missed")  # 8 in 500 ms
    assert found[text, "train-1024"] == ("≥ 3.7", "4.00", "met")
    said = flux_tables(given)
    # 8 * 33.01 TFLOP in 500 ms, of 800 and of 989 TFLOP/s
    line = next(x for x in said.split("`train-512-b8`")[1].splitlines() if "checkpoint none" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["16.00", "500.0", "0.66", "0.53", "1.0", "1.23 %"]


def test_the_worse_of_both_blocks_counts_for_the_kernel():
    text = "norm and rotation of q and k, share of the measured copy"
    given = records(ours_norm_rope=1.25)
    assert verdicts(given)[text, "norm-rope-1024"] == ("≥ 0.80", "0.800", "met")
    slow = [r | {"p50_ms": 1.5} if r["case"] == "norm-rope-single-1024-b1" else r for r in given]
    assert verdicts(slow)[text, "norm-rope-1024"] == ("≥ 0.80", "0.667", "missed")
    half = [r for r in given if r["case"] != "norm-rope-single-1024-b1"]
    assert verdicts(half)[text, "norm-rope-1024"] == ("≥ 0.80", "–", "not measured")


def test_what_was_not_timed_is_not_called_met():
    found = verdicts(records(recipe=None, compiled=None, ours_fp8=None, stock=None))
    for (text, _), cells in found.items():
        unknown = "÷" in text
        assert (cells[1:] == ("–", "not measured")) == unknown, text
    said = flux_tables(records(ours_fp8=None))
    assert "FastFlux fp8**, graph, modulation ahead (6 measurements): skipped: it / cannot" in said


def test_the_waterfall_says_what_each_lever_saves():
    # 100 ms, and 10 less with each lever that is added; 1 less alone
    ms = {"ours_none": 100.0}
    for i, lever in enumerate(LEVERS):
        name = lever.replace("-", "_")
        ms[f"ours_only_{name}"] = 99.0 if i else 90.0
        ms[f"ours_to_{name}"] = 90.0 - 10 * i
    said = flux_tables(records(**ms)).split("`levers-512-b1`")[1].split("\n\n")[0]
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in said.splitlines()[2:]]
    assert rows[0] == ["none", "100.00", "", "100.00", ""]
    assert rows[1] == [LEVERS["attention"], "90.00", "10.00", "90.00", "10.00"]
    assert rows[2] == [LEVERS["norm-rope"], "99.00", "1.00", "80.00", "10.00"]
    assert rows[-1] == [LEVERS["graph"], "99.00", "1.00", "40.00", "10.00"]
    assert len(rows) == 1 + len(LEVERS)


def test_tables_show_steps_loops_and_what_fits():
    given = records(ours_loop=2800.0)
    said = flux_tables(given)
    assert "| `loop-1024-b1` | **FastFlux bf16**, 28 steps | 2.800 | 100.00" in said
    line = next(x for x in said.split("`step-1024-b4`")[1].splitlines() if "stock eager" in x)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == ["100.00", "2.80", "2682", "3.35", "1.00", "1.23 %", "4.0"]
    assert "1241 text tokens" in said
    searched = [
        r | {"largest_batch": 13, "largest_batch_by": "memory"}
        if (r["case"], r["variant"]) == ("train-512-b4", "ours-none") else r
        for r in given
    ]  # fmt: skip
    assert "13 pictures fit at the size of `train-512-b4`." in flux_tables(searched)
    late = [r | {"largest_batch_by": "time"} if r["largest_batch"] else r for r in searched]
    assert "13 pictures or more (the search ended by time) fit" in flux_tables(late)


def test_the_report_is_written_where_its_markers_stand(tmp_path, monkeypatch):
    from bench.report import SECTIONS

    monkeypatch.setattr("bench.report.SECTIONS", {"flux": SECTIONS["flux"]})
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated:flux -->\n<!-- /generated:flux -->\n")
    options = ["report", "--readme", str(readme), "--results", str(tmp_path)]

    def report():
        with pytest.raises(SystemExit) as stop:
            bench(options)
        return stop.value.code

    assert report() == 0
    assert "Not measured: no record in" in readme.read_text()
    for one in records():
        append_record(tmp_path / f"{one['suite']}.jsonl", one)
    assert report() == 0
    assert "`train-1024-b2`" in readme.read_text()
    assert "`step-768-b4`" in readme.read_text()
