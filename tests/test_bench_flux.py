"""Cases, costs, the shared transformer, levers and the suite of ``bench flux``."""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import flux_model
from bench.cost import attention_flops
from bench.flux import COMPILE_S, Flux, moved_bytes, rope_layers
from bench.flux_cases import CASES, CONFIGS, GOALS, KINDS, SMALL, FluxCase, select_flux
from bench.flux_check import LOSSY, euler
from bench.flux_levers import LEVERS, pulled
from bench.flux_model import Frozen, Shelf, compile_blocks, run_stock, use_backend
from bench.flux_variants import LAUNCHES, VARIANTS
from bench.measure import Deadline
from sda_fast.attachment import attach
from sda_fast.cost import flux_flops, modulation_weights
from sda_fast.fast_flux import FastFlux

from .test_bench_measure import bench_small

CPU = torch.device("cpu")
STEP = SMALL[0]
LEVER_CASE = next(case for case in SMALL if case.kind == "levers")


@pytest.fixture(scope="module")
def frozen():
    return Frozen(STEP, CPU)


def mask_of(case):
    return case.tree.attention_mask(*case.grid)[None, None]


def test_cases_are_those_the_goals_speak_of():
    assert [case.name for case in GOALS[:2]] == ["step-1024-b1", "step-512-b1"]
    steps = {(c.grid, c.batch) for c in GOALS if c.kind == "step"}
    assert steps == {((side, side), batch) for side in (32, 48, 64) for batch in (1, 4)}
    assert {case.kind for case in GOALS} == set(KINDS) == {case.kind for case in SMALL}
    assert {(c.model, c.num_txt, c.dtype) for c in GOALS} == {("dev", 128, torch.bfloat16)}
    assert len(CASES) == len(GOALS) + len(SMALL)
    assert [c.name for c in select_flux("norm-rope-512-*,step-768-b1")] == [
        "norm-rope-512-b1", "step-768-b1",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"goals, small or names like step-1024-b1, got 'x'"):
        select_flux("x")


def test_the_large_transformer_is_flux_dev():
    defaults = inspect.signature(FluxTransformer2DModel.__init__).parameters
    for name, value in CONFIGS["dev"].items():
        assert value == (True if name == "guidance_embeds" else defaults[name].default)
    with FakeTensorMode():  # 48 GB
        model = FluxTransformer2DModel(**CONFIGS["dev"])
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(11.9e9, rel=1e-3)
    once = [
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and ("time_text" in name or ("norm" in name and "linear" in name))
    ]
    assert sum(once) == modulation_weights(CONFIGS["dev"])


def test_inputs_repeat_few_pictures_and_are_the_same_each_time():
    case = replace(STEP, batch=4)
    first, second = case.inputs(CPU), case.inputs(CPU, 9)
    latents = first["hidden_states"]
    assert latents[:2].equal(latents[2:])
    assert not latents[0].equal(latents[1])
    assert latents.equal(second["hidden_states"])
    assert [t["encoder_hidden_states"].shape[1] for t in (first, second)] == [case.num_txt, 9]
    assert len(second["txt_ids"]) == 9
    h, w = case.grid
    assert first["img_ids"].tolist() == [[0, y, x] for y in range(h) for x in range(w)]
    assert [replace(STEP, batch=n).distinct for n in (1, 2, 3, 4, 5)] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("img", "forward", "both"), [(1024, 15.8, 33.0), (4096, 67.0, 152.8), (16384, 404, None)]
)
def test_flops_are_the_published_ones(img, forward, both):
    config = CONFIGS["dev"]
    assert flux_flops(config, 128, img) / 1e12 == pytest.approx(forward, rel=2e-3)
    if both is not None:
        assert flux_flops(config, 128, img, True) / 1e12 == pytest.approx(both, rel=2e-3)


@pytest.mark.parametrize("guidance", [True, False])
def test_flops_are_those_that_torch_counts(guidance):
    config = CONFIGS["tiny"] | {"num_single_layers": 3, "guidance_embeds": guidance}
    case = replace(STEP, batch=1)
    model = FluxTransformer2DModel(**config).requires_grad_(False)
    given = case.inputs(CPU)
    given["guidance"] = given["guidance"] if guidance else None
    for name in ("hidden_states", "encoder_hidden_states"):
        given[name].requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        out = run_stock(model, given, None)
        assert counted.get_total_flops() == flux_flops(config, case.num_txt, case.num_img)
        out.sum().backward()
    # plain attention keeps its scores, and saves the product that flash computes anew
    one_product = 2 * case.seq_len**2 * 32 * 5
    both = flux_flops(config, case.num_txt, case.num_img, backward=True)
    assert counted.get_total_flops() == both - one_product


def test_attention_is_counted_as_in_bench_attention():
    from bench.cases import CASES as ATTENTION

    case, config = ATTENTION["flux-1024-b1-tree32.8.4"], CONFIGS["dev"]
    for backward in (False, True):
        without = flux_flops(config | {"num_single_layers": 37}, 128, 4096, backward)
        block = flux_flops(config, 128, 4096, backward) - without
        linear = (1 + backward) * 24 * 3072**2 * 4224
        modulation = 2 * 3 * 3072**2
        assert block - linear - modulation == attention_flops(case, False, backward)


def test_random_weights_are_never_zero_and_always_the_same():
    first, second = (
        flux_model.random_transformer(CONFIGS["tiny"], torch.float32, CPU) for _ in "ab"
    )
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert p.equal(q)
        assert p.isfinite().all(), name
        assert p.abs().min() > 0, name
        assert not p.requires_grad


@torch.no_grad()
def test_what_is_done_to_a_twin_stays_with_it(frozen):
    given, active = STEP.inputs(CPU), _AttentionBackendRegistry.get_active_backend()
    before = run_stock(frozen.twin(), given, mask_of(STEP))
    fused, attached, other = (frozen.twin() for _ in range(3))
    fused.fuse_qkv_projections()
    attach(attached, frozen.tree)
    use_backend(other, "_native_math")
    twin = frozen.twin()
    assert [a is b for a, b in zip(twin.parameters(), frozen.transformer.parameters(), strict=True)]
    assert not any(m.fused_projections for m in twin.modules() if hasattr(m, "fused_projections"))
    assert run_stock(twin, given, mask_of(STEP)).equal(before)
    assert _AttentionBackendRegistry.get_active_backend() == active
    processors = list(other.attn_processors.values())
    assert {p._attention_backend for p in processors} == {AttentionBackendName("_native_math")}
    assert {p._attention_backend for p in twin.attn_processors.values()} == {None}
    torch.testing.assert_close(run_stock(fused, given, mask_of(STEP)), before)
    torch.testing.assert_close(run_stock(attached, given, None), before)


def test_a_twin_has_no_weights_of_its_own_and_no_other_fast_flux_moves_them(frozen):
    where = [p.data_ptr() for p in frozen.transformer.parameters()]
    assert [p.data_ptr() for p in frozen.twin().parameters()] == where
    FastFlux(frozen.transformer, frozen.tree)
    FastFlux(frozen.twin(), frozen.tree)
    frozen.fp8()
    assert [p.data_ptr() for p in frozen.transformer.parameters()] == where


def test_the_shelf_keeps_one_transformer():
    shelf = Shelf()
    first = shelf.get(STEP, CPU)
    assert shelf.get(LEVER_CASE, CPU) is first
    assert shelf.get(replace(STEP, dtype=torch.bfloat16), CPU) is not first


class Calls(TorchDispatchMode):
    """Names of the library's operators, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.ops, self.products = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sda_fast":
            self.ops.add(func._schema.name.split("::")[1])
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


def called(frozen, levers):
    given = LEVER_CASE.inputs(CPU)
    with torch.no_grad(), pulled(levers), Calls() as calls:
        (out,) = frozen.fast(**given, return_dict=False)
    return out, calls.ops, calls.products


OPS = {
    "attention": {"hierarchical_attention", "hierarchical_attention_out"},
    "norm-rope": {"norm_rope"},
    "norms": {"ada_norm", "gated_ada_norm"},
}


def test_each_lever_does_what_it_says_and_is_put_back(frozen):
    whole, ops, products = called(frozen, LEVERS)
    for lever, own in OPS.items():
        out, others, _ = called(frozen, set(LEVERS) - {lever})
        assert ops & own, lever
        assert not others & own, lever
        assert others == ops - own
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
        out, alone, _ = called(frozen, {lever})
        assert alone == ops & own or lever == "attention"
        assert alone <= own
        torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    out, others, more = called(frozen, set(LEVERS) - {"packing"})
    config = CONFIGS["tiny"]
    # q, k and v of two streams in a double block; q, k, v and the MLP in a single one
    assert more - products == 4 * config["num_layers"] + 3 * config["num_single_layers"]
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-5)
    none, others, _ = called(frozen, ())
    assert not others
    torch.testing.assert_close(none, whole, rtol=0, atol=1e-5)
    assert called(frozen, LEVERS)[1:] == (ops, products)


def test_levers_are_put_back_after_an_error(frozen):
    ops = called(frozen, LEVERS)[1]
    with pytest.raises(RuntimeError, match="stop"), pulled(()):
        raise RuntimeError("stop")
    with torch.no_grad(), Calls() as calls:
        frozen.fast(**LEVER_CASE.inputs(CPU))
    assert calls.ops == ops


def test_the_waterfall_adds_one_lever_after_the_other():
    levers = {name: v.levers for name, v in VARIANTS.items() if v.levers is not None}
    every = tuple(LEVERS)
    assert levers["ours-none"] == ()
    assert [levers[f"ours-only-{lever}"] for lever in every] == [(lever,) for lever in every]
    added = [levers[f"ours-to-{lever}"] for lever in every[1:]]
    assert added == [every[: n + 2] for n in range(len(every) - 1)]
    assert len(levers) == 2 * len(every)
    assert all(VARIANTS[name].captured == ("graph" in found) for name, found in levers.items())


def test_bytes_are_those_of_the_tensors(frozen):
    for kind, parts in (("norm-rope", 3), ("norm-rope-single", 2)):
        case = next(case for case in SMALL if case.kind == kind)
        layers = rope_layers(case, frozen, CPU)
        assert len(layers) == LAUNCHES
        starts = {x.data_ptr() for layer in layers for x in layer["streams"]}
        assert len(starts) == LAUNCHES * len(layers[0]["streams"])
        read = sum(x[..., : parts * 32].numel() * 4 for x in layers[0]["streams"])
        assert moved_bytes(case) == 2 * read


def test_steps_go_from_noise_to_the_picture():
    early, end = euler(lambda i, x: torch.full_like(x, 28.0), torch.zeros(3), 28, 2)
    assert early.tolist() == [-2.0] * 3
    assert end.tolist() == [-28.0] * 3
    (alone,) = euler(lambda i, x: torch.full_like(x, 28.0), torch.zeros(3), 2, 2)
    assert alone.equal(early)


def measured(*names, case=STEP, **options):
    variants = [replace(VARIANTS[name], gpu=False) for name in names]
    return {r["variant"]: r for r in Flux(variants, CPU, 1, **options).measure(case)}


def test_compiled_variants_go_the_same_way(monkeypatch):
    """By a backend of torch that compiles nothing, but traces all the same."""
    monkeypatch.setitem(flux_model.COMPILE, "backend", "eager")
    limit = torch._dynamo.config.recompile_limit
    found = measured("stock", "recipe", "compiled", "compiled-mask")
    assert {r["status"] for r in found.values()} == {"ok"}, found
    assert [found[name]["masked"] for name in ("recipe", "compiled-mask")] == [False, True]
    assert found["compiled-mask"]["backend"] == "native"
    times = found["recipe"]["backends_ms"]
    assert found["recipe"]["backend"] == min(times, key=times.get)
    assert "flash" in found["recipe"]["backends_refused"]
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()


def test_a_backend_that_the_step_does_not_take_is_followed_by_the_next(monkeypatch):
    monkeypatch.setattr(
        "bench.flux_variants.rank_backends",
        lambda shape, like: ({"_native_cudnn": 1.0, "native": 2.0}, {"flash": "not here"}),
    )
    case = next(case for case in SMALL if case.kind == "text")
    found = measured("stock-text512", case=case)["stock-text512"]
    assert (found["status"], found["backend"], found["num_txt"]) == ("ok", "native", 512)
    assert found["backends_refused"].keys() == {"_native_cudnn", "flash"}
    monkeypatch.setattr(
        "bench.flux_variants.rank_backends", lambda shape, like: ({}, {"flash": "not here"})
    )
    found = measured("stock-text512", case=case)["stock-text512"]
    assert found["status"] == "skipped"
    assert found["reason"] == "no backend does it: {'flash': 'not here'}"


def test_nothing_is_compiled_when_the_time_is_nearly_over():
    found = measured("stock", "recipe", deadline=Deadline.after(COMPILE_S - 1))
    assert found["stock"]["status"] == "ok"
    assert found["recipe"]["reason"] == "no time was left to compile it"


def test_fp8_is_made_once_and_held_to_a_looser_bound(frozen):
    assert frozen.fp8() is frozen.fp8()
    assert frozen.fp8().precision == "fp8"
    assert frozen.fast.precision is None
    found = measured("ours-fp8", "ours-ahead")
    assert {r["status"] for r in found.values()} == {"ok"}, found
    assert 0.01 < found["ours-fp8"]["error"] < LOSSY
    assert found["ours-ahead"]["error"] < 1e-5


def test_who_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        "bench.flux_variants.run_stock", lambda t, given, mask: run_stock(t, given, None)
    )
    found = measured("stock", "ours")
    assert found["stock"]["status"] == "failed"
    assert found["stock"]["reason"].startswith("wrong: velocity is off by")
    assert found["stock"]["error"] > 0.05
    assert found["stock"]["p50_ms"] is None
    assert found["ours"]["status"] == "ok"
    assert found["ours"]["error"] < 1e-5


def test_cases_without_a_goal_have_fewer_variants_and_turns():
    suite = Flux(list(VARIANTS.values()), CPU, 50)
    few = {v.name for v in suite.competitors(replace(STEP, goal=False))}
    every = {v.name for v in suite.competitors(STEP)}
    assert few < every
    assert {"ours-ahead", "ours-fp8", "stock", "recipe"} <= few
    (record,) = Flux([VARIANTS["stock"]], CPU, 50).measure(replace(STEP, reps=2))
    assert record["reps"] == 2


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("flux", tmp_path_factory.mktemp("results") / "new")


def test_on_a_cpu_the_suite_runs_to_its_end(small):
    records, said = small
    expected = [
        (case.name, name) for case in SMALL for name, v in VARIANTS.items() if case.kind in v.kinds
    ]
    assert [(r["case"], r["variant"]) for r in records] == expected
    for record in records:
        variant = VARIANTS[record["variant"]]
        assert record["status"] == ("skipped" if variant.gpu else "ok"), record
        assert (record["p50_ms"] is None) == variant.gpu
        assert variant.gpu or 0 <= record["error"] < (LOSSY if variant.lossy else 1e-5)
        assert (record["bytes"] is None) != (record["flops"] is None)
    assert f"{len(records)} records in" in said


def test_a_loop_counts_all_of_its_steps(small):
    loop, step = (
        next(r for r in small[0] if r["case"].startswith(f"small-{kind}"))
        for kind in ("loop", "step")
    )
    assert loop["steps"] == 28
    assert loop["flops"] * step["batch"] == 28 * step["flops"]


def test_compiled_blocks_are_kept_beside_one_another(frozen, monkeypatch):
    asked = {}
    twin = frozen.twin()
    monkeypatch.setattr(twin, "compile_repeated_blocks", lambda **options: asked.update(options))
    limit = torch._dynamo.config.recompile_limit
    compile_blocks(twin)
    assert asked == {"fullgraph": True, "dynamic": False}
    assert torch._dynamo.config.recompile_limit > limit
    torch._dynamo.config.recompile_limit = limit


def test_a_case_says_its_size():
    assert FluxCase("step", (45, 80)).name == "step-720x1280-b1"
    assert FluxCase("step", (64, 64), 4).seq_len == 4224
