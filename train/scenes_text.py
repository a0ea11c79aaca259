"""Stage "text": the decoder and its text encoder learn captions; both are frozen afterwards."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from sda_fast.flux_latents import latents_of, pack
from sda_fast.losses import flow_matching_loss
from sda_fast.scenes.captions import caption
from sda_fast.scenes.models import POOLED, build_flux, token_ids
from sda_fast.scenes.world import sample_scenes
from train.batch import Batch
from train.config import TrainConfig
from train.decoders import StockVelocity
from train.ranks import Ranks
from train.stage import (
    HELD_OUT,
    WORLDS,
    draw_noise,
    evaluate_scenes,
    scene_batch,
    scene_batches,
    seeded,
    sheet_of,
)


class TextStage:
    """Caption to picture by rectified flow; see train.stage.Stage."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.world = config, ranks, WORLDS[config.world]
        torch.manual_seed(config.seed)
        self.flux = build_flux(self.world)
        self.flux.to(ranks.device)
        self.trained = nn.ModuleDict(
            {"transformer": self.flux.transformer, "text_encoder": self.flux.text_encoder_2}
        )
        self.about: dict[str, Any] = {"world": config.world}

    num_pictures: float = math.inf

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return scene_batches(self.config, self.ranks, first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return scene_batch(self.config, "train", step, places)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Velocity error on a batch of captioned scenes."""
        text = self.embed(list(batch.texts))
        latents = latents_of(self.flux.vae, batch.tensors["pictures"].to(self.ranks.device))
        grid = latents.shape[-2] // 2, latents.shape[-1] // 2
        x0 = pack(latents)
        t, noise = draw_noise(batch, self.config.seed, x0)
        velocity = StockVelocity(self.flux, text, no_pooled(text), grid)
        return {"loss": flow_matching_loss(velocity, x0, t, noise)}

    def embed(self, captions: list[str]) -> Tensor:
        """[B, T, C] of captions."""
        ids = token_ids(self.flux.tokenizer_2, captions).to(self.ranks.device)
        return self.flux.text_encoder_2(ids).last_hidden_state

    def flops(self, batch: Batch) -> float:
        """None is frozen."""
        return 0.0

    def evaluate(self) -> dict[str, float]:
        """Velocity error on unseen scenes."""
        return evaluate_scenes(self)

    def sheet(self) -> Tensor:
        """Sixteen unseen captions, drawn."""
        scenes = sample_scenes(self.world, "test", HELD_OUT, 16)
        text = self.embed([caption(scene) for scene in scenes])
        return sheet_of(draw(self.flux, text, self.world.size))

    def save(self, folder: Path) -> None:
        """Write the pipeline to folder/flux."""
        self.flux.save_pretrained(folder / "flux")


def draw(flux: FluxPipeline, text: Tensor, size: int, steps: int = 20) -> Tensor:
    """Run the pipeline from fixed noise: [B, 3, size, size] in [0, 1]."""
    flux.set_progress_bar_config(disable=True)
    return flux(
        prompt_embeds=text,
        pooled_prompt_embeds=no_pooled(text),
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=seeded(0),
        output_type="pt",
    ).images


def no_pooled(text: Tensor) -> Tensor:
    """[B, P] of the decoders of scenes, which take nothing from it."""
    return torch.zeros(len(text), POOLED, device=text.device)
