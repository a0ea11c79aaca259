"""The editor of the seed: the decoder half of a T5 that writes a new embedding."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.import_utils import is_accelerate_available
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Stack

from sda_fast.cuda_graphs import GraphCache
from sda_fast.editors.prediction import Prediction
from sda_fast.editors.result import (
    TOUCHED,
    EditResult,
    relative_change,
    spread_instructions,
    unpack_source,
)
from sda_fast.editors.t5_config import PRESETS, Mode, check_config, decoder_config
from sda_fast.editors.t5_decode import Writers, generate
from sda_fast.editors.t5_inputs import above_table, additive, level_mask, order_mask
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.files import moved_in_when_whole
from sda_fast.flux_inputs import check_finite
from sda_fast.hierarchy import Hierarchy
from sda_fast.ops.device_tables import kept_table
from sda_fast.weights import DTYPE, check_weights, read_config, resolve_folder, same_model


class EmbeddingEditor(ModelMixin, ConfigMixin):
    """(embedding, instruction) -> embedding, by a T5 decoder that cross-attends to both.

    What the decoder reads is ``concat(embedding, text)``, each projected to its width where that
    differs, positions with a learned vector of their own. What it writes depends on the mode:

    - ``autoregressive``: position after position, level by level, each from those before.
    - ``level``: a level at a time, each position from the level above and from its own source.
    - ``prefilled``: all at once, each from its own source.
    - ``delta``: likewise, but a change to the source and a gate: where the gate is closed the
      source comes out bit for bit.

    The encoder that reads instructions is attached with ``set_text_encoder`` and stays outside
    state dict, ``parameters()`` and ``to``: in a FLUX pipeline it is the pipeline's own T5.

    Args:
        tokens_per_node: of the ``Hierarchy`` of embeddings.
        channels: C of a position: 4096 for FLUX.
        text_features: F of a token of the instruction.
        mode: see above.
        width: of the decoder.
        num_layers: likewise.
        num_heads: likewise.
        head_dim: likewise.
        ff_width: of its gated feed-forward.
        adapter: ``fingerprint`` of the adapter whose embeddings it learned; None: not known.
        instructions: ``InstructionEncoder.fingerprint`` of what read for it; None: not known.

    Raises:
        ValueError: an argument that cannot be; the message names it.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        tokens_per_node: Sequence[int] = (32, 8, 4),
        channels: int = 4096,
        text_features: int = 4096,
        mode: Mode = "autoregressive",
        width: int = 1024,
        num_layers: int = 24,
        num_heads: int = 16,
        head_dim: int = 64,
        ff_width: int = 2816,
        adapter: str | None = None,
        instructions: str | None = None,
    ) -> None:
        super().__init__()
        check_config(self.config)
        self.tree = Hierarchy(tuple(tokens_per_node))
        self.mode = mode
        self.decoder = T5Stack(decoder_config(self.config))
        self.decoder.embed_tokens = None  # pyrefly: ignore[bad-assignment]
        self.positions = nn.Parameter(0.3 * torch.randn(self.tree.num_tokens, width))
        self.embed = nn.Identity() if channels == width else nn.Linear(channels, width)
        self.embed_text = (
            nn.Identity() if text_features == width else nn.Linear(text_features, width)
        )
        self.project = nn.Identity() if channels == width else nn.Linear(width, channels)
        if mode in ("autoregressive", "level"):
            self.begin = nn.Parameter(0.3 * torch.randn(width))
        if mode == "level":
            self.embed_above = nn.Linear(width, width)
        if mode == "delta":
            self.gate = nn.Linear(width, 1)
        self._text_encoder: list[InstructionEncoder] = []  # a list hides it from nn.Module
        self.graphs, self.writers = GraphCache(), Writers()

    @property
    def text_encoder(self) -> InstructionEncoder | None:
        """The attached encoder of instructions, or None."""
        return self._text_encoder[0] if self._text_encoder else None

    def set_text_encoder(self, encoder: InstructionEncoder | None) -> None:
        """Attach what reads instructions; None takes it off.

        Raises:
            ValueError: its tokens are not as wide as ``text_features``, or another one read for
                the editor when it learned.
        """
        wanted, known = self.config["text_features"], self.config["instructions"]
        if encoder is not None and encoder.features != wanted:
            raise ValueError(f"encoder must give {wanted} features, got {encoder.features}")
        if encoder and known is not None and not same_model(known, encoder.fingerprint):
            raise ValueError(
                f"encoder must be the one that the editor learned with, {known}, "
                f"got {encoder.fingerprint}"
            )
        self._text_encoder = [] if encoder is None else [encoder]

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(text [B, T, F], mask [B, T]) of instructions, on the editor's device and in its dtype.

        Raises:
            ValueError: no encoder is attached, or an instruction is too long.
        """
        if self.text_encoder is None:
            raise ValueError(
                "the editor has no encoder of instructions: attach one with set_text_encoder"
            )
        text, mask = self.text_encoder(texts)
        return text.to(self.device, self.dtype), mask.to(self.device)

    def forward(
        self, source: Tensor, text: Tensor, mask: Tensor, target: Tensor | None = None
    ) -> Prediction:
        """What the editor says in training: all positions in one pass.

        Args:
            source: [B, N, C].
            text: [B, T, F].
            mask: bool [B, T], True at what was said.
            target: [B, N, C], what positions before (autoregressive) or above (level) are taken
                from; the other modes do not read it.

        Raises:
            ValueError: the mode needs a target and there is none.
        """
        if target is None and self.mode in ("autoregressive", "level"):
            raise ValueError(f"target must be given in mode {self.mode}, got None")
        memory = self.memory(source, text)
        hidden = self.decoder(
            inputs_embeds=self.inputs(source, target),
            attention_mask=self.self_mask(memory),
            encoder_hidden_states=memory,
            encoder_attention_mask=self.memory_mask(mask),
            use_cache=False,
        ).last_hidden_state
        return self.read(hidden, source)

    def memory(self, source: Tensor, text: Tensor) -> Tensor:
        """[B, N + T, width]: what the decoder cross-attends to."""
        known = self.embed(source) + self.positions
        return torch.cat([known, self.embed_text(text).to(known.dtype)], dim=1)

    def memory_mask(self, mask: Tensor) -> Tensor:
        """Bool [B, T] -> what is added to scores of the memory, [B, 1, 1, N + T]."""
        seen = torch.nn.functional.pad(mask, (self.tree.num_tokens, 0), value=True)
        return additive(seen[:, None, None], self.dtype)

    def inputs(self, source: Tensor, target: Tensor | None) -> Tensor:
        """[B, N, width]: what the decoder reads at each position."""
        if self.mode == "autoregressive":
            assert target is not None
            begin = self.begin.expand(len(source), 1, -1)
            before = torch.cat([begin, self.embed(target[:, :-1])], dim=1)
            return before + self.positions
        if self.mode == "level":
            assert target is not None
            return self.level_inputs(source, target, slice(0, self.tree.num_tokens))
        return self.embed(source) + self.positions

    def level_inputs(self, source: Tensor, written: Tensor, span: slice) -> Tensor:
        """[B, n, width] of mode level at the positions of a span.

        Args:
            source: [B, N, C].
            written: [B, M, C], all positions above the span at least.
            span: of positions.
        """
        table = kept_table(above_table, (self.tree,), source, "an editor must run once before")
        table = table[span].to(written.dtype)
        above = self.embed_above(self.embed(table[:, : written.shape[1]] @ written))
        inputs = torch.where(table.any(dim=1)[:, None], above, self.begin)
        return inputs + self.embed(source[:, span]) + self.positions[span]

    def self_mask(self, like: Tensor) -> Tensor:
        """What is added to scores between positions, [1, 1, N, N]."""
        if self.mode == "autoregressive":
            return additive(order_mask(self.tree).to(like.device), self.dtype)
        if self.mode == "level":
            return additive(level_mask(self.tree).to(like.device), self.dtype)
        n = self.tree.num_tokens
        return torch.zeros(1, 1, n, n, dtype=self.dtype, device=like.device)

    def read(self, hidden: Tensor, source: Tensor) -> Prediction:
        """The decoder's output [B, n, width] at positions whose sources are [B, n, C]."""
        tokens = self.project(hidden)
        if self.mode != "delta":
            return Prediction(tokens)
        return Prediction(source + tokens.to(source.dtype), self.gate(hidden)[..., 0])

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        text: Tensor,
        mask: Tensor,
        *,
        cache: bool = True,
        graph: bool = False,
    ) -> Prediction:
        """What the editor says in use, from its own words only.

        Args:
            source: [B, N, C].
            text: [B, T, F].
            mask: bool [B, T].
            cache: keep keys and values of positions already written, in the modes that write
                in several passes; else each pass goes over all of them again.
            graph: run as CUDA graphs, one a pass, captured for each shape; needs cache.

        Raises:
            ValueError: graph is wanted without cache, or of weights that are on no GPU.
        """
        return generate(self, (source, text, mask), cache, graph)

    def edit(
        self,
        emb: SemanticEmbedding | EditResult,
        instruction: str | Sequence[str],
        *,
        graph: bool = False,
    ) -> EditResult:
        """See ``sda_fast.editors.result.Editor``; graph as in ``generate``.

        Device and dtype of the embedding are kept. In mode delta the edited positions are those
        with an open gate; in the others those that changed by more than ``TOUCHED``.

        Raises:
            ValueError: of another hierarchy or width, an empty or over-long instruction, or no
                encoder of instructions is attached.
            FloatingPointError: the editor's own numbers are not finite.
        """
        source, parent = unpack_source(emb, self.tree, self.config["channels"])
        check_finite("emb", source.tokens)  # it may share memory that was written since
        instructions = spread_instructions(instruction, len(source))
        text, mask = self.encode_text(instructions)
        tokens = source.tokens.to(self.device, self.dtype)
        found = self.generate(tokens, text, mask, graph=graph)
        # a gate that is NaN would count as closed
        if not all(t.isfinite().all() for t in (found.tokens, found.gate) if t is not None):
            raise FloatingPointError("the editor gave NaN or infinity: its weights may be broken")
        new = found.over(tokens).to(source.tokens)
        if found.gate is None:
            edited = relative_change(source.tokens, new) > TOUCHED
        else:
            # not by way of the editor's dtype: what is closed stays bit for bit
            edited = (found.gate > 0).to(new.device)
            new = torch.where(edited[..., None], new, source.tokens)
        result = SemanticEmbedding(new, source.tree, source.pooled)
        return EditResult(result, source, instructions, edited, parent)

    @classmethod
    def from_preset(cls, name: str, **config: Any) -> "EmbeddingEditor":
        """A new editor with random weights, in the sizes of ``PRESETS[name]``.

        Args:
            name: "t5-base", "t5-large" or "t5-xxl".
            config: other arguments of the editor.

        Raises:
            ValueError: there is no such preset, or see the class.
        """
        if name not in PRESETS:
            raise ValueError(f"name must be one of {sorted(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **config})

    # pyrefly: ignore[bad-override]
    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Write config.json and the weights, in the place of an earlier save once whole.

        Args:
            save_directory: created if it is not there; other files in it stay.
            kwargs: of ``ModelMixin.save_pretrained``.

        Raises:
            ValueError: ``safe_serialization=False``: no pickle is written.
            OSError: it is a file, or something cannot be written.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError("safe_serialization must stay True: no pickle is written")
        with moved_in_when_whole(save_directory, self.config_name, _is_own_file) as scratch:
            super().save_pretrained(scratch, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, **kwargs: Any
    ) -> "EmbeddingEditor":
        """Load what ``save_pretrained`` wrote; what reads instructions is attached afterwards.

        Args:
            pretrained_model_name_or_path: a folder or a hub id.
            kwargs: of ``ModelMixin.from_pretrained``: ``dtype``, ``local_files_only`` ...

        Raises:
            ValueError: the config is another model's, the weights are pickled, truncated or
                foreign, or they do not fit the config.
            OSError: there is no such folder, or the hub is out of reach.
        """
        path = pretrained_model_name_or_path
        if path is None:
            raise ValueError("pretrained_model_name_or_path must be a folder or a hub id, got None")
        folder = resolve_folder(path, "editor", kwargs.pop("local_files_only", None) or False)
        _check_folder(folder, cls.__name__)
        given = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        kwargs[DTYPE] = given[1] if given[0] is None else given[0]
        kwargs.setdefault("low_cpu_mem_usage", is_accelerate_available())
        try:
            model, info = super().from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, **kwargs
            )
        except (RuntimeError, ValueError) as error:  # a size mismatch is either of them
            raise _misfit(folder, error) from error
        faults = {name: found for name, found in info.items() if found}
        if faults:
            raise _misfit(folder, faults)
        model.register_to_config(_name_or_path="" if Path(path).exists() else str(path))
        return model


def _check_folder(folder: Path, name: str) -> None:
    """Refuse a folder that holds another model or unsafe or torn weights."""
    config = read_config(folder, "editor")
    found = config.get("_class_name")
    if found != name:
        raise ValueError(f"editor: {folder} must hold an {name}, got the config of {found!r}")
    try:
        check_config(config)
    except ValueError as error:
        raise ValueError(f"editor: {folder / 'config.json'}: {error}") from error
    check_weights(folder, "editor")


def _is_own_file(name: str) -> bool:
    return name.startswith("diffusion_pytorch_model") and ".safetensors" in name


def _misfit(folder: Path, reason: object) -> ValueError:
    return ValueError(f"editor: {folder} holds weights that do not fit its config: {reason}"[:600])
