"""Stages "edit" and "edit-pictures": an editor learns what an instruction does to an embedding."""

from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sda_fast.editors.prediction import Prediction
from sda_fast.editors.result import TOUCHED, relative_change
from sda_fast.editors.text import InstructionEncoder
from sda_fast.losses import edit_loss
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults
from train.adapter import SHEET_STEPS, flow_error
from train.batch import Batch
from train.config import EditConfig, PictureEditConfig
from train.data.edit_pairs import SOURCE, TARGET
from train.edit_data import LATENTS, made_by, open_data, open_pairs, said
from train.edit_models import (
    build_editor,
    describe_behind,
    describe_editor,
    load_adapter,
    load_behind,
)
from train.flux import check_made
from train.ranks import Ranks
from train.stage import SHEET_PICTURES, mean_over_shares, shares, sheet_of


class EditStage:
    """Adapter, encoders, decoder and what reads instructions are frozen; see train.stage.Stage.

        loss = edit loss + config.flow * velocity error through the decoder

    In mode delta only positions whose gate should be open pay the edit loss, and the gate's own
    error, a binary cross-entropy, is added: open are those that the edit changes by more than
    ``TOUCHED``. The decoder then sees what the gate lets through, and its gradient reaches the
    gate as if that were soft (straight-through: Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432).
    """

    def __init__(self, config: EditConfig, ranks: Ranks) -> None:
        shares(config, ranks)  # refused before anything is loaded
        self.config, self.ranks = config, ranks
        behind = load_adapter(config, ranks)
        pairs = open_pairs(config, behind)
        self.editor, self.read_text = build_editor(config, behind, ranks)
        self.data = open_data(config, pairs, self.read_text, ranks)
        self.num_pictures = self.data.num_pictures
        decodes = config.decoder != "none"
        if decodes or pairs is None or not isinstance(config, PictureEditConfig):
            behind = load_behind(config, behind, ranks, decodes)
        if pairs is not None:  # once more: now its encoders are known
            check_made("pairs", pairs, made_by(config, behind))
        self.behind = behind
        self.trained: nn.Module = nn.ModuleDict({"editor": self.editor})
        self.about: dict[str, Any] = {
            "editor": describe_editor(self.editor, self.read_text),
            "frozen": describe_behind(behind),
            **self.data.about,
        }

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return self.data.batches(first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return self.data.batches_of(step, places)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of what the editor writes after the right words: the target is its teacher."""
        source, target = self.tokens(batch)
        found = self.editor(source, *self.text(batch), target)
        return self.measure(batch, source, target, found)

    def measure(
        self, batch: Batch, source: Tensor, target: Tensor, found: Prediction
    ) -> dict[str, Tensor]:
        """The losses of a prediction."""
        tokens, gate = found.tokens, found.gate
        opened = None if gate is None else relative_change(source, target) > TOUCHED
        error = edit_loss(tokens, target, opened)
        loss, parts = error, {"edit": error.detach()}
        if gate is not None and opened is not None:
            wrong = F.binary_cross_entropy_with_logits(gate.float(), opened.float())
            soft = gate.sigmoid()
            # zero, but for gradients
            reached = (soft - soft.detach())[..., None] * (tokens - source)
            tokens = found.over(source) + reached
            loss = loss + wrong
            parts |= {"gate": wrong.detach(), "gate_share": (gate > 0).float().mean()}
        if self.config.flow:
            flow = self.flow(batch, tokens)
            loss = loss + self.config.flow * flow
            parts["flow"] = flow.detach()
        return {"loss": loss, **parts}

    def flow(self, batch: Batch, tokens: Tensor) -> Tensor:
        """Velocity error of positions against the target's picture."""
        behind = self.behind
        assert behind.frozen is not None
        latents = batch.tensors.get(LATENTS)
        if latents is None:
            latents = behind.latents(self.moved(batch, TARGET))
        # what is not finite shows in the loss; here it must not stop one rank alone
        emb = behind.embedding(tokens.nan_to_num())
        return flow_error(
            behind.frozen, batch, self.config.seed, emb, latents.to(self.ranks.device)
        )

    def tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Positions [B, N, C] f32 of sources and targets."""
        pair = self.moved(batch, SOURCE), self.moved(batch, TARGET)
        if LATENTS not in batch.tensors:
            pair = self.behind.tokens(pair[0]), self.behind.tokens(pair[1])
        return pair[0].float(), pair[1].float()

    def text(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Instructions as the editor takes them, with their mask."""
        with self._as_in_use():
            text, mask = self.read_text(said(batch))
        # of a language model it is tokens
        return text.float() if text.is_floating_point() else text, mask

    def written(self, source: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, C]: what the editor makes of positions by itself."""
        with self._as_in_use():
            return self.editor.generate(source, *text).over(source)

    def _as_in_use(self) -> torch.autocast:
        """Everything computes in the dtype of its own weights."""
        return torch.autocast(self.ranks.device.type, enabled=False)

    def moved(self, batch: Batch, name: str) -> Tensor:
        """A tensor of the batch on this rank's device."""
        return batch.tensors[name].to(self.ranks.device, non_blocking=True)

    def flops(self, batch: Batch) -> float:
        """See Stage."""
        frozen = self.behind.frozen
        if frozen is None or not self.config.flow:
            return 0.0
        from sda_fast.cost import flux_flops

        h, w = (side // frozen.patch for side in batch.size)
        positions = self.behind.adapter.tree.num_tokens
        config = frozen.flux.transformer.config
        return len(batch.ids) * flux_flops(config, positions, h * w, backward=True)

    def evaluate(self) -> dict[str, float]:
        """Losses on held-out edits.

        "written" is the edit loss of what the editor writes by itself, as in use; "unedited" that
        of the source as it is.
        """

        def measure(share: range) -> dict[str, Tensor]:
            batch = self.data.held_out(share)
            source, target = self.tokens(batch)
            text = self.text(batch)
            losses = self.measure(batch, source, target, self.editor(source, *text, target))
            written = self.written(source, text)
            alone = {"written": edit_loss(written, target), "unedited": edit_loss(source, target)}
            return losses | alone

        return mean_over_shares(self.ranks, self.data.unseen_shares(self._at_once), measure)

    def sheet(self) -> Tensor | None:
        """Held-out sources, what the editor writes and the targets, all as the decoder draws them.

        None without a decoder.
        """
        behind, rows = self.behind, ([], [], [])
        if behind.frozen is None:
            return None
        behind.frozen.decoder.free()
        every = self.data.unseen_shares(min(self._at_once, SHEET_PICTURES))
        guidance = self.config.guidance if isinstance(self.config, PictureEditConfig) else 1.0
        size, left = self.data.held_out(every[0]).size, SHEET_PICTURES
        defaults = DecodeDefaults(*size, SHEET_STEPS, guidance)
        pipe = SemanticPipeline(behind.frozen.flux, behind.adapter, defaults)
        for share in every:
            batch = self.data.held_out(share)
            if left <= 0 or batch.size != size:
                break
            source, target = self.tokens(batch)
            written = self.written(source, self.text(batch))
            for row, tokens in zip(rows, (source, written, target), strict=True):
                emb = behind.embedding(tokens.nan_to_num())
                drawn = cast(Tensor, pipe.decode(emb, rule=self.config.rule, output="pt"))
                row.append(drawn.float().cpu())
            left -= len(batch.ids)
        return sheet_of(*map(torch.cat, rows))

    @property
    def _at_once(self) -> int:
        """Edits of a micro-batch."""
        return len(shares(self.config, self.ranks)[0])

    def save(self, folder: Path) -> None:
        """Write the editor to folder/editor, and what reads for it to folder/instructions.

        FLUX's own T5 is not written again.
        """
        self.editor.save_pretrained(folder / "editor")
        of_flux = isinstance(self.config, PictureEditConfig) and self.config.instructions is None
        if isinstance(self.read_text, InstructionEncoder) and not of_flux:
            self.read_text.save_pretrained(folder / "instructions")
