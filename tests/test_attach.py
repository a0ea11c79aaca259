import copy

import accelerate
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers import transformer_flux
from peft import LoraConfig

import sda_fast
from sda_fast.attachment import attach, read_grids
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import RULES, Hierarchy

from .attached_flux import (
    FLUX_TOLERANCE,
    TREE,
    assert_as_dense,
    dense,
    make_ids,
    make_inputs,
    make_transformer,
    run,
)
from .tiny_flux import WIDTH, tiny_flux_pipeline


@pytest.fixture
def transformer():
    return make_transformer()


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


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_the_kernels_equal_the_dense_mask_too(transformer, rule, kernels, tiles):
    inputs = make_inputs(5, 3, 2, (2, 3))
    want = dense(transformer, inputs, 5, 3, rule, 2, source=(2, 3))
    with attach(transformer, TREE, rule):
        assert_as_dense(transformer, inputs, want)


def test_the_package_offers_the_function(transformer):
    assert sda_fast.attach is attach
    sda_fast.attach(transformer, TREE, rule="local").detach()


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
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with attach(transformer, TREE):
        assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_compiled_blocks_attached_again(transformer):
    """An argument that changes from one attach to the next becomes symbolic in the blocks."""
    transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    inputs = make_inputs(4, 4)
    for level in (2, 1):
        want = dense(make_transformer(), inputs, 4, 4, "isolated", isolate_level=level)
        with attach(transformer, TREE, "isolated", isolate_level=level):
            assert_as_dense(transformer, inputs, want)
    for tree in (TREE, Hierarchy((3, 2))):
        inputs = make_inputs(4, 4, num_txt=tree.num_tokens)
        mask = tree.attention_mask(4, 4)[None, None]
        want = run(make_transformer(), inputs, attention_mask=mask)
        with attach(transformer, tree):
            assert_as_dense(transformer, inputs, want)


@torch.no_grad()
def test_copy_before_attach(transformer):
    """A copy of an attached transformer would run the weights of the first."""
    inputs = make_inputs()
    want = dense(transformer, inputs)
    twin = copy.deepcopy(transformer)
    handle = attach(transformer, TREE)
    late = copy.deepcopy(transformer)
    assert_as_dense(transformer, inputs, want)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="copy before attach"):
            run(late, inputs)
        with pytest.raises(RuntimeError, match="copy before attach"):
            attach(late, TREE)
        handle.detach()
    with attach(twin, TREE):
        assert_as_dense(twin, inputs, want)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 300), (257, 2), (45, 80)])
def test_read_grids(h, w, dtype):
    """bfloat16 rounds ids above 256 to even numbers."""
    assert read_grids(make_ids(h, w, dtype=dtype)) == [(h, w)]
    both = torch.cat([make_ids(h, w, dtype=dtype), make_ids(w, 3, first=1, dtype=dtype)])
    assert read_grids(both[None]) == [(h, w), (w, 3)]
