"""Pictures as what FLUX denoises: latents of its autoencoder, packed into image tokens."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


@torch.no_grad()
def latents_of(vae: Any, pictures: Tensor) -> Tensor:
    """The most likely latents of pictures, shifted and scaled as diffusion wants them.

    As ``encode_vae_image`` of diffusers' Flux pipelines.

    Args:
        vae: an AutoencoderKL or what stands in for it.
        pictures: [B, 3, H, W] in [0, 1], float.

    Returns:
        [B, C, h, w], in the dtype of the vae.
    """
    latents = vae.encode((pictures * 2 - 1).to(vae.dtype)).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> image tokens [B, h w / 4, 4 C], as diffusers' Flux pipelines pack."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
