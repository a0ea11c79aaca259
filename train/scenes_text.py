"""Stage "text": the decoder and its text encoder learn captions; both are frozen afterwards."""

from pathlib import Path

import torch
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from torch import Tensor, nn

from sda_fast.scenes.captions import caption
from sda_fast.scenes.models import POOLED, build_flux, token_ids
from sda_fast.scenes.world import sample_scenes
from train.config import TrainConfig
from sda_fast.losses import flow_matching_loss, sample_t
from train.stage import WORLDS, draw_scenes, seeded


class TextStage:
    """Caption to picture by rectified flow; see train.stage.Stage."""

    def __init__(self, config: TrainConfig) -> None:
        self.world, self.batch_size = WORLDS[config.world], config.batch_size
        torch.manual_seed(config.seed)
        self.flux = build_flux(self.world)
        self.trained = nn.ModuleDict(
            {"transformer": self.flux.transformer, "text_encoder": self.flux.text_encoder_2}
        )

    def losses(self, seed: int) -> dict[str, Tensor]:
        """Velocity error on a batch of captioned scenes."""
        _, pictures, captions = draw_scenes(self.world, seed, self.batch_size)
        ids = token_ids(self.flux.tokenizer_2, captions)
        text = self.flux.text_encoder_2(ids).last_hidden_state
        x0 = pack(self.flux, pictures)
        generator = seeded(seed)
        t = sample_t(len(x0), x0.shape[1], generator)
        noise = torch.randn(x0.shape, generator=generator)
        velocity = Velocity(self.flux, text, self.world.size)
        return {"loss": flow_matching_loss(velocity, x0, t, noise)}

    def sheet(self) -> Tensor:
        """Sixteen unseen captions, drawn."""
        scenes = sample_scenes(self.world, "test", 10**6, 16)
        ids = token_ids(self.flux.tokenizer_2, [caption(scene) for scene in scenes])
        text = self.flux.text_encoder_2(ids).last_hidden_state
        return sheet_of(draw(self.flux, text, self.world.size))

    def save(self, folder: Path) -> None:
        """Write the pipeline to folder/flux."""
        self.flux.save_pretrained(folder / "flux")


class Velocity:
    """The decoder as a function (x_t, t) -> velocity, given what its txt stream holds."""

    def __init__(
        self, flux: FluxPipeline, text: Tensor, size: int, mask: Tensor | None = None
    ) -> None:
        self.flux, self.text, self.mask = flux, text, mask
        side = size // flux.vae_scale_factor // 2
        self.img_ids = flux._prepare_latent_image_ids(1, side, side, text.device, text.dtype)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """[B, S_img, C], [B] -> [B, S_img, C]."""
        return self.flux.transformer(
            hidden_states=x_t,
            encoder_hidden_states=self.text,
            pooled_projections=torch.zeros(len(x_t), POOLED),
            timestep=t,
            img_ids=self.img_ids,
            txt_ids=torch.zeros(self.text.shape[1], 3),
            joint_attention_kwargs={} if self.mask is None else {"attention_mask": self.mask},
            return_dict=False,
        )[0]


def pack(flux: FluxPipeline, pictures: Tensor) -> Tensor:
    """Encode pictures [B, 3, H, W] in [0, 1] into packed latents [B, S_img, C]."""
    vae = flux.vae
    latents = vae.encode(pictures * 2 - 1).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return flux._pack_latents(latents, *latents.shape)


def draw(
    flux: FluxPipeline, text: Tensor, size: int, mask: Tensor | None = None, steps: int = 20
) -> Tensor:
    """Run the pipeline from fixed noise: [B, 3, size, size] in [0, 1]."""
    flux.set_progress_bar_config(disable=True)
    return flux(
        prompt_embeds=text,
        pooled_prompt_embeds=torch.zeros(len(text), POOLED),
        height=size,
        width=size,
        num_inference_steps=steps,
        generator=seeded(0),
        joint_attention_kwargs=None if mask is None else {"attention_mask": mask},
        output_type="pt",
    ).images


def sheet_of(*rows: Tensor) -> Tensor:
    """Tile batches of pictures, sixteen to a line: [3, H, W]."""
    return torch.cat([torch.cat(list(batch[:16]), dim=2) for batch in rows], dim=1).float()
