from dataclasses import replace

import pytest
import torch

from bench.encode import CASES, CLIP, DINO, GOALS, SMALL, Encode, Stages, select_encode
from bench.encode import VARIANTS as OURS
from bench.qformer_report import STAGES, qformer_tables
from sda_fast.adapter import SemanticAdapter
from sda_fast.adapter_config import PRESETS

from .test_bench_measure import bench_small

CPU = torch.device("cpu")


def test_the_large_cases_are_the_reference_models():
    assert [case.name for case in GOALS] == ["encode-b1-378px", "encode-b16-378px"]
    assert select_encode("encode-*") == list(GOALS)
    assert len(CASES) == 3
    preset = PRESETS["reference"]
    for case in GOALS:
        assert case.size == preset.size
        assert case.seq_len == (case.size // CLIP["patch_size"]) ** 2 == 729
        assert case.adapter.config == {}
    assert CLIP["hidden_size"] + DINO["hidden_size"] == preset.config["in_features"]


@pytest.fixture(scope="module")
def model():
    return SMALL[0].model(CPU)


def test_stages_are_those_of_the_whole_and_leave_no_hooks(model):
    pictures = SMALL[0].pictures()
    stages = Stages(model, lambda: model.encode(pictures).tokens, CPU)
    before = model.encode(pictures).tokens
    found = stages.measure(2)
    assert list(found) == list(STAGES)
    assert all(ms > 0 for ms in found.values())
    assert model.encode(pictures).tokens.equal(before)
    modules = (model.qformer, model.encoder.clip, model.encoder.dino)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_what_calls_not_each_module_once_has_no_stages(model):
    skips = Stages(model, lambda: model.qformer.queries, CPU)
    with pytest.raises(RuntimeError, match="stages must be"):
        skips.measure(1)
    assert not model.qformer._forward_hooks


def test_each_stage_is_booked_on_what_ran(model, monkeypatch):
    """A clock that the modules themselves move."""
    clock = [0.0]
    monkeypatch.setattr("bench.encode.time.perf_counter", lambda: clock[0])
    encoder, pictures = model.encoder, SMALL[0].pictures()

    def cost(seconds):
        def tick(*_):
            clock[0] += seconds

        return tick

    # somewhere inside each stage, as its own borders are hooks too
    inside = (first_child(encoder.clip), first_child(encoder.dino), model.mlp,
              model.qformer.norm_out, model.norm_out)  # fmt: skip
    hooks = [
        module.register_forward_pre_hook(cost(seconds))
        for module, seconds in zip(inside, (3, 5, 7, 11, 13), strict=True)
    ]
    try:
        found = Stages(model, lambda: model.encode(pictures).tokens, CPU).measure(1)
    finally:
        for hook in hooks:
            hook.remove()
    assert [found[stage] for stage in STAGES] == pytest.approx([0, 3e3, 5e3, 7e3, 11e3, 13e3])


def first_child(module):
    return next(module.children())


def test_an_embedding_that_is_wrong_is_not_timed(monkeypatch):
    suite = Encode([OURS["ours"]], CPU, 1)
    right = Stages.encode
    monkeypatch.setattr(
        Encode, "step", lambda self, ready, work, backward: lambda: (ready.encode() * 1.05,)
    )
    (record,) = suite.measure(SMALL[0])
    assert record["status"] == "failed"
    assert record["reason"].startswith("wrong: embedding is off by")
    assert Stages.encode is right


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("encode", tmp_path_factory.mktemp("results") / "new")[0]


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    record, graph = small
    assert (record["case"], record["variant"], record["status"]) == (SMALL[0].name, "ours", "ok")
    assert record["pass"] == "forward"
    assert list(record["stages_ms"]) == list(STAGES)
    assert record["stages_reason"] is None
    assert not record["graph"]
    assert (graph["variant"], graph["status"]) == ("ours-graph", "skipped")
    assert graph["reason"] == "it needs a CUDA device"


def test_only_the_graph_asks_for_one_and_has_no_stages(monkeypatch):
    asked, encode = [], SemanticAdapter.encode

    def spy(adapter, pictures, graph=False):
        asked.append(graph)
        return encode(adapter, pictures)

    monkeypatch.setattr(SemanticAdapter, "encode", spy)
    (plain,) = Encode([OURS["ours"]], CPU, 1).measure(SMALL[0])
    assert asked
    assert not any(asked)
    asked.clear()
    (whole,) = Encode([replace(OURS["ours-graph"], gpu=False)], CPU, 1).measure(SMALL[0])
    assert asked
    assert all(asked)
    assert (plain["status"], whole["status"]) == ("ok", "ok")
    assert (whole["graph"], whole["stages_ms"], whole["peak_bytes"]) == (True, None, None)
    assert whole["stages_reason"] == "it is replayed whole, its stages cannot be told apart"


def test_without_a_gpu_the_graph_is_refused():
    variant = replace(OURS["ours-graph"], gpu=False)
    (record,) = Encode([variant], CPU, 1).measure(SMALL[0])
    assert record["status"] == "skipped"
    assert "CUDA" in record["reason"]


def test_the_report_has_a_row_of_each_and_the_share_of_each_stage(small):
    stages = dict.fromkeys(STAGES, 1.0) | {"clip": 15.0}
    more = {"gpu": "NVIDIA H100", "case": "encode-b1-378px", "p50_ms": 20.5, "stages_ms": stages}
    plain = small[0] | more
    unseen = {"status": "ok", "reason": None, "stages_ms": None, "p50_ms": 9.25}
    graph = small[1] | more | unseen
    text = " ".join(qformer_tables([plain, graph]).split())
    head = "| `encode-b1-378px` |"
    assert f"{head} **ours** | 20.50 | 1.00 (5 %) | 15.00 (75 %) | 1.00 (5 %)" in text
    assert f"{head} **ours, in a CUDA graph** | 9.25 | – | – |" in text
    assert (
        text.count("in a CUDA graph: it is replayed whole, its stages cannot be told apart.") == 1
    )
    assert "| not measured |" in text  # the goals are the other suite's
    alone = qformer_tables([graph])
    assert "| 9.25" in alone
    assert "**ours** " not in alone
