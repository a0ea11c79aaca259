"""Stages "adapter" and "flux": picture to embedding to picture, through a frozen decoder."""

import math
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.flux_latents import pack
from sda_fast.hierarchy import Hierarchy
from sda_fast.losses import cosine_penalty, effective_rank, flow_matching_loss, mean_cosine
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults
from train.batch import Batch, seed_of
from train.config import AdapterConfig, FluxConfig
from train.decoders import mask_rule, mask_tree
from train.frozen import Frozen, frozen_scenes
from train.ranks import Ranks
from train.stage import (
    SHEET_PICTURES,
    WORLDS,
    draw_noise,
    mean_over_shares,
    scene_batch,
    scene_batches,
    shares,
    sheet_of,
)

SHEET_STEPS = 20


def flow_error(
    frozen: Frozen, batch: Batch, seed: int, emb: SemanticEmbedding, latents: Tensor
) -> Tensor:
    """Velocity error of an embedding through the frozen decoder; takes gradients to its positions.

    Args:
        frozen: whose decoder it is.
        batch: whose step and places the noise and times depend on.
        seed: of the run, likewise.
        emb: [B, N, C].
        latents: [B, c, h, w] of the pictures that it stands for.

    Returns:
        Scalar f32.
    """
    grid = latents.shape[-2] // 2, latents.shape[-1] // 2
    x0 = pack(latents).float()
    t, noise = draw_noise(batch, seed, x0)
    velocity = partial(frozen.decoder.velocity, emb=emb, grid=grid)
    return flow_matching_loss(velocity, x0, t, noise)


C = TypeVar("C", bound=AdapterConfig)


class AdapterStage(Generic[C]):
    """The adapter learns what makes the frozen decoder rebuild the picture.

        loss = flow matching + config.penalty * cosine penalty    (sda_fast.losses)

    See train.stage.Stage. What differs from data to data is in subclasses: this one is of scenes.
    """

    def __init__(self, config: C, ranks: Ranks) -> None:
        shares(config, ranks)  # refused before anything is loaded
        self.config: C = config
        self.ranks = ranks
        self.tree = Hierarchy(config.tokens_per_node)
        self.seen = mask_tree(config)
        self.frozen = self.load_frozen()
        torch.manual_seed(config.seed)
        adapter: Any = SemanticAdapter(**self.adapter_config())
        self.adapter: Any = adapter.to(ranks.device)
        self.trained: nn.Module = nn.ModuleDict({"adapter": self.adapter})

    def unseen_shares(self, most: int) -> list[range]:
        """Places of all pictures that are held out, in parts of at most so many of one size."""
        stop = self.config.eval_pictures
        return [range(at, min(at + most, stop)) for at in range(0, stop, most)]

    @property
    def guidance(self) -> float:
        """Of the decoder, if it takes any."""
        return self.config.guidance if isinstance(self.config, FluxConfig) else 1.0

    def load_frozen(self) -> Frozen:
        """The models around the adapter."""
        return frozen_scenes(self.config, self.ranks, WORLDS[self.config.world].size)

    def adapter_config(self) -> dict[str, Any]:
        """Arguments of the SemanticAdapter."""
        config, transformer = self.config, self.frozen.flux.transformer.config
        return {
            "tokens_per_node": self.tree.tokens_per_node,
            "in_features": self.frozen.encoder.out_features,
            "width": config.width,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "out_features": transformer.joint_attention_dim,
            "cross_attention_rope": config.rope,
            "pooled_features": transformer.pooled_projection_dim,
        }

    @property
    def about(self) -> dict[str, Any]:
        """Arguments of the adapter, and which models are around it."""
        known = self.adapter_config()
        known["tokens_per_node"] = list(known["tokens_per_node"])
        return {"adapter": known, "frozen": self.frozen.about}

    num_pictures: float = math.inf

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return scene_batches(self.config, self.ranks, first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return scene_batch(self.config, "train", step, places)

    def held_out(self, places: list[range]) -> list[Batch]:
        """Batches of pictures that are never trained on."""
        return scene_batch(self.config, "test", 0, places)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Velocity error and cosine penalty."""
        tokens, latents = self.read(batch)
        # what is not finite shows in the loss; on the way there it must not stop one rank alone
        emb = self.embedding(tokens.nan_to_num()).truncate(self.levels(batch.step))
        flow = self.flow(batch, emb, latents)
        penalty = cosine_penalty(emb.tokens)
        bad = (tokens.detach().float() * 0).sum()
        return {
            "loss": flow + self.config.penalty * penalty + bad,
            "flow": flow.detach(),
            "penalty": penalty.detach(),
        }

    def flow(self, batch: Batch, emb: SemanticEmbedding, latents: Tensor) -> Tensor:
        """Velocity error of an embedding, with the noise of the batch."""
        return flow_error(self.frozen, batch, self.config.seed, emb, latents)

    def read(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(positions [B, N, C], latents [B, C, h, w]); only what learns takes gradients."""
        if "features" in batch.tensors:
            features, latents = (self.moved(batch, name) for name in ("features", "latents"))
            return self.adapter(features, self.feature_grid(batch.size)), latents
        pictures = self.moved(batch, "pictures")
        if pictures.dtype == torch.uint8:
            pictures = pictures.float() / 255
        features, grid = self.features(pictures)
        return self.adapter(features, grid), self.frozen.latents(pictures)

    def moved(self, batch: Batch, name: str) -> Tensor:
        """A tensor of the batch on this rank's device."""
        return batch.tensors[name].to(self.ranks.device, non_blocking=True)

    def features(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Of the encoders; frozen."""
        return self.frozen.features(pictures)

    def feature_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the encoders' patches for pictures of a size."""
        encoder = self.frozen.encoder
        grids = [encoder.grid(*size, patch) for patch in encoder.patch_sizes]
        return max(grids, key=lambda grid: grid[0] * grid[1])

    def embedding(self, tokens: Tensor) -> SemanticEmbedding:
        """Positions with their hierarchy and pooled vector."""
        pooled = self.frozen.pooled.to(tokens).expand(len(tokens), -1)
        return SemanticEmbedding(tokens, self.seen, pooled)

    def levels(self, step: int) -> int:
        """How many levels a step decodes from; on all ranks the same."""
        every = self.seen.num_levels
        rng = np.random.default_rng(seed_of(self.config.seed, step))
        if rng.random() >= self.config.level_dropout or every == 1:
            return every
        known = [k for k in range(1, every) if sum(self.seen.tokens_per_node[:k])]
        return int(rng.choice(known)) if known else every

    def flops(self, batch: Batch) -> float:
        """See Stage."""
        from sda_fast.cost import flux_flops

        h, w = (side // self.frozen.patch for side in batch.size)
        txt = Hierarchy(self.seen.tokens_per_node[: self.levels(batch.step)]).num_tokens
        config = self.frozen.flux.transformer.config
        return len(batch.ids) * flux_flops(config, txt, h * w, backward=True)

    def evaluate(self) -> dict[str, float]:
        """Losses with noise that stays the same, and how far positions differ from one another.

        Means over all pictures that are held out, whatever the number of ranks and the micro-batch.
        """

        def measure(share: range) -> dict[str, Tensor]:
            batch = self.held_out([share])[0]
            tokens, latents = self.read(batch)
            return {
                "loss": self.flow(batch, self.embedding(tokens), latents),
                "penalty": cosine_penalty(tokens),
                "mean_cosine": mean_cosine(tokens),
                "effective_rank": effective_rank(tokens),
            }

        return mean_over_shares(self.ranks, self.unseen_shares(self._at_once), measure)

    def sheet(self) -> Tensor:
        """Held-out pictures above what came back."""
        config, rows = self.config, ([], [])
        self.frozen.decoder.free()
        every = self.unseen_shares(min(self._at_once, SHEET_PICTURES))
        height, width = self.held_out(every[:1])[0].size
        defaults = DecodeDefaults(height, width, SHEET_STEPS, self.guidance)
        pipe = SemanticPipeline(self.frozen.flux, self.adapter, defaults)
        left = SHEET_PICTURES
        # a few at a time: the VAE needs more room for all of them than FLUX leaves
        for batch in self.held_out(every):
            if left <= 0 or batch.size != (height, width):
                break
            emb = self.embedding(self.read(batch)[0])
            rebuilt = cast(Tensor, pipe.decode(emb, rule=mask_rule(config), output="pt"))
            shown = batch.tensors.get("pictures")
            if shown is not None:
                rows[0].append((shown if shown.is_floating_point() else shown / 255).cpu())
            rows[1].append(rebuilt.float().cpu())
            left -= len(batch.ids)
        return sheet_of(*(torch.cat(row) for row in rows if row))

    @property
    def _at_once(self) -> int:
        """Pictures of a micro-batch."""
        return len(shares(self.config, self.ranks)[0])

    def save(self, folder: Path) -> None:
        """Write the adapter to folder/adapter."""
        self.adapter.save_pretrained(folder / "adapter")
