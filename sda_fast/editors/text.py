"""Instructions as vectors: a frozen T5 encoder with its tokenizer."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from sda_fast.weights import check_weights, fingerprint, read_config, resolve_folder

MULTIPLE = 16
"""Texts are padded to a multiple of so many tokens: few shapes, hence few CUDA graphs."""
PARTS = ("text_encoder", "tokenizer")


class InstructionEncoder:
    """A frozen T5 encoder that reads instructions.

    In a FLUX pipeline it is ``InstructionEncoder(flux.tokenizer_2, flux.text_encoder_2)``.

    Args:
        tokenizer: of transformers.
        model: a T5EncoderModel, or another model whose ``last_hidden_state`` is [B, T, F].
        max_length: tokens of the longest instruction; None is the tokenizer's own.

    Raises:
        ValueError: max_length is neither given nor known.
    """

    def __init__(self, tokenizer: Any, model: Any, max_length: int | None = None) -> None:
        limit = tokenizer.model_max_length if max_length is None else max_length
        if not 0 < limit < 10**6:  # a tokenizer that knows none says 10**30
            raise ValueError(f"max_length must be positive and known, got {limit}")
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.max_length = int(limit)

    @property
    def features(self) -> int:
        """F: channels of a token."""
        return self.model.config.d_model

    @property
    def fingerprint(self) -> str:
        """Which model reads, by the beginning of each of its weights: a T5-XXL has 9 GB."""
        return fingerprint(self.model, most=1024)

    def to(self, *args: Any, **kwargs: Any) -> "InstructionEncoder":
        """Move or cast the model in place, as ``torch.nn.Module.to``."""
        self.model.to(*args, **kwargs)
        return self

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each instruction; nothing is computed.

        Raises:
            ValueError: one is longer than max_length, or has a word that the tokenizer has not.
        """
        # what it would say of texts that are too long is said below
        rows = self.tokenizer(list(texts), verbose=False).input_ids
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.max_length:
                raise ValueError(
                    f"instruction must fit {self.max_length} tokens, got {len(row)}: {text[:80]!r}"
                )
            if self.tokenizer.unk_token_id in row:
                raise ValueError(
                    f"instruction must be of words that its reader knows, got {text[:80]!r}, read "
                    f"as {self.tokenizer.decode(row)!r}"
                )
        return rows

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read instructions.

        Args:
            texts: B instructions.

        Returns:
            (text [B, T, F], mask bool [B, T], True at what was said), T a multiple of MULTIPLE.

        Raises:
            ValueError: one is longer than max_length: nothing of it is cut off in silence.
        """
        rows = self.token_ids(texts)
        length = -(-max(map(len, rows)) // MULTIPLE) * MULTIPLE
        pad, device = self.tokenizer.pad_token_id, self.model.device
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=device)
        sizes = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(length, device=device) < sizes[:, None]
        return self.model(ids, attention_mask=mask.long()).last_hidden_state, mask

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write ``text_encoder/`` and ``tokenizer/``, in the place of earlier ones once whole.

        Raises:
            OSError: something cannot be written.
        """
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".partial.") as scratch:
            self.model.save_pretrained(Path(scratch) / PARTS[0])
            self.tokenizer.model_max_length = self.max_length
            self.tokenizer.save_pretrained(Path(scratch) / PARTS[1])
            for part in PARTS:
                # cut off in between, a part is missing and the folder refused: no mixture is read
                shutil.rmtree(root / part, ignore_errors=True)
            for part in PARTS:
                os.replace(Path(scratch) / part, root / part)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        dtype: torch.dtype = torch.float32,
        local_files_only: bool = False,
    ) -> "InstructionEncoder":
        """Load what ``save_pretrained`` wrote.

        Args:
            folder: or a hub id.
            dtype: of the weights.
            local_files_only: take a hub id from the cache alone.

        Raises:
            OSError: there is no such folder, or the hub is out of reach.
            ValueError: weights are pickled, truncated or of another model.
        """
        root = resolve_folder(folder, "instructions", local_files_only)
        encoder, words = (root / part for part in PARTS)
        kind = read_config(encoder, "instructions").get("model_type")
        if kind != "t5":
            raise ValueError(f"instructions must hold a t5 encoder, got {kind!r} in {encoder}")
        check_weights(encoder, "instructions")
        loaded: Any = T5EncoderModel.from_pretrained(
            encoder, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        model, info = loaded
        faults = {name: found for name, found in info.items() if found}
        if faults:
            raise ValueError(f"instructions: {encoder} does not fit its config: {faults}"[:600])
        return cls(AutoTokenizer.from_pretrained(words), model)
