import json
import random
import warnings

import pytest
import torch

from bench.__main__ import main as bench
from bench.attention import Attention
from bench.cases import CASES, FLUX, GOALS, SMALL, Case, select
from bench.check import NAMES, yardstick
from bench.cost import allowed_pairs, attention_bytes, attention_flops
from bench.measure import Deadline, attention_step
from bench.records import read_records
from bench.suite import PASSES, Unavailable, run
from bench.variants import VARIANTS, Ready, Variant, dense_mask, mask_mod
from sda_fast import reference
from sda_fast.hierarchy import RULES, Hierarchy

from .test_bench_measure import bench_small

CPU = torch.device("cpu")
TINY = Case("tiny", 4, 4, Hierarchy((2, 1)), heads=2, head_dim=16, dtype=torch.float32)


def random_case(rng):
    levels = rng.randint(1, 5)
    tree = Hierarchy((rng.randint(1, 4), *(rng.randint(0, 3) for _ in range(levels - 1))))
    h, w = rng.randint(1, 19), rng.randint(1, 19)
    return Case("any", h, w, tree, rule=rng.choice(RULES), extra_text=rng.randint(0, 5))


def test_cases_are_those_the_goals_speak_of():
    assert [case.name for case in GOALS] == [
        "flux-1024-b1-tree32.8.4", "flux-2048-b1-tree32.8.4", "flux-512-b1-tree32.8.4",
        "flux-1024-b1-tree32.8.4.2.1",
    ]  # fmt: skip
    assert {(c.heads, c.head_dim, c.dtype, c.rule) for c in FLUX} == {
        (24, 128, torch.bfloat16, "overlap")
    }
    grids = {case.picture: (case.h, case.w) for case in FLUX}
    assert grids == {
        "flux-512": (32, 32), "flux-768": (48, 48), "flux-1024": (64, 64),
        "flux-2048": (128, 128), "flux-720x1280": (45, 80),
    }  # fmt: skip
    assert {case.batch for case in FLUX} == {1, 4, 8}
    assert len(FLUX) == 5 * 3 * 3
    assert len(CASES) == len(FLUX) + len(SMALL)
    assert GOALS[3].txt_len == 512
    assert [case.seq_len for case in GOALS[:3]] == [4224, 16512, 1152]
    assert CASES["small-9x7-b2-tree5.0.1-text3"].seq_len == 5 + 16 + 3 + 63


def test_cases_are_chosen_by_group_name_and_pattern():
    assert select("goals") == list(GOALS)
    name = "flux-720x1280-b4-tree16"
    assert select(f"{name},{name}") == [CASES[name]]
    assert {c.name for c in select("flux-768-*16,small")} == {
        "flux-768-b1-tree16", "flux-768-b4-tree16", "flux-768-b8-tree16",
        *(c.name for c in SMALL),
    }  # fmt: skip
    with pytest.raises(ValueError, match="got 'flux-1025'"):
        select("goals,flux-1025")


def test_inputs_are_random_and_the_same_each_time():
    first, second = TINY.inputs(CPU), TINY.inputs(CPU)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))
    assert all(t.shape == (1, 22, 2, 16) and t.dtype == torch.float32 for t in first)
    assert 0.9 < torch.stack(first).std() < 1.1
    assert not first[0].equal(first[1])


def test_allowed_pairs_are_those_of_the_mask():
    rng = random.Random(0)
    seen = set()
    for _ in range(60):
        case = random_case(rng)
        mask = case.tree.attention_mask(case.h, case.w, case.rule, case.extra_text)
        assert allowed_pairs(case) == mask.sum(), case
        seen.add(case.rule)
    assert seen == set(RULES)


def test_flops_and_bytes_by_hand():
    case = Case("x", 1, 3, Hierarchy((2,)), batch=3, heads=5, head_dim=16, dtype=torch.bfloat16)
    forward = 4 * (5 * 5) * 16 * 5 * 3
    assert attention_flops(case, masked=False, backward=False) == forward
    assert attention_flops(case, masked=False, backward=True) == 3.5 * forward
    flux = CASES["flux-512-b1-tree32.8.4"]
    left_out = 1024 * (8 * 3 + 4 * 15)  # of 4 and of 16 nodes a patch sees one
    pairs = 1152**2 - left_out
    assert attention_flops(flux, masked=True, backward=False) == 4 * pairs * 128 * 24
    assert attention_bytes(case, backward=False) == 4 * (3 * 5 * 5 * 16 * 2)
    assert attention_bytes(case, backward=True) == 8 * (3 * 5 * 5 * 16 * 2)


def test_the_rule_that_flex_attention_is_given_is_the_mask():
    rng = random.Random(1)
    for _ in range(40):
        case = random_case(rng)
        if case.rule != "overlap":
            with pytest.raises(Unavailable, match=case.rule):
                mask_mod(case, CPU)
            continue
        q, k = torch.meshgrid(*[torch.arange(case.seq_len)] * 2, indexing="ij")
        zero = torch.zeros(())
        allowed = mask_mod(case, CPU)(zero, zero, q, k)
        assert allowed.equal(dense_mask(case, CPU)[0, 0]), case
    dense_mask.cache_clear()


def results_of(case, dtype=None):
    """Inputs, and out, dq, dk, dv of the reference in their dtype or another."""
    inputs = case.inputs(CPU)
    cast = [t.to(dtype) for t in inputs] if dtype else inputs
    attend = lambda q, k, v: reference.hierarchical_attention(
        q, k, v, case.tree, case.h, case.w, case.rule
    )
    return inputs, list(attention_step(attend, cast, backward=True)())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_is_the_reference_and_takes_what_is_rounded(dtype):
    case = Case("x", 5, 6, Hierarchy((3, 2)), batch=2, heads=3, head_dim=16, dtype=dtype)
    inputs, exact = results_of(case, torch.float64)
    ruler = yardstick(inputs, dense_mask(case, CPU)[0, 0])
    for name, result in zip(NAMES, exact, strict=True):
        assert torch.allclose(ruler.exact[name], result, rtol=1e-12, atol=1e-12)
    assert ruler.faults(exact) == []
    assert ruler.faults([t.to(dtype) for t in exact]) == []
    assert ruler.faults([t.to(dtype) for t in exact[:1]]) == []
    heads_first = [t.transpose(1, 2) for t in inputs]
    mask = dense_mask(case, CPU)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*heads_first[:3], attn_mask=mask)
    assert ruler.faults([sdpa.transpose(1, 2)]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_yardstick_notices_what_is_wrong(dtype):
    case = Case("x", 5, 6, Hierarchy((3, 2)), heads=3, head_dim=16, dtype=dtype)
    inputs, exact = results_of(case, torch.float64)
    ruler = yardstick(inputs, dense_mask(case, CPU)[0, 0])
    for place, name in enumerate(NAMES):
        lost, scaled, cut = (t.clone() for t in [exact[place]] * 3)
        lost[0, -1, 2, 7] = float("nan")
        scaled *= 1.05
        for wrong, told in ((lost, "nan"), (scaled, "off by"), (cut[:, 1:], "is [1, 40")):
            faults = ruler.faults([*exact[:place], wrong.to(dtype), *exact[place + 1 :]])
            assert len(faults) == 1, (name, told)
            assert faults[0].startswith(name)
            assert told in faults[0]
    unmasked = yardstick(inputs, None).exact["out"]
    assert ruler.faults([unmasked.to(dtype)])


def variant(name, attend=None, error=None, masked=True):
    """A variant that attends, or raises at its first call; by default it is right."""

    def prepare(case, q):
        if isinstance(error, Unavailable):
            raise error

        def right(q, k, v):
            if error is not None:
                raise error
            mask = dense_mask(case, q.device) if masked else None
            out = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask
            )
            return out.transpose(1, 2)

        return Ready(attend or right, 7, 0.5)

    return Variant(name, name.title(), masked, prepare, gpu=False)


def measured(*variants, case=TINY, **options):
    suite = Attention(variants, CPU, reps=3, about={"run": "now"}, **options)
    records = list(suite.measure(case))
    assert [r["pass"] for r in records] == [n for n in PASSES for _ in variants]
    json.dumps(records, allow_nan=False)
    return {(r["variant"], r["pass"]): r for r in records}


def test_records_hold_what_was_measured():
    found = measured(variant("right"), variant("free", masked=False))
    assert len(found) == 4
    for (name, pass_name), record in found.items():
        assert record["status"] == "ok"
        assert record["reason"] is None
        assert 0 < record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
        assert record["reps"] == 3
        backward = pass_name == "forward+backward"
        assert record["flops"] == attention_flops(TINY, name == "right", backward)
        assert record["bytes"] == attention_bytes(TINY, backward)
        assert (record["mask_bytes"], record["setup_ms"]) == (7, 0.5)
        assert (record["case"], record["label"], record["run"]) == (TINY.name, name.title(), "now")
        assert not record["graph"]
        assert record["peak_bytes"] is None
        assert record["nvml"] is None


def test_who_is_wrong_is_not_timed():
    """An out without the mask, and a right out whose gradient is not."""
    ignores = variant("ignores", lambda q, k, v: variant("", masked=False).prepare(
        TINY, q).attend(q, k, v))  # fmt: skip
    detached = variant("detached", lambda q, k, v: variant("").prepare(
        TINY, q).attend(q, k.detach() + 0 * k, v))  # fmt: skip
    found = measured(ignores, detached)
    for pass_name in PASSES:
        assert found["ignores", pass_name]["status"] == "failed"
        assert "wrong: out is off by" in found["ignores", pass_name]["reason"]
        assert found["ignores", pass_name]["p50_ms"] is None
    assert found["detached", "forward"]["status"] == "ok"
    assert found["detached", "forward+backward"]["status"] == "failed"
    assert "dk is off by" in found["detached", "forward+backward"]["reason"]
    assert "dq" not in found["detached", "forward+backward"]["reason"]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (Unavailable("not on this card"), "skipped", "not on this card"),
        (ValueError("D must be 64"), "skipped", "D must be 64"),
        (NotImplementedError(), "skipped", "NotImplementedError"),
        (RuntimeError("No available\n  kernel"), "skipped", "No available kernel"),
        (torch.OutOfMemoryError("tried 80 GiB"), "failed", "out of memory: tried 80 GiB"),
        (AssertionError("layout"), "failed", "AssertionError: layout"),
    ],
)
def test_who_cannot_is_recorded_with_the_reason(error, status, says):
    found = measured(variant("broken", error=error), variant("right"))
    for pass_name in PASSES:
        assert found["broken", pass_name]["status"] == status
        assert says in found["broken", pass_name]["reason"]
        assert found["broken", pass_name]["reps"] == 0
        assert found["right", pass_name]["status"] == "ok"


def test_what_torch_warns_of_is_part_of_the_reason():
    def refuses(q, k, v):
        warnings.warn("Flash does not support a mask", stacklevel=1)
        raise RuntimeError("No available kernel")

    reason = measured(variant("flash", refuses))["flash", "forward"]["reason"]
    assert reason == "No available kernel; Flash does not support a mask"


def test_a_variant_for_gpus_is_skipped_without_being_set_up():
    def prepare(case, q):
        raise AssertionError

    found = measured(Variant("gpu", "", True, prepare))
    assert found["gpu", "forward"]["reason"] == "it needs a CUDA device"


def test_near_the_limit_nothing_more_is_set_up(tmp_path, capsys):
    late = {"deadline": Deadline.after(1), "reserve_s": 100}
    record = measured(variant("right"), **late)["right", "forward"]
    assert (record["status"], record["reason"]) == ("skipped", "no time was left")
    suite = Attention([variant("right")], CPU, 3, **late)
    assert run(suite, [TINY], tmp_path / "a.jsonl") == []
    assert f"no time left for {TINY.name}" in capsys.readouterr().out
    assert not (tmp_path / "a.jsonl").exists()


def test_a_lost_device_ends_the_run_and_what_was_measured_stays(tmp_path, monkeypatch, capsys):
    alive = iter([True, True, True, False])
    monkeypatch.setattr(Attention, "_alive", lambda self: next(alive))
    names = ("one", "two", "three")
    suite = Attention([variant(name) for name in names], CPU, 3)
    run(suite, [TINY, TINY], tmp_path / "a.jsonl")
    records = read_records(tmp_path / "a.jsonl")
    states = [(r["variant"], r["pass"], r["status"]) for r in records]
    assert states[:3] == [(name, "forward", "ok") for name in names]
    assert states[3:] == [
        ("one", "forward+backward", "failed"), *((n, "forward+backward", "skipped")
        for n in names[1:]),
    ]  # fmt: skip
    assert all("the device was lost, in one" in r["reason"] for r in records[3:])
    assert "the device was lost in tiny" in capsys.readouterr().out


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("attention", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    expected = [(c.name, p, v) for c in SMALL for p in PASSES for v in VARIANTS]
    assert [(r["case"], r["pass"], r["variant"]) for r in records] == expected
    on_cpu = {"ours-auto", "sdpa-mask", "sdpa-mask-math", "sdpa"}
    for record in records:
        timed = record["variant"] in on_cpu
        assert record["status"] == ("ok" if timed else "skipped"), record
        assert (record["p50_ms"] is not None) == timed
        assert timed or "CUDA device" in record["reason"]
        assert record["gpu"] is None
        assert record["roofs"]["matmul"] > 0
    assert len({r["run"] for r in records}) == 1
    assert f"{len(records)} records in" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cases", "flux-1"], "got 'flux-1'"),
        (["--small", "--variants", "ours-auto,ours"], "got ours"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(["attention", *options, "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert says in capsys.readouterr().out
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_large_cases_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        bench(["attention"])
    assert stop.value.code == 2
    assert "there is no CUDA device; --small" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_variants_are_captured_and_right():
    case = Case("g", 16, 16, Hierarchy((8, 2, 1)), heads=4, head_dim=64)
    names = ("ours-auto", "sdpa-mask", "sdpa-mask-flash", "flex", "sdpa")
    device = torch.device("cuda", torch.cuda.current_device())
    found = list(Attention([VARIANTS[name] for name in names], device, reps=3).measure(case))
    for record in found:
        refused = record["variant"] == "sdpa-mask-flash"
        assert record["status"] == ("skipped" if refused else "ok"), record
        assert refused or (record["graph"] and record["peak_bytes"] > 0), record
