"""Stage "adapter": picture to embedding to picture, through the frozen decoder."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sda_fast.adapter import SemanticAdapter
from sda_fast.encoders import HALF, ImageEncoder
from sda_fast.hierarchy import Hierarchy
from sda_fast.pipeline_folder import load_flux
from sda_fast.scenes.models import PATCH, POOLED
from train.config import AdapterConfig
from sda_fast.losses import cosine_penalty, flow_matching_loss, sample_t
from train.scenes_text import Velocity, draw, pack, sheet_of
from train.stage import WORLDS, draw_scenes, seeded

PARTS: tuple[Literal["flux", "clip", "dino"], ...] = ("flux", "clip", "dino")


class AdapterStage:
    """The adapter learns what makes the frozen decoder rebuild the picture.

    loss = flow matching + config.penalty * cosine penalty; see sda_fast.losses and train.stage.Stage.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config, self.world = config, WORLDS[config.world]
        torch.manual_seed(config.seed)
        parents = {part: require(config.parent(part), part) for part in PARTS}
        self.flux: Any = load_flux(parents["flux"], torch.float32, {})
        self.encoder = ImageEncoder.from_pretrained(
            parents["clip"],
            parents["dino"],
            size=self.world.size,
            clip_mean=HALF,
            clip_std=HALF,
            dino_mean=HALF,
            dino_std=HALF,
        )
        self._check_world()
        tree = Hierarchy(config.tokens_per_node)
        side = self.world.size // PATCH
        self.mask = None if config.rule == "none" else tree.attention_mask(side, side, config.rule)
        self.trained = SemanticAdapter(
            tokens_per_node=tree.tokens_per_node,
            in_features=self.encoder.out_features,
            width=config.width,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            out_features=self.flux.transformer.config.joint_attention_dim,
            cross_attention_rope=config.rope,
            pooled_features=POOLED,
        )

    def _check_world(self) -> None:
        for name in ("clip", "dino"):
            seen = getattr(self.encoder, name).config.image_size
            if seen != self.world.size:
                raise ValueError(
                    f"{name} must be of world {self.config.world}, trained on pictures of "
                    f"{self.world.size} pixels, got one for {seen}"
                )

    def losses(self, seed: int) -> dict[str, Tensor]:
        """Velocity error and cosine penalty on a batch of scenes."""
        _, pictures, _ = draw_scenes(self.world, seed, self.config.batch_size)
        tokens = self.embed(pictures)
        x0 = pack(self.flux, pictures)
        generator = seeded(seed)
        t = sample_t(len(x0), x0.shape[1], generator)
        noise = torch.randn(x0.shape, generator=generator)
        velocity = Velocity(self.flux, tokens, self.world.size, self.mask)
        flow = flow_matching_loss(velocity, x0, t, noise)
        penalty = cosine_penalty(tokens)
        return {"loss": flow + self.config.penalty * penalty, "flow": flow, "penalty": penalty}

    def embed(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, N, C]; only the adapter takes gradients."""
        with torch.no_grad():
            features, grid = self.encoder(pictures)
        return self.trained(features, grid)

    def sheet(self) -> Tensor:
        """Sixteen unseen pictures above what came back."""
        _, pictures, _ = draw_scenes(self.world, 10**6, 16)
        rebuilt = draw(self.flux, self.embed(pictures), self.world.size, self.mask)
        return sheet_of(pictures, rebuilt)

    def save(self, folder: Path) -> None:
        """Write the adapter to folder/adapter."""
        self.trained.save_pretrained(folder / "adapter")


def require(folder: Path, name: str) -> Path:
    """Return the folder, or say which run makes it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must be the folder of a trained model, {folder} is not there; "
            f"run the recipe that makes it first, or set {name}=..."
        )
    return folder
