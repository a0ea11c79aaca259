"""Stages "clip" and "dino": the two small vision encoders, frozen afterwards."""

import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel

from sda_fast.scenes.models import PATCH, WIDTH, build_clip, build_dino, build_tokenizer, token_ids
from train.batch import Batch, seed_of
from train.config import TrainConfig
from train.ranks import Ranks
from train.stage import (
    SHEET_PICTURES,
    WORLDS,
    evaluate_scenes,
    scene_batch,
    scene_batches,
    seeded,
    sheet_of,
)

PROJECTION = 96
MASKED = 0.6
"""Share of patches that the dino stage hides."""


class EncoderStage:
    """What the two encoders share; see train.stage.Stage."""

    trained: nn.ModuleDict
    num_pictures: float = math.inf

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks, self.world = config, ranks, WORLDS[config.world]
        self.about: dict[str, Any] = {"world": config.world}

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return scene_batches(self.config, self.ranks, first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return scene_batch(self.config, "train", step, places)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """See Stage."""
        raise NotImplementedError

    def flops(self, batch: Batch) -> float:
        """None is frozen."""
        return 0.0

    def evaluate(self) -> dict[str, float]:
        """The losses on unseen scenes."""
        return evaluate_scenes(self)

    def pictures(self, batch: Batch) -> Tensor:
        """[B, 3, H, W] in [0, 1], on this rank's device."""
        return batch.tensors["pictures"].to(self.ranks.device)


class ClipStage(EncoderStage):
    """Vision and text encoder learn which caption belongs to which picture.

    Symmetric InfoNCE over the batch with a learned temperature: Radford et al. 2021,
    https://arxiv.org/abs/2103.00020. Only the vision encoder is kept.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        if ranks.world > 1 or config.micro_batch not in (None, config.batch_size):
            raise ValueError(
                "micro_batch must be none and the ranks one for stage clip, whose loss compares "
                f"all of a batch, got {config.micro_batch} and {ranks.world} ranks"
            )
        super().__init__(config, ranks)
        torch.manual_seed(config.seed)
        self.tokenizer = build_tokenizer(self.world)
        self.vision = build_clip(self.world)
        self.text = T5EncoderModel(
            T5Config(
                vocab_size=len(self.tokenizer),
                d_model=WIDTH,
                d_kv=24,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        heads = {name: nn.Linear(96, PROJECTION, bias=False) for name in ("vision", "text")}
        self.heads = nn.ModuleDict(heads)
        self.log_scale = nn.ParameterList([nn.Parameter(torch.tensor(math.log(10.0)))])
        self.trained = nn.ModuleDict(
            {"vision": self.vision, "text": self.text, "heads": self.heads, "scale": self.log_scale}
        ).to(ranks.device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Contrastive loss and the share of pictures whose own caption is nearest."""
        pictures = self.pictures(batch)
        ids = token_ids(self.tokenizer, list(batch.texts)).to(self.ranks.device)
        words = (ids != self.tokenizer.pad_token_id)[:, :, None]
        text = (self.text(ids).last_hidden_state * words).sum(1) / words.sum(1)
        # the patches' mean, so that every patch learns what is there
        vision = self.vision(normalise(pictures)).last_hidden_state[:, 1:].mean(1)
        a, b = (
            F.normalize(self.heads[name](x).float(), dim=-1)
            for name, x in (("vision", vision), ("text", text))
        )
        logits = self.log_scale[0].clamp_max(math.log(100.0)).exp() * a @ b.mT
        target = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.mT, target)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}

    def sheet(self) -> None:
        """Nothing to look at."""

    def save(self, folder: Path) -> None:
        """Write the vision encoder to folder/clip."""
        self.vision.save_pretrained(folder / "clip")


class DinoStage(EncoderStage):
    """The encoder fills in hidden patches from the visible ones.

    Mean squared error on the pixels of hidden patches: masked image modelling, Xie et al. 2021,
    https://arxiv.org/abs/2111.09886. A small share of the loss is on visible patches, so that
    features also keep what was seen.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        torch.manual_seed(config.seed)
        self.vision = build_dino(self.world)
        self.head = nn.Linear(self.vision.config.hidden_size, 3 * PATCH * PATCH)
        self.trained = nn.ModuleDict({"vision": self.vision, "head": self.head}).to(ranks.device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Error on hidden patches, plus 0.2 of the error on visible ones."""
        pictures = self.pictures(batch)
        target = patches(pictures) * 2 - 1
        seeds = [seed_of(self.config.seed, batch.step, place) for place in batch.places]
        drawn = torch.stack([torch.rand(target.shape[1], generator=seeded(seed)) for seed in seeds])
        hidden = (drawn < MASKED).to(target.device)
        features = self.vision(normalise(pictures), bool_masked_pos=hidden).last_hidden_state
        error = (self.head(features[:, 1:]).float() - target).square().mean(-1)
        masked, visible = _mean_of(error, hidden), _mean_of(error, ~hidden)
        return {"loss": masked + 0.2 * visible, "masked": masked, "visible": visible}

    @torch.no_grad()
    def sheet(self) -> Tensor:
        """Pictures, what was left of them, what the encoder made of that."""
        batch = scene_batch(self.config, "test", 0, [range(SHEET_PICTURES)])[0]
        pictures = self.pictures(batch)
        drawn = torch.rand(len(pictures), (self.world.size // PATCH) ** 2, generator=seeded(0))
        hidden = (drawn < MASKED).to(pictures.device)
        features = self.vision(normalise(pictures), bool_masked_pos=hidden).last_hidden_state
        filled = F.fold(
            (self.head(features[:, 1:]).mT + 1) / 2, self.world.size, PATCH, stride=PATCH
        )
        cover = hidden.view(16, 1, self.world.size // PATCH, -1).float()
        left = pictures * (1 - F.interpolate(cover, scale_factor=PATCH))
        return sheet_of(pictures, left, filled)

    def save(self, folder: Path) -> None:
        """Write the vision encoder to folder/dino."""
        self.vision.save_pretrained(folder / "dino")


def _mean_of(error: Tensor, which: Tensor) -> Tensor:
    # each picture's own mean first: pictures weigh the same in whatever batches they come
    return ((error * which).sum(1) / which.sum(1).clamp_min(1)).mean()


def normalise(pictures: Tensor) -> Tensor:
    """[0, 1] -> [-1, 1]: mean and standard deviation 0.5, as the adapter will."""
    return pictures * 2 - 1


def patches(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H W / PATCH**2, 3 PATCH**2], row-major."""
    return F.unfold(pictures, PATCH, stride=PATCH).mT
