"""Random frozen models in the shapes of the real ones, or tiny: a run can be rehearsed."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from sda_fast.encoders import ImageEncoder
from sda_fast.shapes import CLIP_VIT_H, DINOV2_VIT_L, FLUX_DEV, FLUX_VAE, random_weights

SMALL_FLUX: dict[str, Any] = {
    **FLUX_DEV, "in_channels": 16, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
    "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
SMALL_VAE: dict[str, Any] = {
    **FLUX_VAE, "block_out_channels": (4,) * 4, "layers_per_block": 1, "latent_channels": 4,
    "norm_num_groups": 1,
}  # fmt: skip
SMALL_TOWER: dict[str, Any] = {
    "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip


def random_flux(small: bool, device: torch.device, dtype: torch.dtype) -> tuple[Any, Tensor]:
    """(a Flux pipeline without text encoders, a pooled vector [1, P]); the same at every call."""
    with torch.device("meta"):
        transformer: Any = FluxTransformer2DModel(**(SMALL_FLUX if small else FLUX_DEV))
    flux = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=random_vae(small, device, dtype),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=random_weights(transformer, dtype, device),
    )
    return flux, torch.zeros(1, transformer.config.pooled_projection_dim)


def random_vae(small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """An AutoencoderKL; the same at every call."""
    with torch.device("meta"):
        vae = AutoencoderKL(**(SMALL_VAE if small else FLUX_VAE))
    return random_weights(vae, dtype, device)


def random_encoder(small: bool, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """Both vision towers; the same at every call."""
    clip: dict[str, Any] = {**SMALL_TOWER, "intermediate_size": 32} if small else CLIP_VIT_H
    dino: dict[str, Any] = {**SMALL_TOWER, "mlp_ratio": 2} if small else DINOV2_VIT_L
    towers = [
        random_weights(CLIPVisionModel(CLIPVisionConfig(**clip)), dtype, device),
        random_weights(Dinov2Model(Dinov2Config(**dino)), dtype, device),
    ]
    return ImageEncoder(*towers, size=32 if small else 378)
