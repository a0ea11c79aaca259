"""Random frozen models in the shapes of the real ones, or tiny: a run can be rehearsed."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from sda_fast.encoders import ImageEncoder
from sda_fast.shapes import CLIP_VIT_H, DINOV2_VIT_L, FLUX_DEV, FLUX_VAE

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
STD = 0.02


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
        transformer=_filled(transformer, device, dtype),
    )
    return flux, torch.zeros(1, transformer.config.pooled_projection_dim)


def random_vae(small: bool, device: torch.device, dtype: torch.dtype) -> Any:
    """An AutoencoderKL; the same at every call."""
    with torch.device("meta"):
        vae = AutoencoderKL(**(SMALL_VAE if small else FLUX_VAE))
    return _filled(vae, device, dtype)


def random_encoder(small: bool, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """Both vision towers; the same at every call."""
    clip: dict[str, Any] = {**SMALL_TOWER, "intermediate_size": 32} if small else CLIP_VIT_H
    dino: dict[str, Any] = {**SMALL_TOWER, "mlp_ratio": 2} if small else DINOV2_VIT_L
    towers = [
        _filled(CLIPVisionModel(CLIPVisionConfig(**clip)), device, dtype),
        _filled(Dinov2Model(Dinov2Config(**dino)), device, dtype),
    ]
    return ImageEncoder(*towers, size=32 if small else 378)


def _filled(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights made where they are to be, frozen; norms scale by 1."""
    # diffusers warns at its own ``to`` of what is not there
    model = nn.Module.to(model, dtype)
    if any(p.is_meta for p in model.parameters()):
        model = model.to_empty(device=device)
    model = nn.Module.to(model, device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                fan_in = p[0].numel()
                p.normal_(0, min(STD, fan_in**-0.5), generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval().requires_grad_(False)
