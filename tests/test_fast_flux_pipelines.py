"""FastFlux in the place of the transformer of stock pipelines; what it cannot run is refused."""

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import sda_fast
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.hierarchy import Hierarchy

from .attached_flux import FLUX_TOLERANCE, TREE, make_inputs, make_transformer, run
from .tiny_flux import WIDTH, tiny_flux_pipeline

CLASSES = [FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline]


@pytest.fixture
def transformer():
    return make_transformer()


@pytest.mark.parametrize("cls", CLASSES)
def test_pipelines_paint_what_they_paint_with_the_mask(cls):
    """Two different embeddings in one batch, a height unlike the width, an ordinary prompt too."""
    torch.manual_seed(3)
    pipeline = tiny_flux_pipeline(cls)
    tokens, pooled = torch.randn(2, TREE.num_tokens, WIDTH), torch.randn(2, WIDTH)
    embedding = SemanticEmbedding(tokens, TREE, pooled)
    extra = {} if cls is FluxPipeline else {"image": torch.rand(2, 3, 48, 32)}
    if cls is FluxInpaintPipeline:
        extra |= {"mask_image": torch.ones(2, 1, 48, 32), "height": 48, "width": 32}
    source = (48, 32) if cls is FluxKontextPipeline else None
    prompt = torch.randn(1, 4, WIDTH)
    inputs = embedding.flux_inputs(48, 32, "local", text=prompt, source=source)

    def paint():
        seed = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": seed, "output_type": "pt"}
        return pipeline(**{**inputs, **extra, **options}).images

    want = paint()
    del inputs["joint_attention_kwargs"]
    assert (paint() - want).abs().max() > 1e-4
    pipeline.transformer = FastFlux(pipeline.transformer, TREE, "local")
    torch.testing.assert_close(paint(), want, **FLUX_TOLERANCE)


def test_ids_are_read_once_while_they_stay(transformer, monkeypatch):
    from sda_fast import flux_layout

    read, count = flux_layout.read_grids, []
    monkeypatch.setattr(flux_layout, "read_grids", lambda ids: count.append(1) or read(ids))
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    with torch.no_grad():
        for _ in range(3):
            run(quick, inputs)
        assert len(count) == 1
        inputs["img_ids"].copy_(inputs["img_ids"].clone())
        run(quick, inputs)
        assert len(count) == 2


@torch.inference_mode()
def test_inference_mode_and_positional_arguments(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    want = run(quick, inputs)
    out = quick(*inputs.values(), None, None, None, False)[0]
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_after_inference_mode_it_still_learns(transformer):
    quick, inputs = FastFlux(transformer.requires_grad_(False), TREE), make_inputs()
    with torch.inference_mode():
        run(quick, inputs)
    inputs["encoder_hidden_states"].requires_grad_()
    run(quick, inputs).sum().backward()
    assert inputs["encoder_hidden_states"].grad.abs().max() > 0


def test_the_package_offers_the_class(transformer):
    assert sda_fast.FastFlux is FastFlux


BAD_MODELS = [
    ({"transformer": lambda _: torch.nn.Linear(2, 2)}, TypeError, "FluxTransformer2DModel"),
    ({"tree": lambda _: (3, 2)}, TypeError, "tree must be a Hierarchy, got tuple"),
    ({"rule": lambda _: "some"}, ValueError, "rule must be one of overlap, local, isolated"),
    ({"isolate_level": lambda _: 7}, ValueError, "isolate_level"),
    ({"transformer": lambda t: t.half()}, ValueError, "must not be float16"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD_MODELS)
def test_refuses_to_wrap(transformer, change, kind, message):
    good = {"transformer": transformer, "tree": TREE, "rule": "overlap", "isolate_level": None}
    bad = good | {name: f(good[name]) for name, f in change.items()}
    with pytest.raises(kind, match=message):
        FastFlux(**bad)


def test_refuses_other_norms_and_dropout(transformer):
    block = transformer.single_transformer_blocks[0]
    block.attn.norm_k.eps = 1e-5
    with pytest.raises(ValueError, match=r"attn\.norm_k must be a norm with eps 1e-06"):
        FastFlux(transformer, TREE)
    block.attn.norm_k.eps = 1e-6
    transformer.transformer_blocks[0].attn.to_out[1].p = 0.1
    with pytest.raises(ValueError, match=r"no dropout, got 0\.1 in transformer_blocks"):
        FastFlux(transformer, TREE)


def test_refuses_offload_and_caches_before_and_after(transformer, monkeypatch):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    cpu = torch.device("cpu")
    transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(ValueError, match="must carry no hooks of diffusers"):
        run(quick, inputs)
    with pytest.raises(ValueError, match="must carry no hooks of diffusers"):
        FastFlux(transformer, TREE)


def test_refuses_accelerates_offload(transformer):
    import accelerate

    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    accelerate.cpu_offload_with_hook(transformer, execution_device="cpu")
    with pytest.raises(ValueError, match="hooks of accelerate's offload"):
        run(quick, inputs)


BAD_CALLS = [
    ({"img_ids": None}, "img_ids must be given, got None"),
    ({"img_ids": None, "timestep": None}, "timestep, img_ids must be given"),
    ({"guidance": None}, "guidance must be given for this transformer"),
    ({"joint_attention_kwargs": {"attention_mask": 1}}, "must hold no attention_mask"),
    ({"joint_attention_kwargs": {"ip_hidden_states": 1}}, "must hold nothing but scale"),
    ({"controlnet_block_samples": [1]}, "runs no ControlNet"),
    ({"controlnet_single_block_samples": [1]}, "runs no ControlNet"),
    (
        {"encoder_hidden_states": torch.zeros(2, 5, WIDTH), "txt_ids": torch.zeros(5, 3)},
        "must hold the 27 positions of",
    ),
    ({"encoder_hidden_states": torch.zeros(3, 27, WIDTH)}, r"got \[2, 24, 16\] and \[3, 27, 32\]"),
    ({"hidden_states": torch.zeros(24, 16)}, r"must be \[B, S_img, C\] and .* got \[24, 16\]"),
    ({"img_ids": torch.zeros(23, 3)}, r"img_ids must be \[24, 3\], got \[23, 3\]"),
    ({"txt_ids": torch.zeros(26, 3)}, r"txt_ids must be \[27, 3\], got \[26, 3\]"),
    ({"timestep": torch.zeros(3)}, r"timestep must be of 1 or 2 samples, got \[3\]"),
    ({"guidance": torch.zeros(3)}, r"guidance must be of 1 or 2 samples, got \[3\]"),
    ({"pooled_projections": torch.zeros(3, WIDTH)}, "pooled_projections must be of 1 or 2 samples"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CALLS)
def test_refuses_a_call(transformer, change, message):
    quick = FastFlux(transformer, TREE)
    with pytest.raises(ValueError, match=message):
        quick(**make_inputs() | change)


def test_refuses_more_tokens_than_were_tested(transformer, monkeypatch):
    from sda_fast import flux_layout

    monkeypatch.setattr(flux_layout, "MOST_TOKENS", 23)
    with pytest.raises(ValueError, match="at most 23 image tokens, the most that were tested"):
        run(FastFlux(transformer, TREE), make_inputs())


def test_velocity_refuses(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    emb = SemanticEmbedding(inputs["encoder_hidden_states"], TREE, inputs["pooled_projections"])
    args = inputs["hidden_states"], inputs["timestep"]
    for change, message in [
        ({"checkpoint": "some"}, "checkpoint must be one of none, attention-out, full"),
        ({"grid": (3, 6)}, r"grid must hold the 24 tokens of x_t, got \(3, 6\)"),
        ({"grid": None}, "grid must hold the 24 tokens of x_t, got none for no square"),
    ]:
        with pytest.raises(ValueError, match=message):
            quick.velocity(*args, emb, **{"grid": (4, 6), **change})
    with pytest.raises(ValueError, match="emb must have a pooled vector"):
        quick.velocity(*args, SemanticEmbedding(emb.tokens, TREE), grid=(4, 6))
    flat = SemanticEmbedding(emb.tokens, Hierarchy((TREE.num_tokens,)), emb.pooled)
    with pytest.raises(ValueError, match=r"emb must have the hierarchy .* or its first levels"):
        quick.velocity(*args, flat, grid=(4, 6))


def test_velocity_of_the_first_levels_is_that_of_their_own_hierarchy(transformer):
    inputs = make_inputs()
    emb = SemanticEmbedding(inputs["encoder_hidden_states"], TREE, inputs["pooled_projections"])
    first = emb.truncate(levels=2)
    args = inputs["hidden_states"], inputs["timestep"], first
    of_all, of_these = (
        FastFlux(transformer, tree, "isolated").velocity(*args, grid=(4, 6))
        for tree in (TREE, first.tree)
    )
    assert torch.equal(of_all, of_these)


class Custom(FluxAttnProcessor):
    """Somebody's own."""


def test_refuses_what_it_would_pass_by(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    block = transformer.transformer_blocks[0]
    for module in (transformer, block, block.attn, block.attn.norm_q, block.norm1, block.ff):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match="must carry no hook and no forward of its own"):
            run(quick, inputs)
        hook.remove()
    run(quick, inputs)
    transformer.set_attn_processor(Custom())
    with pytest.raises(ValueError, match="diffusers' own FluxAttnProcessor, got Custom"):
        run(quick, inputs)


def test_refuses_weights_on_several_devices(transformer):
    transformer.single_transformer_blocks[0].to("meta")
    with pytest.raises(ValueError, match=r"weights on one device, got \['cpu', 'meta'\]"):
        FastFlux(transformer, TREE)


def test_one_time_and_pooled_vector_serve_a_batch(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    short = ("timestep", "guidance", "pooled_projections")
    inputs |= {name: inputs[name][:1] for name in short}
    want = run(transformer, inputs, attention_mask=TREE.attention_mask(4, 6)[None, None])
    torch.testing.assert_close(run(quick, inputs), want, **FLUX_TOLERANCE)


def test_ids_of_two_dtypes(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    inputs |= {"txt_ids": inputs["txt_ids"] + 0.4, "img_ids": inputs["img_ids"].long()}
    want = run(transformer, inputs, attention_mask=TREE.attention_mask(4, 6)[None, None])
    torch.testing.assert_close(run(quick, inputs), want, **FLUX_TOLERANCE)


def test_denoise_refuses_rows_of_another_transformer(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    layout = quick.layout_of_ids(inputs["img_ids"], inputs["txt_ids"])
    given = inputs["hidden_states"], inputs["encoder_hidden_states"]
    with pytest.raises(ValueError, match=r"modulation must be \[2, 17, 32\], got \[2, 5, 32\]"):
        quick.denoise(*given, torch.zeros(2, 5, 32), layout)
