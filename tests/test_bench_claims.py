"""``bench claims``: verdicts from records, intervals, the page."""

import math

import pytest
import torch

from bench.claims import SHIPPED
from bench.claims_interval import Interval, Sample, interval, less
from bench.claims_list import CLAIMS, EDITING, METRICS, VARIANTS, Contrast, overall
from bench.claims_report import answers, claims_pages, together, verdict_lines
from bench.claims_training import TRAINED
from bench.records import append_record
from bench.report import NEEDED

from .test_bench import run as bench

SCENES = 40
RATE = dict.fromkeys(("miou", "recall", "color", "shape"), 0.5)


def sample(rates, spread=0.0, seed=0):
    """A rate for each seed, its scenes the same or spread around it."""
    noise = torch.randn(SCENES, generator=torch.Generator().manual_seed(seed)).double()
    noise = spread * (noise - noise.mean())
    top = torch.stack([rate + noise for rate in rates])
    return Sample(top, torch.ones_like(top))


def test_few_seeds_have_students_interval():
    found = interval(sample([0.5, 0.6, 0.7]))
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5)
    ten = interval(sample([0.5, 0.7] * 5))
    assert ten.half == pytest.approx(2.262 * 0.1054 / 10**0.5, rel=1e-3)
    assert interval(sample([0.5, 0.7] * 10)).half < ten.half


def test_equal_seeds_leave_the_scenes():
    found = interval(sample([0.5] * 3, spread=0.3))
    assert found.half == pytest.approx(1.96 * 0.3 / SCENES**0.5, rel=0.15)


def test_both_add_up_in_squares():
    apart = [interval(sample([0.4, 0.5, 0.6])), interval(sample([0.5] * 3, spread=0.5))]
    both = interval(sample([0.4, 0.5, 0.6], spread=0.5))
    assert both.half == pytest.approx(math.hypot(*(one.half for one in apart)), rel=0.02)


def test_what_both_variants_share_is_no_reason_to_doubt():
    first, second = sample([0.4, 0.7, 1.0], spread=0.5), sample([0.3, 0.6, 0.9], spread=0.5)
    found = interval(first, second)
    assert found.mean == pytest.approx(0.1)
    assert found.half < 1e-9
    assert interval(first).half > 0.3
    other = interval(first, sample([0.3, 0.6, 0.9], spread=0.5, seed=1))
    assert other.half > 0.1


def test_rates_are_sums_by_sums():
    top = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(2, -1)
    bottom = torch.tensor([[1.0, 3.0]], dtype=torch.float64).expand(2, -1)
    assert interval(Sample(top, bottom)).mean == 0.75
    assert interval(Sample(top, bottom), level=0.25).mean == 0.5
    assert interval(Sample(top, 0 * bottom)) is None


def test_a_single_seed_decides_nothing():
    found = interval(sample([0.9], spread=0.01))
    assert (found.low, found.high) == (-math.inf, math.inf)
    for contrast in (c for claim in CLAIMS.values() for c in claim.contrasts):
        assert contrast.verdict(found.low, found.high, 0.05) == "undecided"


def test_differences_of_what_was_measured_apart():
    found = less(Interval(0.8, 0.77, 0.84), Interval(0.3, 0.26, 0.33))
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.5 - math.hypot(0.03, 0.03))
    assert found.high == pytest.approx(0.5 + math.hypot(0.04, 0.04))


@pytest.mark.parametrize(
    ("sense", "low", "high", "verdict"),
    [
        ("above", 0.01, 0.3, "confirmed"),
        ("above", 0.01, 0.02, "confirmed"),
        ("above", -0.01, 0.04, "not confirmed"),
        ("above", -0.2, -0.1, "not confirmed"),
        ("above", -0.01, 0.3, "undecided"),
        ("below", -0.3, -0.01, "confirmed"),
        ("below", -0.04, 0.3, "not confirmed"),
        ("below", -0.3, 0.01, "undecided"),
        ("near", -0.04, 0.04, "confirmed"),
        ("near", -0.04, 0.06, "undecided"),
        ("near", 0.06, 0.2, "not confirmed"),
        ("near", -0.2, -0.06, "not confirmed"),
    ],
)
def test_intervals_make_verdicts(sense, low, high, verdict):
    assert Contrast("", "miou", "base", "no_rope", sense=sense).verdict(low, high, 0.05) == verdict


def test_a_claim_is_what_its_worst_part_is():
    assert overall(["confirmed", "confirmed"]) == "confirmed"
    assert overall(["confirmed", "undecided"]) == "undecided"
    assert overall(["undecided", "not measured"]) == "not measured"
    assert overall(["confirmed", "not confirmed", "undecided"]) == "not confirmed"


def test_the_list_of_claims_is_whole():
    asked = {variant for claim in CLAIMS.values() for variant in claim.variants}
    assert asked | set(EDITING.variants) == VARIANTS.keys()
    assert TRAINED.keys() < asked
    assert SHIPPED.keys() == {n for n, c in CLAIMS.items() if not TRAINED.keys() & set(c.variants)}
    for claim in (*CLAIMS.values(), EDITING):
        assert set(claim.metrics) <= METRICS.keys()
        assert claim.contrasts
        for contrast in claim.contrasts:
            assert contrast.metric in claim.metrics
            assert {contrast.first, contrast.second or contrast.first} <= set(claim.variants)
            assert contrast.sense != "near" or contrast.margin > 0


def record(variant, seed, rates, steps=600, **changed):
    """Of one variant and seed: each metric the same on every scene."""
    scenes = {}
    for name, rate in rates.items():
        metric = METRICS[name]
        below = scenes.setdefault(metric.bottom, [2.0] * 4)
        scenes[metric.top] = [rate * value for value in below]
    setting = {"decoder": "d1", "reader": "r1", "scenes": 4, "denoise": 10}
    return {
        "suite": "claims", "variant": variant, "seed": seed, "scenes": scenes,
        "setting": setting | {"steps": steps, "batch": 16}, "gpu": None, "processor": "x86_64",
        "versions": {"torch": "2.13.0"}, "commit": "c0ffee", "run": "1",
    } | changed  # fmt: skip


def rope(base, without, **changed):
    """Records of the claim "rope": rates of layout of each seed."""
    return [
        record(variant, seed, RATE | {"miou": rate}, **changed)
        for variant, rates in (("base", base), ("no_rope", without))
        for seed, rate in enumerate(rates)
    ]


@pytest.mark.parametrize(
    ("base", "without", "verdict"),
    [
        ([0.70, 0.72, 0.74], [0.50, 0.51, 0.55], "confirmed"),
        ([0.70, 0.72, 0.74], [0.70, 0.72, 0.74], "not confirmed"),
        ([0.50, 0.51, 0.55], [0.70, 0.72, 0.74], "not confirmed"),
        ([0.70, 0.72, 0.60], [0.50, 0.71, 0.55], "undecided"),
        ([0.70], [0.50], "undecided"),
    ],
)
def test_a_lead_comes_to_every_verdict(base, without, verdict):
    assert answers(rope(base, without))["rope"].verdict == verdict


@pytest.mark.parametrize(
    ("few", "many", "verdict"),
    [
        ([0.70, 0.71, 0.72], [0.72, 0.73, 0.74], "confirmed"),
        ([0.10, 0.11, 0.12], [0.20, 0.21, 0.22], "not confirmed"),
        ([0.30, 0.90, 0.60], [0.70, 0.50, 0.60], "undecided"),
        # what has learned nothing is not alike for that
        ([0.01, 0.03, 0.02], [0.03, 0.01, 0.02], "undecided"),
    ],
)
def test_likeness_comes_to_every_verdict(few, many, verdict):
    records = [
        record(variant, seed, RATE | {"miou": rate})
        for variant, rates in (("positions_64", few), ("positions_128", many))
        for seed, rate in enumerate(rates)
    ]
    assert answers(records)["positions"].verdict == verdict


@pytest.mark.parametrize(
    ("with_it", "without", "verdict"),
    [(24.0, 6.0, "confirmed"), (24.0, 20.0, "not confirmed"), (8.0, 6.0, "not confirmed")],
)
def test_collapse_is_that_of_the_positions(with_it, without, verdict):
    records = [
        record(variant, seed, {"mean_cosine": 0.1, "rank": rank + 0.1 * seed, "miou": 0.7})
        for variant, rank in (("base", with_it), ("no_penalty", without))
        for seed in range(3)
    ]
    found = answers(records)["penalty"]
    assert found.verdict == verdict
    assert found.findings[0].row()[1:3] == ["< 14", f"{without + 0.1:.1f} [{without - 0.1:.1f}, "
                                            f"{without + 0.3:.1f}]"]  # fmt: skip


def test_more_seeds_add_up():
    first = rope([0.70, 0.60, 0.65], [0.62, 0.58, 0.52])
    more = [r for r in rope([0] * 3 + [0.66, 0.67, 0.64], [0] * 3 + [0.55, 0.58, 0.54])
            if r["seed"] > 2]  # fmt: skip
    few, many = (answers(found)["rope"].findings[0].value for found in (first, first + more))
    assert many.half < few.half
    assert few.mean == pytest.approx(0.0767, abs=1e-3)
    assert "Seeds: 6;" in answers(first + more)["rope"].about


def test_a_seed_of_one_variant_alone_is_not_compared():
    records = rope([0.7, 0.7, 0.7, 0.1], [0.5, 0.5, 0.5])
    assert answers(records)["rope"].findings[0].value.mean == pytest.approx(0.2)
    assert "Seeds: 3 to 4;" in answers(records)["rope"].about


def test_runs_of_another_setting_are_not_mixed():
    old, new = rope([0.7] * 3, [0.5] * 3), rope([0.6] * 3, [0.3] * 3, steps=900)
    mean = lambda records: answers(records)["rope"].findings[0].value.mean
    assert mean(old + new) == pytest.approx(0.3)
    assert mean(new + old) == pytest.approx(0.2)
    assert mean([*old, *new, *old[:1]]) == pytest.approx(0.2)
    # cut off before it had every variant
    assert mean(old + new[:3]) == pytest.approx(0.2)
    # measured again
    assert mean(old + rope([0.9], [0.5])) == pytest.approx(0.8 / 3)
    assert together(new[:3], CLAIMS["rope"]) == {}


def edits(variant, success, half=0.02, **changed):
    metrics = {
        name: {"mean": value, "low": value - half, "high": value + half}
        for name, value in (("success", success), ("preserved", 0.9), ("kept", 0.95))
    }
    return {
        "suite": "edit", "part": "test", "variant": variant, "step": 0, "n": 512, "scenes": 512,
        "seeds": 3, "steps": 20, "metrics": metrics, "operations": {}, "decoder": "d1",
        "reader": "r1", "versions": {"torch": "2.13.0"}, "commit": "c0ffee",
        "editor": "e1" if variant == "shipped" else None, "mode": "delta",
    } | changed  # fmt: skip


@pytest.mark.parametrize(
    ("success", "half", "verdict"),
    [(0.8, 0.02, "confirmed"), (0.3, 0.02, "not confirmed"), (0.5, 0.02, "undecided"),
     (0.02, 0.02, "not confirmed")],
)  # fmt: skip
def test_editing_is_answered_by_its_own_suite(success, half, verdict):
    found = answers([edits("source", 0.01), edits("shipped", success, half)])["editing"]
    assert found.verdict == verdict
    assert "512 edits, 3 noise seeds" in found.about
    assert found.rows[0] == ["the shipped editor", f"{success:.3f} ±0.020", "0.900 ±0.020",
                             "0.950 ±0.020"]  # fmt: skip


def test_what_was_not_measured_says_so():
    found = answers([edits("source", 0.01)])
    assert {answer.verdict for answer in found.values()} == {"not measured"}
    assert claims_pages([edits("source", 0.01)]) == []
    assert verdict_lines([], ["rope"]) == [f"rope: not measured: {CLAIMS['rope'].text}"]


def test_the_page_shows_negative_results_as_they_are(tmp_path):
    (page,) = claims_pages(rope([0.5, 0.51, 0.52], [0.6, 0.63, 0.62]))
    squeezed = " ".join(page.text.split())
    assert "## rope: not confirmed" in squeezed
    assert "| the mask alone, no 3-D RoPE | 0.617 ±" in squeezed
    assert "| RoPE adds to the mask | difference > 0 | -0.107 [" in squeezed
    assert "4 scenes, trained for 600 steps of 16 pictures, 10 steps of denoising" in squeezed
    assert "| 64 positions are as good as 128 | positions | not measured |" in squeezed
    assert all(f"## {name}: " in squeezed for name in (*CLAIMS, "editing"))
    assert not page.is_current(tmp_path / "docs")
    assert page.write(tmp_path / "docs") == tmp_path / "docs" / "claims.md"
    assert page.is_current(tmp_path / "docs")
    (other,) = claims_pages(rope([0.5, 0.51, 0.53], [0.6, 0.63, 0.62]))
    assert not other.is_current(tmp_path / "docs")


def test_report_writes_the_page(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("<!-- generated:quality -->\n<!-- /generated:quality -->\n")
    for variant in NEEDED:
        metrics = {"miou": {"mean": 0.7, "low": 0.6, "high": 0.8}}
        quality = {"variant": variant, "metrics": metrics, "decoder": "d1", "run": "1"}
        about = {"n": 4, "seeds": 3, "steps": 20, "versions": {}, "commit": "c0ffee"}
        append_record(results / "quality.jsonl", quality | about)
    options = {"--readme": readme, "--results": results}
    assert bench("report", options)[0] == 0
    assert not (tmp_path / "docs").exists()
    for one in rope([0.7, 0.71, 0.72], [0.5, 0.52, 0.51]):
        append_record(results / "claims.jsonl", one)
    code, said = bench("report", options, "--check")
    assert code == 1
    assert "claims.md is stale" in said
    assert not (tmp_path / "docs").exists()
    append_record(results / "edit.jsonl", edits("shipped", 0.8))
    append_record(results / "edit.jsonl", edits("source", 0.1))
    assert bench("report", options)[0] == 0
    page = (tmp_path / "docs" / "claims.md").read_text()
    assert "## rope: confirmed" in page
    assert "## editing: confirmed" in page
    assert bench("report", options, "--check")[0] == 0
