"""Goals and tables of ``bench training`` and ``bench scaling``, from records alone."""

import pytest

from bench.sides import GPU
from bench.training_cases import GOALS as CASES
from bench.training_report import GOALS, TRAINER, training_tables
from bench.training_step import PARTS
from bench.training_variants import VARIANTS
from sda_fast.cost import flux_flops

CARD = f"NVIDIA {GPU} 80GB HBM3"
ROOF = 800e12
ABOUT = {
    "pass": "forward+backward", "suite": "training", "driver": "580", "nvml": None, "run": "1",
    "roofs": {"copy": 3e12, "matmul": ROOF}, "versions": {"torch": "2"}, "commit": "c0ffee",
}  # fmt: skip


def record(case, variant, ms, gpu=CARD, **more):
    flux = case.flux
    flops = flux.batch * flux_flops(flux.config, flux.num_txt, flux.num_img, backward=True)
    return ABOUT | {
        "case": case.name, "variant": variant.name, "label": variant.label, "gpu": gpu,
        "status": "ok" if ms else "failed", "reason": None if ms else "it | cannot", "p50_ms": ms,
        "pictures_per_s": ms and 1e3 * flux.batch / ms, "mfu": ms and flops / ms * 1e3 / ROOF,
        "peak_bytes": 50 * 2**30, "held_bytes": 25 * 2**30, "error": 0.0123,
        "parts_ms": ms and dict.fromkeys(PARTS, ms / len(PARTS)),
    } | more  # fmt: skip


def trainer(wait=0.004, stall=0.1, **more):
    case = CASES[2]
    return ABOUT | {
        "case": case.name, "variant": TRAINER, "label": "the trainer", "gpu": CARD, "status": "ok",
        "reason": None, "p50_ms": 500.0, "pictures_per_s": 16.0, "data_wait": wait, "mfu": 0.58,
        "memory_gib": 71.5, "checkpoint_stall_s": stall,
        "checkpoint_stall_steps": stall and 2 * stall,
    } | more  # fmt: skip


def steps(gpu=CARD, **ms):
    """Of both cases and every variant; milliseconds by variant, 500 if not given."""
    return [
        record(case, variant, ms.get(variant.name.replace("-", "_"), 500.0), gpu)
        for case in CASES[:2]
        for variant in VARIANTS.values()
    ]


def scaled(ranks, **more):
    return {
        "suite": "scaling", "status": "ok", "ranks": ranks, "sent_bytes": 9.0e6 * (ranks - 1),
        "sent_model": 8.9344e6 * (ranks - 1), "reduce_ms": 150.0, "loopback_ms": 11.0,
        "rank_alone_ms": [200.0] * ranks, "rank_step_ms": [280.0] * ranks,
        "overlap": 0.47 if ranks > 1 else None, "overlap_model": 0.44 if ranks > 1 else None,
        "gradient_bytes": 4467200, "bucket_bytes": [1] * 8, "run": "7", "processor": "x86_64",
        "cores": 2, "torch": "2.13", "commit": "c0ffee", "layer_ms": 100.0, "link_ms": 400.0,
    } | more  # fmt: skip


def verdicts(given):
    lines = [line.strip("|").split("|") for line in training_tables(given).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 5]
    return {(cell[0], cell[1]): tuple(cell[2:]) for cell in cells[2 : 2 + len(GOALS)]}


def test_without_a_record_of_the_card_no_number_is_claimed():
    assert training_tables([]) == (
        "Not measured: no record in bench/results/training.jsonl yet; "
        "`bench/h100.sh training` takes them on one H100.\n\n"
        "Ranks: not measured, no record in bench/results/scaling.jsonl yet; "
        "`python -m bench scaling` takes them on any machine."
    )
    other = training_tables([*steps(gpu="NVIDIA A100"), scaled(2)])
    assert other.startswith("Not measured: no record of an H100 in bench/results/training.jsonl")
    assert "| 2 " in other


def test_goals_are_those_that_are_wanted_and_what_became_of_them():
    found = verdicts([*steps(ours=480.0, ours_attention_out=600.0, stock=970.0), trainer()])
    small, large, run = (case.name for case in CASES)
    lead, roof = (
        "a whole step: stock ÷ ours",
        "FLUX forward + dX, share of the measured matmul roof",
    )
    mfu = 100 * record(CASES[0], VARIANTS["ours"], 480.0)["mfu"]
    assert found == {
        (lead, small): ("≥ 2.0", "2.02", "met"),
        (lead, large): ("≥ 1.7", "2.02", "met"),
        (roof, small): ("≥ 55 %", f"{mfu:.1f} %", "met"),
        ("share of the time that waits for data", run): ("≤ 2 %", "0.4 %", "met"),
        ("a checkpoint stops training for", run): ("≤ 1 steps", "0.2 steps", "met"),
    }


@pytest.mark.parametrize(
    ("records", "verdict"),
    [
        (steps(stock=None), ["not measured"] * 2 + ["met"] + ["not measured"] * 2),
        (steps(ours=700.0, ours_attention_out=650.0, stock=1000.0),
         ["missed"] * 3 + ["not measured"] * 2),
        ([trainer(0.03, 0.7)], ["not measured"] * 3 + ["missed"] * 2),
        ([*steps(stock=2000.0), trainer(None, None)], ["met"] * 3 + ["not measured"] * 2),
    ],
)  # fmt: skip
def test_what_was_missed_and_what_was_not_measured_is_said(records, verdict):
    assert [cells[-1] for cells in verdicts(records).values()] == verdict


def test_tables_show_each_way_and_where_its_time_goes():
    text = training_tables([*steps(stock_compiled=None), trainer(), scaled(1), scaled(2)])
    assert text.count("**ours**, all but attention recomputed") == 4
    assert text.count("71.4 (14 %)") == 2 * 3 * len(PARTS)
    assert "| 50.0 " in text
    assert "| 75.0 " in text
    assert "- that, blocks and adapter compiled (2 measurements): failed: it / cannot" in text
    assert "| the trainer " in text
    assert "| 58 % " in text
    assert "| 0.40 %" in text
    assert "matmul 800 TFLOP/s" in text


def test_ranks_stand_beside_the_model():
    old, lost = scaled(2, sent_bytes=1.0), scaled(4, status="failed")
    text = training_tables([old, lost, scaled(1, sent_bytes=0.0), scaled(2, run="8")])
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    one, two = (next(row for row in rows if row[0] == ranks) for ranks in ("1", "2"))
    assert one[1:] == ["0.000", "0.000", "–", "200", "–", "280", "–", "–"]
    assert two[1:] == ["9.000", "8.934", "1.007", "200, 200", "150", "280, 280", "0.47", "0.44"]
    assert not any(row[0] == "4" for row in rows)
    assert "4.47 MB of gradient in 8 buckets" in text
    assert "Run 7: x86_64, 2 cores" in text
    assert "run 8: x86_64" in text
    assert "not available" in training_tables([scaled(2, sent_bytes=None)])
