import accelerate
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig

from sda_fast.attach import HierarchicalFluxAttnProcessor, attach, read_grids
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import RULES, Hierarchy

from .tiny_flux import TRANSFORMER, WIDTH, tiny_flux_pipeline

TREE = Hierarchy((3, 2, 1))
FLUX_TOLERANCE = {"rtol": 0, "atol": 1e-5}


def make_transformer(seed=0, **overrides) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{**TRANSFORMER, **overrides}).eval()


@pytest.fixture
def transformer():
    return make_transformer()


def make_ids(h, w, first=0, dtype=torch.float32):
    ids = FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", dtype)
    ids[:, 0] = first
    return ids


def make_inputs(h=4, w=6, extra=0, source=None, batch=2, num_txt=None, seed=1):
    torch.manual_seed(seed)
    ids = make_ids(h, w)
    if source:
        ids = torch.cat([ids, make_ids(*source, first=1)])
    num_txt = TREE.num_tokens + extra if num_txt is None else num_txt
    return {
        "hidden_states": torch.randn(batch, len(ids), 16),
        "encoder_hidden_states": torch.randn(batch, num_txt, WIDTH),
        "pooled_projections": torch.randn(batch, WIDTH),
        "timestep": torch.full((batch,), 0.7),
        "img_ids": ids,
        "txt_ids": torch.zeros(num_txt, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def run(transformer, inputs, **joint):
    return transformer(**inputs, joint_attention_kwargs=joint or None).sample


@torch.no_grad()
def dense(transformer, inputs, h=4, w=6, rule="overlap", extra=0, **options):
    """The stock transformer with the dense mask: what every attached run must equal."""
    mask = TREE.attention_mask(h, w, rule, extra, **options)
    return run(transformer, inputs, attention_mask=mask[None, None])


def assert_as_dense(transformer, inputs, want, **joint):
    torch.testing.assert_close(run(transformer, inputs, **joint), want, **FLUX_TOLERANCE)


@pytest.mark.parametrize(
    ("h", "w", "extra", "source"),
    [(4, 4, 0, None), (5, 3, 0, None), (1, 7, 3, None), (6, 9, 2, (3, 5)), (2, 2, 0, (4, 4))],
)
@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_equals_the_dense_mask(transformer, rule, h, w, extra, source):
    inputs = make_inputs(h, w, extra, source)
    want = dense(transformer, inputs, h, w, rule, extra, source=source)
    assert (want - run(transformer, inputs)).abs().max() > 1e-3  # the mask matters here
    with attach(transformer, TREE, rule):
        assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_isolate_level(transformer):
    inputs = make_inputs(4, 4)
    want = dense(transformer, inputs, 4, 4, "isolated", isolate_level=1)
    with attach(transformer, TREE, "isolated", isolate_level=1):
        assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_the_op_and_nothing_else_attends(transformer, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("diffusers' attention ran")

    inputs = make_inputs()
    want = dense(transformer, inputs)
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", refuse)
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_each_forward_has_its_own_layout(transformer):
    """Sizes, text lengths and ids that change in place, one after the other."""
    small, large = make_inputs(4, 6), make_inputs(6, 4, extra=2)
    want_small, want_large = dense(transformer, small), dense(transformer, large, 6, 4, extra=2)
    turned = {**small, "img_ids": make_ids(6, 4)}
    want_turned = dense(transformer, turned, 6, 4)
    with attach(transformer, TREE):
        assert_as_dense(transformer, small, want_small)
        assert_as_dense(transformer, large, want_large)
        assert_as_dense(transformer, small, want_small)
        small["img_ids"].copy_(make_ids(6, 4))
        assert_as_dense(transformer, small, want_turned)


@torch.inference_mode()
def test_inference_mode_and_positional_arguments(transformer):
    inputs = make_inputs()
    want = dense(transformer, inputs)
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)
        inputs["img_ids"].copy_(inputs["img_ids"].clone())
        out = transformer(*inputs.values(), None, None, None, False)[0]
    torch.testing.assert_close(out, want, **FLUX_TOLERANCE)


@pytest.mark.parametrize("cls", [FluxPipeline, FluxImg2ImgPipeline, FluxKontextPipeline])
def test_pipelines_agree_with_flux_inputs(cls):
    """Two different embeddings in one batch, a height unlike the width, an ordinary prompt too."""
    torch.manual_seed(3)
    pipeline = tiny_flux_pipeline(cls)
    tokens, pooled = torch.randn(2, TREE.num_tokens, WIDTH), torch.randn(2, WIDTH)
    embedding = SemanticEmbedding(tokens, TREE, pooled)
    prompt = torch.randn(1, 4, WIDTH)
    extra = {} if cls is FluxPipeline else {"image": torch.rand(2, 3, 48, 32)}
    source = (48, 32) if cls is FluxKontextPipeline else None
    inputs = embedding.flux_inputs(48, 32, "local", text=prompt, source=source)

    def paint():
        seed = torch.Generator().manual_seed(0)
        return pipeline(
            **inputs, **extra, num_inference_steps=2, generator=seed, output_type="pt"
        ).images

    want = paint()
    del inputs["joint_attention_kwargs"]
    assert (paint() - want).abs().max() > 1e-4
    with attach(pipeline.transformer, TREE, "local"):
        torch.testing.assert_close(paint(), want, **FLUX_TOLERANCE)


def test_lora(transformer):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "add_k_proj"]))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    inputs = make_inputs()
    mask = TREE.attention_mask(4, 6)[None, None]
    with torch.no_grad():
        half = run(transformer, inputs, attention_mask=mask, scale=0.5)
        full = run(transformer, inputs, attention_mask=mask)
        assert (half - full).abs().max() > 1e-3
        with attach(transformer, TREE):
            assert_as_dense(transformer, inputs, half, scale=0.5)
            assert_as_dense(transformer, inputs, full)


@torch.no_grad()
def test_fused_projections(transformer):
    inputs = make_inputs()
    want = dense(transformer, inputs)
    with attach(transformer, TREE):
        transformer.fuse_qkv_projections()
        assert_as_dense(transformer, inputs, want)
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)
        transformer.unfuse_qkv_projections()
        assert_as_dense(transformer, inputs, want)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@torch.no_grad()
def test_group_offload(transformer, monkeypatch, when, offload_type):
    # group offload asks torch for an accelerator's module, which a machine without one lacks
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    inputs = make_inputs()
    want = dense(transformer, inputs)
    options = {"offload_type": offload_type, "num_blocks_per_group": 1}
    device = torch.device("cpu")
    if when == "before":
        transformer.enable_group_offload(device, device, **options)
    with attach(transformer, TREE):
        if when == "after":
            transformer.enable_group_offload(device, device, **options)
        assert_as_dense(transformer, inputs, want)
    torch.testing.assert_close(dense(transformer, inputs), want, **FLUX_TOLERANCE)


@pytest.mark.parametrize("when", ["before", "after"])
def test_model_offload(when):
    """The pipeline takes accelerate's wrapper off and on at the end of each call."""
    pipeline = tiny_flux_pipeline(FluxPipeline)
    torch.manual_seed(3)
    embedding = SemanticEmbedding(
        torch.randn(1, TREE.num_tokens, WIDTH), TREE, torch.randn(1, WIDTH)
    )
    inputs = embedding.flux_inputs(32, 32)

    def paint(**inputs):
        seed = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 1, "output_type": "pt"}
        return pipeline(**inputs, **options, generator=seed).images

    want = paint(**inputs)
    del inputs["joint_attention_kwargs"]
    unmasked = paint(**inputs)
    if when == "before":
        pipeline.enable_model_cpu_offload(device="cpu")
    with attach(pipeline.transformer, TREE):
        if when == "after":
            pipeline.enable_model_cpu_offload(device="cpu")
        for _ in range(2):
            torch.testing.assert_close(paint(**inputs), want, **FLUX_TOLERANCE)
    assert isinstance(pipeline.transformer._hf_hook, accelerate.hooks.CpuOffload)
    assert pipeline.transformer.forward.func.__module__ == "accelerate.hooks"
    for _ in range(2):
        assert torch.equal(paint(**inputs), unmasked)


def test_gradient_checkpointing():
    """Gradients with every block recomputed are those of the dense mask without."""

    def gradients(transformer, **joint):
        inputs = make_inputs()
        inputs["encoder_hidden_states"].requires_grad_()
        run(transformer, inputs, **joint).square().mean().backward()
        weight = transformer.transformer_blocks[0].attn.to_q.weight.grad
        return inputs["encoder_hidden_states"].grad, weight

    mask = TREE.attention_mask(4, 6)[None, None]
    want = gradients(make_transformer().train(), attention_mask=mask)
    transformer = make_transformer().train()
    transformer.enable_gradient_checkpointing()
    with attach(transformer, TREE):
        got = gradients(transformer)
    torch.testing.assert_close(got, want, **FLUX_TOLERANCE)


@torch.no_grad()
def test_autocast(transformer):
    inputs = make_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        want = dense(transformer, inputs)
        with attach(transformer, TREE):
            out = run(transformer, inputs)
    assert out.dtype == want.dtype
    torch.testing.assert_close(out, want, rtol=0, atol=0.02 * float(want.abs().max()))


@torch.no_grad()
def test_compiled_blocks(transformer):
    inputs = make_inputs()
    want = dense(transformer, inputs)
    transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_detach_is_bit_identical(transformer):
    processors = dict(transformer.attn_processors)
    inputs = make_inputs()
    before = run(transformer, inputs)
    handle = attach(transformer, TREE)
    assert not torch.equal(run(transformer, inputs), before)
    handle.detach()
    handle.detach()
    assert torch.equal(run(transformer, inputs), before)
    assert transformer.attn_processors == processors
    want = dense(transformer, inputs)
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


def test_detaches_after_an_error(transformer):
    with pytest.raises(KeyError), attach(transformer, TREE):
        raise KeyError
    attach(transformer, TREE).detach()


def test_attach_twice(transformer):
    handle = attach(transformer, TREE)
    with pytest.raises(ValueError, match=r"attached already.*'overlap'.*detach"):
        attach(transformer, TREE, "local")
    assert_as_dense(transformer, make_inputs(), dense_of_fresh())
    handle.detach()


@torch.no_grad()
def dense_of_fresh():
    return dense(make_transformer(), make_inputs())


def load_ip_adapter(transformer):
    width, dim = 32, TRANSFORMER["joint_attention_dim"]
    names = ("to_k_ip", "to_v_ip")
    transformer._load_ip_adapter_weights(
        {
            "image_proj": {
                "proj.weight": torch.randn(4 * dim, 8),
                "proj.bias": torch.randn(4 * dim),
                "norm.weight": torch.ones(dim),
                "norm.bias": torch.zeros(dim),
            },
            "ip_adapter": {f"0.{n}.weight": torch.randn(width, dim) for n in names}
            | {f"0.{n}.bias": torch.randn(width) for n in names},
        },
        low_cpu_mem_usage=False,
    )


def test_attach_after_ip_adapter(transformer):
    load_ip_adapter(transformer)
    with pytest.raises(ValueError, match=r"FluxIPAdapterAttnProcessor.*flux_inputs"):
        attach(transformer, TREE)


@torch.no_grad()
def test_ip_adapter_after_attach():
    """Loading it replaces our processors, unloading leaves stock ones: both would drop the mask."""
    pipeline = tiny_flux_pipeline(FluxPipeline)
    transformer, inputs = pipeline.transformer, make_inputs()
    want = dense(transformer, inputs)
    handle = attach(transformer, TREE)
    load_ip_adapter(transformer)
    with pytest.raises(RuntimeError, match="replaced by FluxIPAdapterAttnProcessor"):
        run(transformer, inputs)
    pipeline.unload_ip_adapter()
    with pytest.raises(RuntimeError, match="replaced by FluxAttnProcessor"):
        run(transformer, inputs)
    handle.detach()
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


def test_detach_leaves_an_ip_adapter(transformer):
    handle = attach(transformer, TREE)
    load_ip_adapter(transformer)
    handle.detach()
    kinds = {type(p).__name__ for p in transformer.attn_processors.values()}
    assert kinds == {"FluxIPAdapterAttnProcessor", "FluxAttnProcessor"}


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("flash_varlen", "key padding"),
        (AttentionBackendName.SAGE_VARLEN, "key padding"),
        (AttentionBackendName.SAGE, "takes no mask"),
        ("_native_flash", "takes no mask"),
        ("warp_drive", "unknown to diffusers"),
    ],
)
def test_backends_without_a_mask(transformer, backend, message):
    def choose():
        for processor in transformer.attn_processors.values():
            processor._attention_backend = backend

    handle = attach(transformer, TREE)
    choose()
    with pytest.raises(ValueError, match=message):
        run(transformer, make_inputs())
    handle.detach()
    with pytest.raises(ValueError, match=message):
        attach(transformer, TREE)


@torch.no_grad()
def test_backend_and_parallel_settings_stay(transformer):
    inputs = make_inputs()
    want = dense(transformer, inputs)
    transformer.set_attention_backend("_native_math")
    with attach(transformer, TREE):
        processors = transformer.attn_processors.values()
        assert {p._attention_backend for p in processors} == {AttentionBackendName._NATIVE_MATH}
        assert_as_dense(transformer, inputs, want)
        transformer.set_attention_backend("native")
    processors = transformer.attn_processors.values()
    assert {p._attention_backend for p in processors} == {AttentionBackendName.NATIVE}
    for processor in processors:
        processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        attach(transformer, TREE)


def test_refuses_a_dense_mask_beside_it(transformer):
    mask = TREE.attention_mask(4, 6)[None, None]
    with attach(transformer, TREE), pytest.raises(ValueError, match="attention_mask while"):
        run(transformer, make_inputs(), attention_mask=mask)


def test_refuses_fewer_text_tokens_than_positions(transformer):
    inputs = make_inputs(num_txt=TREE.num_tokens - 1)
    message = f"encoder_hidden_states must hold the {TREE.num_tokens} positions.*got 26 text"
    with attach(transformer, TREE), pytest.raises(ValueError, match=message):
        run(transformer, inputs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"transformer": torch.nn.Linear(1, 1)}, TypeError, "FluxTransformer2DModel.*got Linear"),
        ({"tree": (3, 2, 1)}, TypeError, "tree must be a Hierarchy, got tuple"),
        ({"rule": "global"}, ValueError, "rule must be one of overlap, local.*'global'"),
        ({"isolate_level": 3}, ValueError, "isolate_level"),
    ],
)
def test_refuses_bad_arguments(transformer, options, error, message):
    with pytest.raises(error, match=message):
        attach(**{"transformer": transformer, "tree": TREE, **options})
    assert not any(
        isinstance(p, HierarchicalFluxAttnProcessor) for p in transformer.attn_processors.values()
    )


def test_a_block_alone_is_refused(transformer):
    """Outside the transformer's forward nobody knows the layout; no mask must not mean all."""
    hidden, text = torch.randn(1, 24, 32), torch.randn(1, TREE.num_tokens, 32)
    with attach(transformer, TREE), pytest.raises(RuntimeError, match="hook"):
        transformer.transformer_blocks[0](hidden, text, torch.randn(1, 32))


def test_processor_holds_no_state(transformer):
    with attach(transformer, TREE):
        run(transformer, make_inputs())
        for processor in transformer.attn_processors.values():
            assert set(vars(processor)) == {"_attention_backend", "_parallel_config"}
            assert type(processor.__class__()) is HierarchicalFluxAttnProcessor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 300), (257, 2), (45, 80)])
def test_read_grids(h, w, dtype):
    """bfloat16 rounds ids above 256 to even numbers."""
    assert read_grids(make_ids(h, w, dtype=dtype)) == [(h, w)]
    both = torch.cat([make_ids(h, w, dtype=dtype), make_ids(w, 3, first=1, dtype=dtype)])
    assert read_grids(both[None]) == [(h, w), (w, 3)]


@pytest.mark.parametrize(
    "ids",
    [
        make_ids(3, 4)[:-1],
        make_ids(3, 4).flip(0),
        make_ids(3, 4).view(3, 4, 3).transpose(0, 1).reshape(12, 3),
        torch.cat([make_ids(2, 2), make_ids(2, 2, 1), make_ids(2, 2, 1)]),
        torch.cat([make_ids(2, 2, 1), make_ids(2, 2)]),
        make_ids(2, 2, 2),
        make_ids(2, 2)[:0],
    ],
    ids=["cut", "reversed", "columns", "two sources", "source first", "other", "none"],
)
def test_read_grids_refuses(ids):
    with pytest.raises(ValueError, match="img_ids"):
        read_grids(ids)
