"""A whole pipeline of tiny random models: FLUX, adapter and encoders."""

import torch
from diffusers import FluxPipeline
from PIL import Image

from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults

from .tiny_encoders import tiny_adapter, tiny_encoder
from .tiny_flux import PATCH, WIDTH, tiny_flux_pipeline

TREE = Hierarchy((3, 2, 1))
CLIP_MEAN = (0.4, 0.5, 0.6)  # not what CLIP itself was trained with
CLOSE = {"rtol": 0, "atol": 1e-5}
DEFAULTS = DecodeDefaults(2 * PATCH, 2 * PATCH, steps=2)


def make_adapter(pooled_features=WIDTH, out_features=WIDTH, seed=5) -> SemanticAdapter:
    torch.manual_seed(seed)
    adapter = tiny_adapter(
        tokens_per_node=TREE.tokens_per_node,
        out_features=out_features,
        pooled_features=pooled_features,
    )
    if pooled_features:
        adapter.pooled.normal_()
    adapter.set_encoder(tiny_encoder(clip_mean=CLIP_MEAN))
    return adapter.eval()


def make_pipe(cls=FluxPipeline, pooled_features=WIDTH, **overrides) -> SemanticPipeline:
    flux = tiny_flux_pipeline(cls, **overrides)
    return SemanticPipeline(flux, make_adapter(pooled_features), DEFAULTS)


def make_embedding(batch=2, pooled=True, width=WIDTH, seed=7) -> SemanticEmbedding:
    torch.manual_seed(seed)
    vector = torch.randn(batch, WIDTH) if pooled else None
    return SemanticEmbedding(torch.randn(batch, TREE.num_tokens, width), TREE, vector)


def make_picture(width=24, height=24, seed=0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
