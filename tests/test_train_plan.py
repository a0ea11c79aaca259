"""Plans: memory against real modules and optimizers, speed from records, and never a guess."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from bench.flux_cases import TRAIN_CASES
from bench.training_cases import CASES as TRAINING_CASES
from sda_fast.adapter import SemanticAdapter
from sda_fast.adapter_config import PRESETS
from sda_fast.cost import adapter_parameters, all_reduce_bytes, flux_parameters
from sda_fast.fast_memory import forward_bytes, kept_bytes
from sda_fast.shapes import FLUX_DEV, FLUX_VAE
from train.optim import build_optimizers, optimizer_tensors
from train.plan import Assumptions, lines_of, make_plan, print_plan
from train.plan_memory import LEARNT, Outline, memory_parts, models_of, trained_numbers
from train.recipes import RECIPES

from .tiny_flux import TRANSFORMER

PHASE3 = RECIPES["phase3-128"]()
OURS = {
    "suite": "training", "kind": "training", "case": "training-512-b8", "variant": "ours",
    "resolution": 512, "recompute": "none", "status": "ok", "gpu": "NVIDIA H100 80GB HBM3",
    "batch": 8, "num_txt": 128, "p50_ms": 500.0, "pictures_per_s": 16.0,
    "held_bytes": 30 * 2**30, "peak_bytes": 40 * 2**30,
    "commit": "abc123", "run": "2030-01-02T03:04:05.000000Z", "flops": 8 * 33e12,
}  # fmt: skip
FLUX = OURS | {
    "suite": "flux-train", "case": "train-512-b4", "variant": "ours-none", "p50_ms": 220.0,
    "batch": 4, "flops": 4 * 33e12, "largest_batch": 9, "largest_batch_by": "memory",
}  # fmt: skip
for key in ("kind", "resolution", "recompute", "num_txt", "pictures_per_s"):
    del FLUX[key]


def write(folder, name, *records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))


def text_of(plan):
    return "\n".join(lines_of(plan))


@pytest.fixture(scope="module")
def models():
    return models_of(PHASE3)


def test_the_parts_of_memory_are_those_of_the_models(models):
    parts = {part.what.split(",")[0]: part for part in memory_parts(PHASE3, models, 32)}
    assert parts["FLUX weights"].fixed / 1e9 == pytest.approx(23.80, rel=1e-3)
    assert parts["encoders"].fixed / 2e6 == pytest.approx(631.7 + 304.4, rel=3e-3)
    vae = AutoencoderKL(**FLUX_VAE)
    assert parts["VAE"].fixed == 2 * sum(p.numel() for p in vae.parameters())
    kept = next(p for name, p in parts.items() if name.startswith("kept by FLUX"))
    assert kept.each == (17 * 19 + 13 * 38) * (128 + 1024) * 3072 * 2
    assert trained_numbers(PHASE3, models) == adapter_parameters(PRESETS["reference"].config)


def test_what_learns_takes_the_bytes_of_real_weights_gradients_and_moments():
    config = replace(RECIPES["scenes-adapter"](), muon_lr=0.0)
    models = models_of(config)
    adapter = SemanticAdapter(**models.adapter)
    optimizers = build_optimizers(adapter, config)
    features = torch.randn(1, models.patches, models.adapter["in_features"])
    side = round(models.patches**0.5)
    adapter(features, (side, side)).square().sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    weights = sum(p.nbytes for p in adapter.parameters())
    gradients = sum(p.grad.nbytes for p in adapter.parameters())
    moments = sum(t.nbytes for t in optimizer_tensors(optimizers).values() if t.ndim)
    assert weights + gradients + moments + weights == LEARNT * trained_numbers(config, models)


def test_sharding_and_fp8_change_the_weights_alone(models):
    plain = memory_parts(PHASE3, models, 32)
    sharded = memory_parts(replace(PHASE3, shard_flux=True), models, 32)
    double = flux_parameters(FLUX_DEV)[1]
    assert sharded[0].fixed == pytest.approx(plain[0].fixed / 32 + 2 * 2 * double)
    assert memory_parts(replace(PHASE3, shard_flux=True), models, 1)[0].fixed == plain[0].fixed
    quantised = memory_parts(replace(PHASE3, flux_precision="fp8"), models, 32)
    # both orders of every linear of the blocks; a double block has 24, a single one 12 d * d
    assert quantised[1].fixed == 2 * (24 * 19 + 12 * 38) * 3072**2
    assert quantised[2:] == plain[1:]


def test_an_outline_stands_in_for_a_transformer():
    model = FluxTransformer2DModel(**TRANSFORMER).to(torch.bfloat16)
    outline = Outline(TRANSFORMER, torch.bfloat16)
    assert outline.nbytes == sum(p.nbytes for p in model.parameters())
    for policy in ("none", "attention-out", "full"):
        assert kept_bytes(outline, 77, policy) == kept_bytes(model, 77, policy)
    assert forward_bytes(outline, 77) == forward_bytes(model, 77)


def test_recompute_and_open_layers_and_resolution_count(models):
    each = lambda config: sum(p.each for p in memory_parts(config, models_of(config), 32))
    none, full = each(PHASE3), each(replace(PHASE3, recompute="full"))
    assert full < none / 3
    large = RECIPES["phase4-1024"]()
    assert 3.5 < each(large) / none < 4.5
    opened = trained_numbers(large, models) - trained_numbers(PHASE3, models)
    assert opened == 4 * 12 * 1024**2


def test_eight_pictures_of_512_fit_an_80_gb_card_by_the_defaults(tmp_path):
    for name in ("phase0-16", "phase1-32", "phase2-quadrants", "phase3-112", "phase3-128"):
        plan = make_plan(RECIPES[name](), Assumptions(gpus=32), tmp_path)
        assert (plan.micro, plan.turns) == (8, 1)
        assert plan.largest >= 8, name
        assert plan.held_bytes < 80 * 2**30
    small = make_plan(PHASE3, Assumptions(gpus=32, memory=40), tmp_path)
    assert small.largest < 8
    assert "micro-batch 8 does not fit" in text_of(small)


def test_without_a_record_no_speed_is_invented(tmp_path):
    plan = make_plan(PHASE3, Assumptions(gpus=32, price=2.0), tmp_path)
    assert plan.one_gpu is plan.pictures_per_s is plan.hours is None
    text = text_of(plan)
    assert "pictures/s" not in text
    assert "cost" not in text.replace("time and cost", "")
    assert text.count("not measured: bench/h100.sh training takes it") == 3
    assert "at most" in plan.exposed_s.source


def test_a_record_of_the_size_is_what_counts(tmp_path):
    write(
        tmp_path, "training",
        OURS | {"pictures_per_s": 15.0},
        OURS,
        OURS | {"variant": "stock", "pictures_per_s": 7.0},
        OURS | {"resolution": 1024, "case": "training-1024-b2", "pictures_per_s": 3.0},
        OURS | {"gpu": None, "pictures_per_s": 0.1},
        OURS | {"status": "failed", "p50_ms": None, "pictures_per_s": None},
        OURS | {"variant": "ours-attention-out", "recompute": "attention-out"},
        '{"torn',
    )  # fmt: skip
    write(tmp_path, "flux-train", FLUX)
    plan = make_plan(PHASE3, Assumptions(gpus=1, mfu=0.9), tmp_path)
    assert plan.one_gpu.value == 16.0
    for part in ("measured", "training-512-b8, ours,", "H100", "abc123", "2030-01-02"):
        assert part in plan.one_gpu.source
    assert plan.exposed_s.value == 0
    assert plan.pictures_per_s.value == pytest.approx(16.0)
    assert plan.measured[0].startswith("70.0 GiB at micro-batch 8, measured: ")
    assert plan.measured[1].startswith("largest batch through FLUX alone 9 (memory), measured: ")


def test_flux_alone_gives_a_model_that_says_so(tmp_path):
    write(tmp_path, "flux-train", FLUX, FLUX | {"variant": "ours-full", "p50_ms": 300.0})
    speed = make_plan(PHASE3, Assumptions(), tmp_path).one_gpu
    assert speed.source.startswith("modelled: FLUX as flux-train train-512-b4, ours-none")
    assert 0.9 < speed.value / (4 / 0.220) < 1
    full = make_plan(replace(PHASE3, recompute="full"), Assumptions(), tmp_path).one_gpu
    assert full.value == pytest.approx(speed.value * 220 / 300)


def test_an_assumed_share_of_the_peak_is_printed_as_assumed(tmp_path):
    plan = make_plan(PHASE3, Assumptions(gpus=1, mfu=0.5), tmp_path)
    assert plan.one_gpu.value == pytest.approx(0.5 * 989 / 33.0, rel=2e-3)
    assert "50% of 989 TFLOP/s, assumed" in plan.one_gpu.source


def test_many_gpus_wait_for_what_cannot_hide(tmp_path, models):
    write(tmp_path, "training", OURS)
    price = Assumptions(gpus=32, pictures=1e6, price=2.0)
    plan = make_plan(PHASE3, price, tmp_path)
    assert plan.sent_bytes == all_reduce_bytes(4 * trained_numbers(PHASE3, models), 32)
    step = 8 / 16.0 + plan.exposed_s.value
    assert plan.pictures_per_s.value == pytest.approx(256 / step)
    assert 0 < plan.exposed_s.value < 0.1
    assert plan.hours == pytest.approx(1e6 * step / 256 / 3600)
    cost = f"{plan.hours * 64:,.0f}"
    assert any(line.split()[:2] == ["cost", cost] for line in lines_of(plan))
    slow = make_plan(PHASE3, replace(price, bandwidth=5.0), tmp_path)
    assert slow.exposed_s.value > 5 * plan.exposed_s.value
    sharded = make_plan(replace(PHASE3, shard_flux=True), price, tmp_path)
    assert sharded.sent_bytes - plan.sent_bytes == pytest.approx(2 * 31 / 32 * 23.80e9, rel=1e-3)
    # the same pictures by accumulation: one all-reduce for several micro-batches
    turns = make_plan(replace(PHASE3, micro_batch=2), price, tmp_path)
    assert (turns.micro, turns.turns) == (2, 4)
    assert turns.sent_bytes == plan.sent_bytes


def test_names_of_cases_are_those_of_the_benchmarks(tmp_path):
    for pixels in (512, 1024):
        config = replace(PHASE3, resolution=pixels)
        case = next(c for c in TRAIN_CASES.values() if c.num_img == (pixels // 16) ** 2)
        write(tmp_path, "flux-train", FLUX | {"case": case.name})
        assert make_plan(config, Assumptions(), tmp_path).one_gpu.source.startswith(
            "modelled: FLUX"
        )
    assert TRAINING_CASES[OURS["case"]].picture == (512, 512)


def test_each_line_says_how_its_number_is_known(tmp_path, capsys):
    write(tmp_path, "training", OURS)
    print_plan(RECIPES["phase4-768"](), Assumptions(gpus=64, price=3.0, mfu=0.4), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    known = ("measured", "modelled", "assumed", "steps")
    numbers = [line for line in lines if line.startswith("  ")]
    assert len(numbers) > 15
    assert all(any(word in line for word in known) for line in numbers)
    assert lines[0].startswith("phase4-768 on 64 GPUs of 80 GiB: 768 x 768 pixels, 256 pictures")


def test_scenes_are_planned_in_their_own_shapes(tmp_path):
    write(tmp_path, "training", OURS | {"resolution": 32})
    plan = make_plan(RECIPES["scenes-128"](), Assumptions(gpus=2), tmp_path)
    assert (plan.micro, plan.one_gpu) == (32, None)
    assert "no benchmark is of scenes" in text_of(plan)
    assert plan.held_bytes < 8e9


def test_what_cannot_be_planned_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"multiple of micro_batch times ranks, 8 x 5, got 256"):
        make_plan(PHASE3, Assumptions(gpus=5), tmp_path)
    with pytest.raises(ValueError, match="rehearsal must be none or full"):
        make_plan(replace(PHASE3, rehearsal="small"), Assumptions(), tmp_path)
    for field, value in (("gpus", 0), ("price", -1.0), ("mfu", float("nan")), ("bandwidth", 0.0)):
        with pytest.raises(ValueError, match=f"{field} must be positive and finite, got {value}"):
            Assumptions(**{field: value})
    with pytest.raises(ValueError, match=r"mfu must be a share of at most 1, got 50"):
        Assumptions(mfu=50.0)
