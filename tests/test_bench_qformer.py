from dataclasses import replace

import pytest
import torch

from bench import test_regression
from bench.__main__ import main as bench
from bench.check import NAMES, yardstick
from bench.measure import attention_step
from bench.plain_adapter import (
    adapter_yardstick,
    plain_adapter,
    reference_turns,
    table_turns,
    turned_sdpa,
)
from bench.qformer import QFormer
from bench.qformer_cases import CASES, EVERY, GOALS, SMALL, QFormerCase, moved_bytes, select_qformer
from bench.qformer_report import GOALS as WANTED
from bench.qformer_report import qformer_tables
from bench.qformer_variants import VARIANTS, QFormerVariant
from bench.records import append_record
from bench.suite import PASSES
from sda_fast import reference
from sda_fast.hierarchy import Hierarchy

from .test_bench_measure import bench_small

CPU = torch.device("cpu")
ADAPTER = SMALL[2]
ADAPTER_GOAL = "adapter-b1-s1369"
OP = {name for name, variant in VARIANTS.items() if variant.kind == "op"}


def op_case(dtype):
    return QFormerCase("op", 2, 5, 3, 16, Hierarchy((3, 1)), dtype)


def test_cases_are_those_the_goals_speak_of():
    assert [case.name for case in GOALS] == [
        "op-b1-s1369", "op-b16-s1369", "op-b16-s4096", "adapter-b1-s1369",
    ]  # fmt: skip
    assert {(c.kind, c.batch, c.seq_len) for c in EVERY} == {
        (kind, b, s)
        for kind in ("op", "adapter")
        for b in (1, 4, 16, 64)
        for s in (729, 1369, 4096)
    }
    assert {(c.heads, c.head_dim, c.tree.num_tokens, c.dtype) for c in EVERY} == {
        (16, 64, 128, torch.bfloat16)
    }
    assert len(CASES) == len(EVERY) + len(SMALL)
    assert select_qformer("op-b4-*,op-b4-s729") == [c for c in EVERY if c.name[:5] == "op-b4"]
    with pytest.raises(ValueError, match=r"goals, all, small or names like op-b1-s1369, got 'x'"):
        select_qformer("x")


def test_bytes_by_hand_and_inputs_by_shape():
    case = op_case(torch.float32)  # N = 7, S = 25
    shapes = [t.shape for t in case.inputs(CPU)]
    assert shapes == [(2, 7, 3, 16), (2, 25, 3, 16), (2, 25, 3, 16), (2, 7, 3, 16)]
    moved = sum(t.nbytes for t in case.inputs(CPU))
    assert moved_bytes(case, backward=False) == moved
    assert moved_bytes(case, backward=True) == 2 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make_turns", [reference_turns, table_turns])
def test_the_yardstick_takes_what_is_turned_and_notices_what_is_not(make_turns, dtype):
    case = op_case(dtype)
    inputs, places = case.inputs(CPU), case.places(CPU)
    ruler = yardstick(inputs, None, places)
    exact = attention_step(
        lambda q, k, v: reference.rope3d_attention(q, k, v, *places),
        [t.double() for t in inputs], backward=True,
    )()  # fmt: skip
    for name, result in zip(NAMES, exact, strict=True):
        assert torch.allclose(ruler.exact[name], result, rtol=1e-12, atol=1e-12)
    turns = make_turns(places, case.head_dim)
    right = attention_step(lambda q, k, v: turned_sdpa(q, k, v, turns), inputs, backward=True)()
    assert ruler.faults(right) == []
    free = attention_step(lambda q, k, v: turned_sdpa(q, k, v, None), inputs, backward=True)()
    assert {fault.split()[0] for fault in ruler.faults(free)} == set(NAMES)
    assert yardstick(inputs, None).faults(free) == []
    swapped = turns[0], lambda k: turns[1](k.flip(1)).flip(1)
    wrong = attention_step(lambda q, k, v: turned_sdpa(q, k, v, swapped), inputs, backward=False)()
    assert ruler.faults(wrong)


@pytest.fixture(scope="module")
def adapter():
    return ADAPTER.adapter(CPU)


@pytest.mark.parametrize("make_turns", [reference_turns, table_turns])
def test_the_plain_adapter_is_the_adapter(adapter, make_turns):
    features, _ = ADAPTER.inputs(CPU, (24, 20))
    turns = make_turns(ADAPTER.places(CPU), ADAPTER.head_dim)
    grid = ADAPTER.side, ADAPTER.side
    assert torch.allclose(
        plain_adapter(adapter, features, turns), adapter(features, grid), atol=1e-5
    )


def test_the_adapters_yardstick_notices_one_wrong_gradient(adapter):
    features, d_out = ADAPTER.inputs(CPU, (24, 20))
    ruler = adapter_yardstick(adapter, features, d_out, ADAPTER.places(CPU))
    parameters = list(adapter.parameters())
    out = adapter(features, (ADAPTER.side, ADAPTER.side))
    results = [out.detach(), *torch.autograd.grad(out, parameters, d_out)]
    assert len(ruler.names) == len(results)
    assert ruler.faults(results) == []
    assert ruler.faults(results[:1]) == []
    for place in (0, 1, len(results) // 2):
        wrong = [*results[:place], results[place] * 1.01, *results[place + 1 :]]
        (fault,) = ruler.faults(wrong)
        assert fault.startswith(f"{ruler.names[place]} is off by")
        lost = [*results[:place], results[place] * float("nan"), *results[place + 1 :]]
        assert len(ruler.faults(lost)) == 1
        assert " is [" in ruler.faults([*results[:place], results[place][:0]])[0]


def test_who_is_wrong_is_not_timed_and_ours_may_not_break():
    def wrong(_case, _work):
        return lambda q, k, v: turned_sdpa(q, k, v, None)

    def broken(_case, _work):
        raise RuntimeError("no kernel")

    cheat = QFormerVariant("cheat", "Cheat", "op", wrong, gpu=False)
    ours = QFormerVariant("ours", "Ours", "op", broken, gpu=False)
    other = QFormerVariant("other", "Other", "op", broken, gpu=False)
    suite = QFormer([cheat, ours, other, VARIANTS["ours-adapter"]], CPU, 2)
    records = list(suite.measure(SMALL[0]))
    for pass_name in PASSES:
        found = {r["variant"]: r for r in records if r["pass"] == pass_name}
        assert found.keys() == {"cheat", "ours", "other"}
        assert found["cheat"]["reason"].startswith("wrong: out is off by")
        states = {name: r["status"] for name, r in found.items()}
        assert states == {"cheat": "failed", "ours": "failed", "other": "skipped"}


def saved_bytes(step):
    """What the forward of a step keeps for its backward, weights left out; and its results."""
    sizes = []

    def keep(t):
        sizes.append(0 if isinstance(t, torch.nn.Parameter) else t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        results = step()
    return sum(sizes), results


def test_checkpoints_spare_memory_and_stay_with_their_variant():
    names = ("ours-checkpointed-adapter", "ours-adapter")
    suite = QFormer([VARIANTS[name] for name in names], CPU, 1)
    case = replace(ADAPTER, config=ADAPTER.config | {"num_layers": 4})
    work = suite.work(case)
    found = {}
    for variant in suite.variants:  # what is set up first is left as it is
        ready = suite.prepare(variant, case, work)
        found[variant.name] = saved_bytes(suite.step(ready, work, backward=True))
    assert not work.adapter.is_gradient_checkpointing
    (spared, again), (all_saved, plain) = (found[name] for name in names)
    assert spared < 0.6 * all_saved
    for a, b in zip(again, plain, strict=True):
        assert torch.equal(a, b)
    assert work.rulers[True].faults(again) == []


def test_checkpoints_count_for_no_goal(small):
    fast = goal_records(small, ours_checkpointed_adapter=0.1, ours_adapter=2.0)
    assert verdicts(fast)["12 layers, features to embedding, in a CUDA graph", ADAPTER_GOAL] == (
        "≤ 0.6 ms", "2.00 ms", "missed",
    )  # fmt: skip
    assert "| **ours**, checkpointed" in qformer_tables(fast)
    alone = [r for r in fast if r["variant"] == "ours-checkpointed-adapter"]
    assert qformer_tables(alone).startswith("Not measured: no record of an H100 in")


def test_pytest_bench_takes_what_the_suite_takes():
    given = [(case.name, variant.name) for case, variant in test_regression.OUR_QFORMER]
    assert given[:5] == [
        ("small-op-b1-s16", "ours"), ("small-op-b2-s36", "ours"),
        ("small-adapter-b2-s16", "ours-adapter"),
        ("small-adapter-b2-s16", "ours-launched-adapter"),
        ("small-adapter-b2-s16", "ours-checkpointed-adapter"),
    ]  # fmt: skip
    for case in SMALL:
        ours = QFormer([], CPU, 1).work(case).inputs
        found = test_regression.qformer_work(case).inputs
        for a, b in zip(found, ours, strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("qformer", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    expected = [
        (case.name, pass_name, name)
        for case in SMALL
        for pass_name in PASSES
        for name, variant in VARIANTS.items()
        if variant.kind == case.kind
    ]
    assert [(r["case"], r["pass"], r["variant"]) for r in records] == expected
    on_cpu = {
        "ours", "eager", "eager-tables", "sdpa", "ours-adapter", "ours-launched-adapter",
        "ours-checkpointed-adapter", "eager-adapter",
    }  # fmt: skip
    for record in records:
        timed = record["variant"] in on_cpu
        assert record["status"] == ("ok" if timed else "skipped"), record
        assert (record["p50_ms"] is not None) == timed
        assert timed or "CUDA device" in record["reason"]
        assert (record["bytes"] is not None) == (record["op"] == "rope3d_attention")
        assert record["roofs"]["copy"] > 0
    assert f"{len(records)} records in" in said


def of_h100(records, run="1", **ms):
    """Records as an H100 would leave them; milliseconds by case and variant, None as skipped."""
    found = []
    for record in records:
        value = ms.get(record["variant"].replace("-", "_"), 2.0)
        more = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "580", "run": run, "p50_ms": value}
        more |= {
            "peak_bytes": 1000,
            "status": "ok" if value else "skipped",
            "reason": "it | cannot",
        }
        found.append(record | more)
    return found


def verdicts(given):
    lines = [line.strip("|").split("|") for line in qformer_tables(given).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 5]
    return {(cell[0], cell[1]): tuple(cell[2:]) for cell in cells[2:]}


def goal_records(small, **ms):
    """The goals' cases with the small ones' fields."""
    records, _ = small
    return [
        record | {"case": case.name}
        for case in GOALS
        for record in of_h100(records, **ms)
        if record["case"] == (SMALL[0] if case.kind == "op" else ADAPTER).name
    ]


def test_without_a_record_of_the_card_no_number_is_claimed(small):
    assert qformer_tables([]) == (
        "Not measured: no record in bench/results/qformer.jsonl yet; "
        "`bench/h100.sh qformer encode` takes them on one H100."
    )
    assert qformer_tables(small[0]).startswith("Not measured: no record of an H100 in")


def test_goals_are_met_at_their_bound_and_missed_beyond(small):
    assert len(WANTED) == 4 * 3 + 3
    at = "op-b1-s1369"
    found = verdicts(goal_records(small, ours=1.0, eager=2.5, sdpa=1.5, sdpa_cudnn=1.25))
    forward = "forward: best of eager and compiled RoPE + SDPA ÷ ours"
    assert found[forward, at] == ("≥ 2.0", "2.00", "met")  # compiled, at 2.0
    assert found["forward ÷ SDPA without RoPE", at] == ("≤ 0.70", "0.800", "missed")
    assert found["forward ÷ SDPA without RoPE", "op-b16-s4096"][2] == "met"
    memory = "peak memory of forward+backward: compiled ÷ ours"
    assert found[memory, at] == ("≥ 1.5", "1.00", "missed")
    timed = goal_records(small, ours_adapter=0.6, eager_adapter=1.8, compiled_adapter=0.89)
    found = verdicts(timed)
    graph = "12 layers, features to embedding, in a CUDA graph"
    assert found[graph, ADAPTER_GOAL] == ("≤ 0.6 ms", "0.60 ms", "met")
    assert found["12 layers: eager reference ÷ ours", ADAPTER_GOAL][2] == "met"
    other = "12 layers: torch.compile with CUDA graphs ÷ ours"
    assert found[other, ADAPTER_GOAL] == ("≥ 1.5", "1.48", "missed")
    wanted = {key: cells[0] for key, cells in found.items()}
    backward = "forward+backward: best of eager and compiled RoPE + SDPA ÷ ours"
    cases = ("op-b1-s1369", "op-b16-s1369", "op-b16-s4096")
    assert [wanted[forward, case] for case in cases] == ["≥ 2.0", "≥ 1.5", "≥ 1.3"]
    assert [wanted[backward, case] for case in cases] == ["≥ 1.7", "≥ 1.4", "≥ 1.3"]


def test_what_was_not_timed_is_not_called_met(small):
    missing = dict.fromkeys(name.replace("-", "_") for name in OP - {"ours"})
    found = verdicts(goal_records(small, **missing))
    for (_, case), cells in found.items():
        if case.startswith("op-"):
            assert cells[1:] == ("–", "not measured")
    text = qformer_tables(goal_records(small, **missing))
    assert "- compiled RoPE + SDPA (6 measurements): skipped: it / cannot" in text


def test_the_report_is_written_where_its_markers_stand(small, tmp_path, monkeypatch):
    from bench.report import SECTIONS

    monkeypatch.setattr("bench.report.SECTIONS", {"qformer": SECTIONS["qformer"]})
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated:qformer -->\n<!-- /generated:qformer -->\n")
    options = ["report", "--readme", str(readme), "--results", str(tmp_path)]

    def report():
        with pytest.raises(SystemExit) as stop:
            bench(options)
        return stop.value.code

    assert report() == 0
    assert "Not measured: no record in" in readme.read_text()
    for record in goal_records(small, ours=1.0):
        append_record(tmp_path / "qformer.jsonl", record)
    assert report() == 0
    assert "`op-b16-s4096`" in readme.read_text()
