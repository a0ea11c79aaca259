import pytest

from bench.__main__ import main as bench
from bench.attention_plots import attention_pictures
from bench.attention_report import GOAL_CASES, GOALS, attention_tables
from bench.cases import CASES
from bench.cases import GOALS as GOAL_INPUTS
from bench.records import append_record
from bench.variants import VARIANTS

H100 = "NVIDIA H100 80GB HBM3"
MS = {"ours-auto": 1.0, "sdpa-mask": 2.0, "flex": 1.25, "sdpa-cudnn": 1.0, "sdpa-flash": 1.5}
"""Of every case and pass, unless a test says otherwise."""


def records(case="flux-1024-b1-tree32.8.4", *, run="1", gpu=H100, mask_bytes=65536, **ms):
    """Forward and forward+backward of five variants, milliseconds by name with - as _."""
    times = MS | {name.replace("_", "-"): value for name, value in ms.items()}
    return [
        {
            "case": case,
            "variant": name,
            "label": VARIANTS[name].label,
            "masked": VARIANTS[name].masked,
            "pass": pass_name,
            "status": "ok" if value is not None else "skipped",
            "reason": None if value is not None else "it | cannot",
            "p50_ms": value,
            "flops": 3e11 * (1 if VARIANTS[name].masked else 1.02),
            "bytes": 1e8,
            "peak_bytes": 30 << 20,
            "setup_ms": None,
            "mask_bytes": mask_bytes,
            "roofs": {"copy": 3e12, "matmul": 6e14},
            "nvml": None,
            "gpu": gpu,
            "driver": "580.1",
            "versions": {"torch": "2.11.0", "triton": "3.6.0"},
            "commit": f"c0ffee{run}",
            "run": run,
        }
        for pass_name in ("forward", "forward+backward")
        for name, value in times.items()
    ]


def verdicts(given):
    """{(goal, case): (wanted, measured, verdict)} as the table shows them."""
    lines = [line.strip("|").split("|") for line in attention_tables(given).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 5]
    return {(cell[0], cell[1]): tuple(cell[2:]) for cell in cells[2:]}


def test_the_goals_are_of_cases_there_are():
    assert set(GOAL_CASES) == {case.name for case in GOAL_INPUTS} <= CASES.keys()
    assert len(GOALS) == 3 * 6 + 4
    assert {"sdpa-mask", "flex", "ours-auto"} <= VARIANTS.keys()


def test_without_a_record_of_the_card_no_number_is_claimed():
    assert attention_tables([]) == (
        "Not measured: no record in bench/results/attention.jsonl yet; "
        "`bench/h100.sh attention` takes them on one H100."
    )
    for gpu in (None, "NVIDIA A100-SXM4-80GB"):
        text = attention_tables(records(gpu=gpu))
        assert text.startswith("Not measured: no record of an H100 in")
        assert attention_pictures(records(gpu=gpu)) == []
    untimed = records(ours_auto=None)
    assert attention_tables(untimed).startswith("Not measured")


def test_goals_are_met_at_their_bound_and_missed_beyond():
    at = "flux-1024-b1-tree32.8.4"
    met = verdicts(records(at, ours_auto=1.0, sdpa_mask=1.5, flex=1.3))
    assert met["forward ÷ best unmasked kernel", at] == ("≤ 1.00", "1.000", "met")
    assert met["forward+backward ÷ best unmasked kernel", at] == ("≤ 1.03", "1.000", "met")
    assert met["SDPA with the bool mask ÷ ours, forward", at] == ("≥ 1.50", "1.500", "met")
    assert met["compiled FlexAttention ÷ ours, forward", at] == ("≥ 1.30", "1.300", "met")
    assert met["extra memory for the mask", at] == ("≤ 64 KiB", "64.0 KiB", "met")
    worse = records(at, ours_auto=1.004, sdpa_mask=1.5, flex=1.3, mask_bytes=65600)
    missed = verdicts(worse)
    assert missed["forward ÷ best unmasked kernel", at] == ("≤ 1.00", "1.004", "missed")
    assert missed["forward+backward ÷ best unmasked kernel", at][2] == "met"
    assert missed["SDPA with the bool mask ÷ ours, forward", at][2] == "missed"
    assert missed["compiled FlexAttention ÷ ours, forward+backward", at][2] == "missed"
    assert missed["extra memory for the mask", at][2] == "missed"


def test_the_wanted_numbers_of_each_size():
    found = verdicts(
        [r for size in (512, 1024, 2048) for r in records(f"flux-{size}-b1-tree32.8.4")]
    )
    wanted = {
        "forward ÷ best unmasked kernel": ("≤ 1.05", "≤ 1.00", "≤ 1.00"),
        "forward+backward ÷ best unmasked kernel": ("≤ 1.08", "≤ 1.03", "≤ 1.02"),
        "SDPA with the bool mask ÷ ours, forward": ("≥ 1.50",) * 3,
        "compiled FlexAttention ÷ ours, forward": ("≥ 1.30",) * 3,
        "compiled FlexAttention ÷ ours, forward+backward": ("≥ 1.30",) * 3,
        "extra memory for the mask": ("≤ 64 KiB", "≤ 64 KiB", "≤ 256 KiB"),
    }
    for text, bounds in wanted.items():
        for size, bound in zip((512, 1024, 2048), bounds, strict=True):
            assert found[text, f"flux-{size}-b1-tree32.8.4"][0] == bound


def test_what_was_not_timed_is_not_called_met():
    found = verdicts(records(flex=None, sdpa_cudnn=None, sdpa_flash=None))
    at = "flux-1024-b1-tree32.8.4"
    for text in ("compiled FlexAttention ÷ ours, forward", "forward ÷ best unmasked kernel"):
        assert found[text, at][1:] == ("–", "not measured")
        assert found[text, "flux-512-b1-tree32.8.4"][1:] == ("–", "not measured")
    assert found["SDPA with the bool mask ÷ ours, forward", at][2] == "met"


def test_the_best_unmasked_kernel_is_the_fastest_whichever_it_is():
    at = "flux-1024-b1-tree32.8.4"
    found = verdicts(records(ours_auto=1.0, sdpa_cudnn=1.2, sdpa_flash=0.8))
    assert found["forward ÷ best unmasked kernel", at][1:] == ("1.250", "missed")
    found = verdicts(records(ours_auto=1.0, sdpa_mask=0.1, flex=0.2))  # masked ones do not count
    assert found["forward ÷ best unmasked kernel", at][1:] == ("1.000", "met")


def test_five_levels_are_compared_with_three_of_the_same_run():
    three, five = "flux-1024-b1-tree32.8.4", "flux-1024-b1-tree32.8.4.2.1"
    more = [{**r, "flops": 1.1 * r["flops"]} for r in records(five, ours_auto=1.1)]
    found = verdicts([*records(three, ours_auto=1.0), *more])
    assert found["five levels ÷ three levels, forward", five] == ("≤ 1.03", "1.100", "missed")
    by_pair = found["five levels ÷ three levels, forward, per allowed pair", five]
    assert by_pair == ("≤ 1.03", "1.000", "met")
    apart = verdicts([*records(three, run="1"), *records(five, run="2")])
    assert apart["five levels ÷ three levels, forward", five][2] == "not measured"


def test_the_latest_run_of_a_case_in_which_ours_was_timed_counts():
    given = [
        *records(run="1", ours_auto=3.0),
        *records(run="2", ours_auto=0.7),
        *records(run="3", ours_auto=None),
        *records(run="4", gpu="NVIDIA H200", ours_auto=0.1),
    ]
    text = attention_tables(given)
    at = "flux-1024-b1-tree32.8.4"
    assert verdicts(given)["forward ÷ best unmasked kernel", at][1] == "0.700"
    assert "Run 2:" in text
    assert "c0ffee2" in text
    assert not any(f"c0ffee{run}" in text for run in "134")


def test_tables_show_times_roof_memory_and_who_was_left_out():
    text = attention_tables([*records(flex=None), *records("flux-768-b1-tree16", ours_auto=0.5)])
    lines = [" ".join(line.split()) for line in text.splitlines()]
    # 3e11 FLOP in 1 ms are half of a roof of 6e14 a second
    ours = "1.000 | 50 | 1.00 | 30.0 | 1.000 | 50 | 1.00 | 30.0 | 64.0 | – |"
    assert f"| **ours, auto** | {ours}" in lines
    assert any(line.startswith("| *SDPA flash, unmasked* | 1.500 | 34 | 1.50 |") for line in lines)
    assert "- FlexAttention, compiled (2 measurements): skipped: it / cannot" in lines
    summary = "| flux-768-b1-tree16 | 0.500 | 0.50 | 4.00 | 2.50 | 0.500 | 0.50 | 4.00 | 2.50 |"
    assert summary in lines
    assert "copy 3.00 TB/s, matmul 600 TFLOP/s; torch 2.11.0, triton 3.6.0" in text


@pytest.fixture
def readme(tmp_path):
    """A README with both sections, and results of the quality suite only."""
    marks = ["quality", "attention"]
    text = "".join(f"<!-- generated:{m} -->\nold\n<!-- /generated:{m} -->\n" for m in marks)
    (tmp_path / "README.md").write_text(f"{text}end\n")
    for variant in ("parser_clean", "parser_noise", "caption", "reconstruction"):
        record = {"variant": variant, "run": "1", "n": 1, "seeds": 1, "steps": 1, "metrics": {}}
        more = {"decoder": "d", "versions": {}, "commit": "c"}
        append_record(tmp_path / "quality.jsonl", record | more)
    return tmp_path / "README.md"


def report(readme, *rest):
    where = ["--readme", str(readme), "--results", str(readme.parent)]
    with pytest.raises(SystemExit) as stop:
        bench(["report", *where, *rest])
    return stop.value.code


def test_report_says_not_measured_where_there_are_no_results(readme):
    assert report(readme, "--check") == 1
    assert report(readme) == 0
    assert "\nNot measured: no record in" in readme.read_text()
    assert report(readme, "--check") == 0
    assert not (readme.parent / "docs").exists()


def test_report_leaves_a_readme_without_that_section_alone(readme):
    quality = readme.read_text().partition("<!-- generated:attention")[0]
    readme.write_text(quality)
    assert report(readme) == 0
    assert "attention" not in readme.read_text()
    readme.write_text(f"{quality}<!-- generated:attention -->\n")
    assert report(readme) == 2


def test_report_draws_the_records_and_notices_when_tables_or_pictures_are_stale(readme, capsys):
    for record in records():
        append_record(readme.parent / "attention.jsonl", record)
    assert report(readme) == 0
    docs = readme.parent / "docs"
    drawn = {path.name: path.read_bytes() for path in docs.iterdir()}
    assert drawn.keys() == {"attention_bars.svg", "attention_roofline.svg"}
    for name in drawn:
        assert f"](docs/{name})" in readme.read_text()
    assert b"ours, auto" in drawn["attention_bars.svg"]
    assert report(readme, "--check") == 0
    assert report(readme) == 0
    assert drawn == {path.name: path.read_bytes() for path in docs.iterdir()}  # bit for bit

    (docs / "attention_bars.svg").unlink()
    capsys.readouterr()
    assert report(readme, "--check") == 1
    said = capsys.readouterr().out
    assert "attention_bars.svg" in said
    assert "roofline" not in said
    assert report(readme) == 0

    for record in records(run="2", ours_auto=0.9):
        append_record(readme.parent / "attention.jsonl", record)
    assert report(readme, "--check") == 1
    said = capsys.readouterr().out
    assert "attention_bars.svg" in said
    assert "README.md" in said
    assert report(readme) == 0
    assert report(readme, "--check") == 0
    assert (docs / "attention_bars.svg").read_bytes() != drawn["attention_bars.svg"]
