"""Inputs of a tiny FLUX transformer, and what it answers with the dense mask."""

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from sda_fast.hierarchy import Hierarchy

from .tiny_flux import TRANSFORMER, WIDTH

TREE = Hierarchy((3, 2, 1))
FLUX_TOLERANCE = {"rtol": 0, "atol": 1e-5}


def make_transformer(seed=0, **overrides) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(**{**TRANSFORMER, **overrides}).eval()


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
