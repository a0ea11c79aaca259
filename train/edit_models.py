"""The models of an editor's run: the editor that learns, and what stays frozen around it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sda_fast.adapter import SemanticAdapter
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.pipeline_folder import load_flux
from sda_fast.weights import digest, fingerprint
from train.config import EditConfig, FluxConfig, PictureEditConfig
from train.flux import models_of
from train.frozen import (
    TO_DECODE,
    Frozen,
    Readers,
    frozen_flux,
    frozen_readers,
    frozen_scenes,
    require,
)
from train.ranks import Ranks
from train.stage import WORLDS

BUT_T5 = (*TO_DECODE, "vae", "image_encoder", "feature_extractor")
"""Components of a Flux pipeline that are not its T5."""
AT_ONCE = 1024
"""Instructions that are checked at a time."""

Read = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B instructions -> (text [B, T, ...], mask bool [B, T])."""


@dataclass(frozen=True, slots=True)
class Behind:
    """An adapter and what goes with it; none of it learns.

    Attributes:
        adapter: in f32, on the rank's device.
        fingerprint: of the adapter.
        readers: encoders and VAE; None where everything was precomputed.
        frozen: the same with the decoder; None where it is left out.
    """

    adapter: Any
    fingerprint: str
    readers: Readers | None = None
    frozen: Frozen | None = None

    @torch.no_grad()
    def tokens(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], uint8 or in [0, 1] -> positions [B, N, C], as in use."""
        assert self.readers is not None
        features, grid = self.readers.features(_pixels(pictures))
        with torch.autocast(pictures.device.type, enabled=False):
            return self.adapter(features, grid)

    def latents(self, pictures: Tensor) -> Tensor:
        """Likewise -> what diffusion starts from, [B, c, h, w]."""
        assert self.readers is not None
        return self.readers.latents(_pixels(pictures))

    def embedding(self, tokens: Tensor) -> SemanticEmbedding:
        """Positions as the decoder takes them."""
        assert self.frozen is not None
        pooled = self.frozen.pooled.to(tokens).expand(len(tokens), -1)
        return SemanticEmbedding(tokens, self.adapter.tree, pooled)


def load_adapter(config: EditConfig, ranks: Ranks) -> Behind:
    """The adapter alone: small, so that what does not fit it is refused early.

    Raises:
        FileNotFoundError: it is not there, or not said where.
        ValueError: see ``SemanticAdapter.from_pretrained``.
    """
    path = config.adapter
    if path is None:
        if isinstance(config, PictureEditConfig):
            raise FileNotFoundError("the adapter must be given as a folder or hub id: adapter=...")
        path = require(config.part("adapter"), "adapter")
    adapter: Any = SemanticAdapter.from_pretrained(path, dtype=torch.float32)
    adapter.requires_grad_(False).eval().to(ranks.device)
    return Behind(adapter, fingerprint(adapter))


def load_behind(config: EditConfig, known: Behind, ranks: Ranks, decodes: bool) -> Behind:
    """The adapter with its encoders and, if wanted, the decoder.

    Args:
        config: of the run.
        known: of ``load_adapter``.
        ranks: of the run.
        decodes: whether the decoder is wanted.

    Raises:
        FileNotFoundError: a model is not there.
        ValueError: one does not fit the adapter; or see ``frozen_scenes`` and ``frozen_flux``.
    """
    around = config.around(known.adapter.tree.tokens_per_node)
    if not isinstance(around, FluxConfig):
        readers: Readers = frozen_scenes(around, ranks, WORLDS[config.world].size)
    else:
        readers = frozen_flux(around, ranks) if decodes else frozen_readers(around, ranks)
    known.adapter.set_encoder(readers.encoder)
    frozen = readers if decodes and isinstance(readers, Frozen) else None
    if frozen is not None:
        width = known.adapter.config["out_features"]
        taken = frozen.flux.transformer.config.joint_attention_dim
        if taken != width:
            raise ValueError(
                f"adapter must give positions of the {taken} channels that flux takes, got {width}"
            )
    return Behind(known.adapter, known.fingerprint, readers, frozen)


def build_editor(config: EditConfig, behind: Behind, ranks: Ranks) -> tuple[Any, Read]:
    """(a new editor for the adapter's embeddings, what reads instructions for it).

    Raises:
        FileNotFoundError: the encoder of instructions, or the language model, is not there.
        ImportError: peft is not installed, where a language model edits.
        ValueError: see ``EmbeddingEditor``, ``LLMEditor`` and ``InstructionEncoder``.
    """
    adapter = behind.adapter
    known = {
        "tokens_per_node": adapter.tree.tokens_per_node,
        "channels": adapter.config["out_features"],
        "adapter": behind.fingerprint,
    }
    if config.llm is not None:
        from sda_fast.editors.llm import LLMEditor

        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        torch.manual_seed(config.seed)
        llm: Any = LLMEditor.from_base(config.llm, lora_rank=config.lora_rank, dtype=dtype, **known)
        return llm.to(ranks.device), llm.encode_text
    from sda_fast.editors.t5 import EmbeddingEditor

    encoder = load_instructions(config, ranks)
    sizes = {name: getattr(config, name) for name in ("width", "num_layers", "num_heads")}
    torch.manual_seed(config.seed)
    editor: Any = EmbeddingEditor(
        **known,
        **sizes,
        text_features=encoder.features,
        instructions=encoder.fingerprint,
        mode=config.mode,
        head_dim=config.width // config.num_heads,
        ff_width=config.ff_width,
    )
    # not attached: the average of the run would hold a copy of it
    return editor.to(ranks.device), encoder


def load_instructions(config: EditConfig, ranks: Ranks) -> InstructionEncoder:
    """What reads instructions: of scenes as its run exported it, of pictures FLUX's own T5.

    Raises:
        FileNotFoundError: it is not there, or not said where.
        ValueError: see ``InstructionEncoder.from_pretrained`` and ``load_flux``.
    """
    pictures = isinstance(config, PictureEditConfig)
    dtype = torch.bfloat16 if pictures and config.precision == "bf16" else torch.float32
    if config.instructions is not None:
        return InstructionEncoder.from_pretrained(config.instructions, dtype).to(ranks.device)
    if not pictures:
        path = require(config.part("instructions"), "instructions")
        return InstructionEncoder.from_pretrained(path, dtype).to(ranks.device)
    if config.flux is None:
        raise FileNotFoundError(
            "what reads instructions must be given: instructions=..., or flux=... for its T5"
        )
    flux: Any = load_flux(config.flux, dtype, dict.fromkeys(BUT_T5))
    if flux.text_encoder_2 is None or flux.tokenizer_2 is None:
        raise FileNotFoundError(f"flux must come with its T5, got {config.flux}: instructions=...")
    return InstructionEncoder(flux.tokenizer_2, flux.text_encoder_2).to(ranks.device)


def describe_editor(editor: Any, read: Read) -> dict[str, Any]:
    """Arguments of an editor and which models it learns with, for checkpoints; JSON."""
    known = {name: value for name, value in editor.config.items() if not name.startswith("_")}
    known["tokens_per_node"] = list(known["tokens_per_node"])
    if isinstance(read, InstructionEncoder):
        known["instructions"] = digest(read.model)
    return known


def describe_behind(behind: Behind) -> dict[str, Any]:
    """Which frozen models a run has, for checkpoints; JSON. The adapter is in the editor's config.

    What was precomputed says by itself which encoders it was made by.
    """
    if behind.frozen is not None:
        return behind.frozen.about
    return {} if behind.readers is None else models_of(behind.readers)


def check_instructions(read: Read, texts: Sequence[str]) -> None:
    """See that every instruction can be read, before anything is computed.

    Raises:
        ValueError: one is too long; it is shown.
    """
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        if isinstance(read, InstructionEncoder):
            read.token_ids(some)
        else:
            read(some)  # of a language model: tokens, nothing computed


def _pixels(pictures: Tensor) -> Tensor:
    return pictures if pictures.is_floating_point() else pictures.float() / 255
