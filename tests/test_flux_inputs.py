"""flux_inputs through diffusers' own pipelines, nothing patched."""

import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
)

from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy

from .tiny_flux import PATCH, WIDTH, tiny_flux_pipeline

PIPELINES = [FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, FluxKontextPipeline]
ROWS, COLUMNS = 64, 96  # pixels
SOURCE = (32, 64)


def make(tree, seed=0, batch=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, tree.num_tokens, WIDTH, generator=generator)
    return SemanticEmbedding(tokens, tree, torch.randn(batch, WIDTH, generator=generator))


def picture(height, width, seed=0):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def extra(cls):
    """What the pipeline takes beside flux_inputs."""
    if cls is FluxPipeline:
        return {}
    if cls is FluxKontextPipeline:
        return {"image": picture(*SOURCE)}
    inputs = {"image": picture(ROWS, COLUMNS), "strength": 0.7}
    if cls is FluxInpaintPipeline:
        inputs["mask_image"] = torch.ones(1, 1, ROWS, COLUMNS)
    return inputs


def run(cls, emb, rule="overlap", **kwargs):
    options = {key: kwargs.pop(key) for key in ("text", "isolate_level") if key in kwargs}
    source = SOURCE if cls is FluxKontextPipeline else None
    inputs = emb.flux_inputs(ROWS, COLUMNS, rule, source=source, **options)
    pipeline = tiny_flux_pipeline(cls)
    generator = torch.Generator().manual_seed(0)
    arguments = {"output_type": "latent", **extra(cls), **inputs, **kwargs}
    return pipeline(num_inference_steps=3, generator=generator, **arguments).images


def quadrant_of_tokens(h, w):
    """[h*w] int, the child index of the quadrant of each patch of a grid with even sides."""
    row, col = torch.arange(h) * 2 // h, torch.arange(w) * 2 // w
    return (2 * row[:, None] + col[None]).flatten()


@pytest.mark.parametrize("cls", PIPELINES)
@pytest.mark.parametrize("rule", ["overlap", "local", "isolated"])
def test_a_stock_pipeline_takes_them_as_they_are(cls, rule):
    tree = Hierarchy((2, 1, 1))
    text = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(1))
    images = run(cls, make(tree, batch=2), rule, text=text, output_type="pt")
    assert images.shape == (2, 3, ROWS, COLUMNS)
    assert images.isfinite().all()


@pytest.mark.parametrize("cls", PIPELINES)
def test_the_mask_is_obeyed_to_the_bit(cls):
    """Isolated quadrants without a root: an edited quadrant cannot be felt in another."""
    tree = Hierarchy((0, 2))
    emb = make(tree)
    edited = emb.transplant(make(tree, seed=1), "/3")
    before, after = (run(cls, e, "isolated") for e in (emb, edited))
    inside = quadrant_of_tokens(ROWS // PATCH, COLUMNS // PATCH) == 3
    assert torch.equal(before[:, ~inside], after[:, ~inside])
    assert (before[:, inside] != after[:, inside]).any(-1).all()


def test_source_tokens_obey_the_rule_at_their_own_place():
    """Source latents changed in one quadrant of their own grid change that quadrant alone."""
    emb = make(Hierarchy((0, 2)))
    shape = (1, 4, SOURCE[0] // 8, SOURCE[1] // 8)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    changed = source.clone()
    changed[..., : shape[2] // 2, shape[3] // 2 :] += 1  # quadrant 1
    before, after = (run(FluxKontextPipeline, emb, "isolated", image=s) for s in (source, changed))
    inside = quadrant_of_tokens(ROWS // PATCH, COLUMNS // PATCH) == 1
    assert torch.equal(before[:, ~inside], after[:, ~inside])
    assert (before[:, inside] != after[:, inside]).any(-1).all()


def test_each_picture_of_a_batch_is_its_own():
    emb = make(Hierarchy((2, 1)), batch=2)
    tokens = (ROWS // PATCH) * (COLUMNS // PATCH)
    latents = torch.randn(2, tokens, 16, generator=torch.Generator().manual_seed(3))
    together = run(FluxPipeline, emb, latents=latents)
    for row in range(2):
        alone = run(FluxPipeline, emb.select(row), latents=latents[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert not torch.allclose(together[0], together[1])


def test_what_comes_back():
    tree = Hierarchy((2, 1))
    emb, text = make(tree, batch=2), torch.ones(2, 3, WIDTH, dtype=torch.float64)
    inputs = emb.flux_inputs(32, 48, "isolated", text=text, source=(16, 32), isolate_level=0)
    mask = inputs["joint_attention_kwargs"]["attention_mask"]
    assert mask.shape == (1, 1, 6 + 3 + 6 + 2, 6 + 3 + 6 + 2)
    assert torch.equal(mask[0, 0], tree.attention_mask(2, 3, "isolated", 3, 0, (1, 2)))
    assert inputs["prompt_embeds"].dtype == emb.tokens.dtype
    assert torch.equal(inputs["prompt_embeds"], torch.cat([emb.tokens, text.float()], dim=1))
    assert torch.equal(inputs["pooled_prompt_embeds"], emb.pooled)
    assert (inputs["height"], inputs["width"], inputs["max_area"]) == (32, 48, 32 * 48)
    assert set(emb.flux_inputs(32, 48)) == {
        "prompt_embeds",
        "pooled_prompt_embeds",
        "height",
        "width",
        "joint_attention_kwargs",
    }
    other = emb.flux_inputs(8, 4, patch=4, pooled=torch.zeros(1, 7))
    assert torch.equal(other["pooled_prompt_embeds"], torch.zeros(2, 7))
    assert other["joint_attention_kwargs"]["attention_mask"].shape[-1] == 6 + 2


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"height": 40}, "height must be a multiple of the 16 pixels of an image token, got 40"),
        ({"width": 0}, "width must be an integer >= 1, got 0"),
        ({"width": 32.0}, "width must be an integer"),
        ({"patch": 0}, "patch must be"),
        ({"source": (32, 24)}, "source width must be a multiple"),
        ({"source": 32}, r"source must be \(height, width\)"),
        ({"rule": "dense"}, "rule must be one of"),
        ({"isolate_level": 5}, "isolate_level must be below"),
        ({"text": torch.zeros(3, 2, WIDTH)}, r"text must be \[1 or 2, T, 32\].*got \[3, 2, 32\]"),
        ({"text": torch.zeros(1, 2, 8)}, "text must be"),
        ({"text": torch.full((1, 2, WIDTH), float("nan"))}, "text must be finite"),
        ({"pooled": torch.zeros(3, WIDTH)}, r"pooled must be \[1 or 2, P\]"),
        ({"pooled": torch.full((1, WIDTH), float("inf"))}, "pooled must be finite"),
    ],
)
def test_refuses(wrong, match):
    with pytest.raises(ValueError, match=match):
        make(Hierarchy((2, 1)), batch=2).flux_inputs(**{"height": 32, "width": 32, **wrong})


def test_asks_for_the_pooled_vector():
    bare = SemanticEmbedding(torch.zeros(1, 2, WIDTH), Hierarchy((2,)))
    with pytest.raises(ValueError, match=r"pooled must be given.*empty prompt"):
        bare.flux_inputs(32, 32)
