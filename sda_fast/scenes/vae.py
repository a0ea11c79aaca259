"""A VAE that loses nothing: pixels are folded into channels, behind diffusers' VAE interface."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn


class _Certain:
    """The distribution whose every sample is its mode."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return the latents."""
        return self.latents

    def mode(self) -> Tensor:
        """Return the latents."""
        return self.latents


class SpaceToDepthVAE(ModelMixin, ConfigMixin):
    """Fold each 2 x 2 block of pixels into channels: exact, invertible, without weights.

    Args:
        in_channels: of the picture.
        latent_channels: 4 * in_channels.
        block_out_channels: only its length counts: pipelines take 2 ** (len - 1) as the factor
            from latents to pixels.
        scaling_factor: 1 / standard deviation of the latents, as in AutoencoderKL.
        shift_factor: mean of the latents, as in AutoencoderKL.

    Raises:
        ValueError: latent_channels or block_out_channels describe another folding.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 12,
        block_out_channels: tuple[int, ...] = (12, 12),
        scaling_factor: float = 2.0,
        shift_factor: float = -0.4,
    ) -> None:
        super().__init__()
        if latent_channels != 4 * in_channels or len(block_out_channels) != 2:
            raise ValueError(
                f"latent_channels must be 4 * in_channels and block_out_channels a pair, "
                f"got {latent_channels}, {in_channels} and {block_out_channels}"
            )
        # a model without weights has neither dtype nor device
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[_Certain]:
        """[B, 3, H, W] in [-1, 1] -> a distribution over [B, 12, H / 2, W / 2]."""
        latents = _Certain(nn.functional.pixel_unshuffle(x, 2))
        return AutoencoderKLOutput(latent_dist=latents) if return_dict else (latents,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """[B, 12, h, w] -> [B, 3, 2 h, 2 w]; the inverse of encode."""
        picture = nn.functional.pixel_shuffle(z, 2)
        return DecoderOutput(sample=picture) if return_dict else (picture,)
