import pytest
import torch

from bench.encode import CASES, CLIP, DINO, GOALS, SMALL, Encode, Stages, select_encode
from bench.encode import VARIANTS as OURS
from bench.qformer_report import STAGES, qformer_tables
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
    (record,) = small
    assert (record["case"], record["variant"], record["status"]) == (SMALL[0].name, "ours", "ok")
    assert record["pass"] == "forward"
    assert list(record["stages_ms"]) == list(STAGES)


def test_the_report_shows_the_share_of_each_stage(small):
    stages = dict.fromkeys(STAGES, 1.0) | {"clip": 15.0}
    more = {"gpu": "NVIDIA H100", "case": "encode-b1-378px", "p50_ms": 20.5, "stages_ms": stages}
    text = " ".join(qformer_tables([small[0] | more]).split())
    assert "| `encode-b1-378px` | 20.50 | 1.00 (5 %) | 15.00 (75 %) | 1.00 (5 %)" in text
    assert "| not measured |" in text  # the goals are the other suite's
    untaken = qformer_tables([small[0] | more | {"stages_ms": None}])
    assert "| `encode-b1-378px`    | 20.50 | –" in untaken
