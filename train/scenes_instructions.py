"""Stage "instructions": the encoder that reads instructions of the scenes world; frozen after."""

import copy
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_fast.editors.text import InstructionEncoder
from sda_fast.scenes.captions import caption
from sda_fast.scenes.edits import sample_edits
from sda_fast.scenes.models import MASK, WIDTH, build_instruction_encoder, token_ids
from train.batch import Batch, seed_of
from train.config import TrainConfig
from train.ranks import Ranks
from train.stage import HELD_OUT, WORLDS, seeded, shares

MASKED = 0.25
"""Share of words that are hidden: each says much of an instruction."""
EVALUATED = 256


class InstructionsStage:
    """The encoder fills in hidden words of instructions and captions; see train.stage.Stage.

    Masked language modelling, Devlin et al. 2018, https://arxiv.org/abs/1810.04805, with the mask
    token in the place of every hidden word.
    """

    num_pictures: float = math.inf

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        shares(config, ranks)
        self.config, self.ranks, self.world = config, ranks, WORLDS[config.world]
        self.about: dict[str, Any] = {"world": config.world}
        torch.manual_seed(config.seed)
        self.tokenizer, self.encoder = build_instruction_encoder(self.world)
        self.head = nn.Linear(WIDTH, len(self.tokenizer))
        self.trained = nn.ModuleDict({"text": self.encoder, "head": self.head})
        self.trained.to(ranks.device)

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        places = shares(self.config, self.ranks)
        step = first
        while True:
            yield self.batches_of(step, places)
            step += 1

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """Instructions at even places, captions at odd ones; step 0 is never trained on."""
        seed = self.config.seed * 10**9 + step if step else HELD_OUT
        split = "train" if step else "test"
        edits = sample_edits(self.world, split, seed, max(share.stop for share in places))
        rng = np.random.default_rng([1, seed])
        texts = [
            caption(edit.source, rng) if place % 2 else edit.instruction
            for place, edit in enumerate(edits)
        ]
        return [
            Batch(
                step=step,
                places=tuple(share),
                ids=tuple(f"text {seed}/{place}" for place in share),
                tensors={},
                size=(self.world.size, self.world.size),
                texts=tuple(texts[place] for place in share),
            )
            for share in places
        ]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy at hidden words, and the share of them that is found."""
        ids = token_ids(self.tokenizer, list(batch.texts)).to(self.ranks.device)
        seeds = [seed_of(self.config.seed, batch.step, place) for place in batch.places]
        drawn = torch.stack([torch.rand(ids.shape[1], generator=seeded(seed)) for seed in seeds])
        ends = torch.tensor(self.tokenizer.all_special_ids, device=ids.device)
        hidden = (drawn < MASKED).to(ids.device) & ~torch.isin(ids, ends)
        asked = ids.masked_fill(hidden, self.tokenizer.get_vocab()[MASK])
        said = (ids != self.tokenizer.pad_token_id).long()
        logits = self.head(self.encoder(asked, attention_mask=said).last_hidden_state).float()
        error = F.cross_entropy(logits.mT, ids, reduction="none")
        found = (logits.argmax(-1) == ids).float()
        # each text's own mean first: texts weigh the same in whatever batches they come
        loss, accuracy = (
            ((value * hidden).sum(1) / hidden.sum(1).clamp_min(1)).mean()
            for value in (error, found)
        )
        return {"loss": loss, "accuracy": accuracy.detach()}

    def flops(self, batch: Batch) -> float:
        """None is frozen."""
        return 0.0

    def evaluate(self) -> dict[str, float]:
        """The losses on unseen texts."""
        batch = self.batches_of(0, [range(EVALUATED)])[0]
        return {name: value.item() for name, value in self.losses(batch).items()}

    def sheet(self) -> None:
        """Nothing to look at."""

    def save(self, folder: Path) -> None:
        """Write the encoder and its tokenizer to folder/instructions."""
        # InstructionEncoder freezes what it is given
        encoder = InstructionEncoder(self.tokenizer, copy.deepcopy(self.encoder))
        encoder.save_pretrained(folder / "instructions")
