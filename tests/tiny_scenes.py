"""A whole SemanticPipeline in the sizes of the scenes world, one layer each, random weights."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from sda_fast.adapter import SemanticAdapter
from sda_fast.encoders import ImageEncoder
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults
from sda_fast.scenes.vae import SpaceToDepthVAE

SIZE, PATCH, WIDTH, POOLED = 32, 4, 16, 8
STEPS = 2


def tiny_scenes_pipeline(
    seed: int = 0, tokens_per_node: tuple[int, ...] = (4, 2, 1)
) -> SemanticPipeline:
    """Pictures of 32 x 32 pixels, 64 image tokens, positions of 16 channels, two steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=3 * PATCH * PATCH,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=POOLED,
            axes_dims_rope=(2, 2, 4),
        )
        vision = {
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "image_size": SIZE,
            "patch_size": PATCH,
        }
        clip = CLIPVisionModel(CLIPVisionConfig(intermediate_size=32, **vision))
        dino = Dinov2Model(Dinov2Config(mlp_ratio=2, **vision))
        adapter = SemanticAdapter(
            tokens_per_node=tokens_per_node,
            in_features=32,
            width=32,
            num_layers=1,
            num_heads=2,
            out_features=WIDTH,
            pooled_features=POOLED,
        )
    adapter.set_encoder(ImageEncoder(clip, dino, size=SIZE))
    flux = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=SpaceToDepthVAE(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer.eval(),
    )
    flux.set_progress_bar_config(disable=True)
    return SemanticPipeline(flux, adapter.eval(), DecodeDefaults(SIZE, SIZE, STEPS))
