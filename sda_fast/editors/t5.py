"""The editor of the seed: the decoder half of a T5 that writes a new embedding."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Stack

from sda_fast.cuda_graphs import GraphCache
from sda_fast.editors.prediction import Prediction, result_of
from sda_fast.editors.result import EditResult, spread_instructions, unpack_source
from sda_fast.editors.t5_config import PRESETS, Mode, check_config, decoder_config
from sda_fast.editors.t5_decode import Writers, generate
from sda_fast.editors.t5_inputs import above_table, additive, level_mask, order_mask
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.flux_inputs import check_finite
from sda_fast.hierarchy import Hierarchy
from sda_fast.model_folder import FolderModel
from sda_fast.ops.device_tables import kept_table
from sda_fast.weights import same_model


class EmbeddingEditor(FolderModel):
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

    role = "editor"

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
        return result_of(found, tokens, source, instructions, parent)

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

    @classmethod
    def check_config(cls, config: Mapping[str, Any]) -> None:
        """See ``FolderModel``."""
        check_config(config)
