"""What all variants of a training step share: frozen models, adapter, optimizer, average."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.check import Places
from bench.flux_model import Frozen, Shelf
from bench.training_cases import TrainingCase
from sda_fast.coords import patch_coords
from sda_fast.flux_latents import latents_of, pack

EMA_DECAY = 0.999
SEED = 1
"""Of times, noise and the pooled vector."""


@dataclass(frozen=True, slots=True)
class Models:
    """Random models of a case, each once.

    Attributes:
        frozen: the transformer.
        encoder: a frozen ImageEncoder.
        vae: a frozen AutoencoderKL.
        adapter: float32, with no encoder attached: the step feeds it features.
        optimizer: fused AdamW of the adapter. It does all its work at a learning rate of 0, so
            that a step leaves the weights bit for bit, and all variants have the same.
        average: of the adapter's parameters, in their order.
    """

    frozen: Frozen
    encoder: Any
    vae: Any
    adapter: Any
    optimizer: torch.optim.Optimizer
    average: list[Tensor]

    @property
    def parameters(self) -> list[Tensor]:
        """Those that learn."""
        return list(self.adapter.parameters())

    @property
    def head_dim(self) -> int:
        """D of the adapter's attention."""
        return self.adapter.config.width // self.adapter.config.num_heads

    def latents(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [0, 1] -> packed latents [B, S_img, 4 C]."""
        return pack(latents_of(self.vae, pixels))

    def places(self, picture: tuple[int, int]) -> Places:
        """Coordinates of positions and patches for pictures of so many rows and columns."""
        grid = self.encoder.grid(*picture, max(self.encoder.patch_sizes))
        tree, device = self.adapter.tree, self.adapter.device
        return tree.token_coords(*grid).to(device), patch_coords(*grid).to(device)

    def pooled(self, batch: int) -> Tensor:
        """The pooled vector of every picture, [B, P], in the dtype of the transformer."""
        model = self.frozen.transformer
        generator = torch.Generator(model.device).manual_seed(SEED)
        size = (model.config.pooled_projection_dim,)
        one = torch.randn(size, generator=generator, device=model.device).to(model.dtype)
        return one.expand(batch, -1)


def make_models(case: TrainingCase, frozen: Frozen, device: torch.device) -> Models:
    """Random ones of a case's sizes beside a transformer, the same at every call."""
    from diffusers import AutoencoderKL

    adapter: Any = case.encode.model(device)
    encoder = adapter.encoder
    adapter.set_encoder(None)
    # as what learns is kept; diffusers' own `to` warns at every dtype
    nn.Module.to(adapter, torch.float32).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        vae: Any = AutoencoderKL(**case.vae)
    vae = nn.Module.to(vae, device, case.flux.dtype).eval().requires_grad_(False)
    parameters = list(adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.01, fused=True)
    average = [copy.deepcopy(p.detach()) for p in parameters]
    return Models(frozen, encoder, vae, adapter, optimizer, average)


@dataclass(slots=True)
class TrainingShelf:
    """Models of the case before, as the next one mostly wants the same.

    Attributes:
        flux: the transformer.
        about: what the others were made for.
        models: they.
    """

    flux: Shelf = field(default_factory=Shelf)
    about: tuple = ()
    models: Models | None = field(default=None, repr=False)

    def get(self, case: TrainingCase, device: torch.device) -> Models:
        """The models of a case; others are dropped first."""
        about = case.flux.model, case.flux.tree, case.flux.dtype, device
        if self.models is None or self.about != about:
            self.clear()
            self.models = make_models(case, self.flux.get(case.flux, device), device)
            self.about = about
        return self.models

    def clear(self) -> None:
        """Hold nothing."""
        self.models, self.flux, self.about = None, Shelf(), ()
