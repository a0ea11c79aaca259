"""Parts of a pipeline beside its FLUX: adapter and encoders, editor and what reads words for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from sda_fast.adapter import SemanticAdapter
from sda_fast.editors.result import Editor
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.embedding import SemanticEmbedding
from sda_fast.encoders import ImageEncoder
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import fingerprint, read_config, resolve_folder, same_model


def check_fit(flux: Any, adapter: Any) -> None:
    """See that an adapter's positions are what a Flux pipeline takes.

    Raises:
        ValueError: it has no FluxTransformer2DModel, or one of another width.
    """
    model = type(getattr(flux, "transformer", None))
    if not issubclass(model, FluxTransformer2DModel):
        raise ValueError(
            "flux must be a diffusers pipeline with a FluxTransformer2DModel, "
            f"got {type(flux).__name__} with {model.__name__}"
        )
    width, given = flux.transformer.config.joint_attention_dim, adapter.config["out_features"]
    if given != width:
        raise ValueError(
            f"adapter must give positions of the {width} channels that flux takes, "
            f"got out_features={given}"
        )


def load_adapter(
    parts: Mapping[str, Any],
    encoder: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
) -> SemanticAdapter:
    """The adapter, and its encoders where there are some.

    Args:
        parts: folders or hub ids of "adapter", "clip" and "dino"; the last two may be None.
        encoder: settings of ``ImageEncoder``.
        dtype: of the weights.
        local_files_only: take hub ids from the cache alone.

    Raises:
        ValueError: see ``SemanticAdapter.from_pretrained`` and ``ImageEncoder.from_pretrained``.
        OSError: likewise.
    """
    adapter: Any = SemanticAdapter.from_pretrained(
        parts["adapter"], dtype=dtype, local_files_only=local_files_only
    ).eval()
    if parts["clip"] and parts["dino"]:
        known = parts["clip"], parts["dino"], dtype, local_files_only
        adapter.set_encoder(ImageEncoder.from_pretrained(*known, **encoder))
    return adapter


def open_editor(
    folder: Any, dtype: torch.dtype = torch.float32, local_files_only: bool = False
) -> Any:
    """The editor that a folder holds, in the class that it names.

    Args:
        folder: or a hub id.
        dtype: of the weights; what an LLMEditor learned stays float32.
        local_files_only: take hub ids from the cache alone.

    Raises:
        ImportError: it is an LLMEditor and peft is not installed.
        ValueError: it is none, or see its ``from_pretrained``.
        OSError: likewise.
    """
    kind: Any = EmbeddingEditor
    root = resolve_folder(folder, "editor", local_files_only)
    if read_config(root, "editor").get("_class_name") == "LLMEditor":
        from sda_fast.editors.llm import LLMEditor

        kind = LLMEditor
    return kind.from_pretrained(folder, dtype=dtype, local_files_only=local_files_only).eval()


def load_editor(
    parts: Mapping[str, Any], flux: Any, dtype: torch.dtype, local_files_only: bool
) -> Any:
    """The editor, if there is one, with what reads its instructions.

    Args:
        parts: folders or hub ids of "editor" and "instructions", or None; without instructions
            FLUX's own T5 reads them, if it was loaded. An LLMEditor reads for itself.
        flux: the pipeline.
        dtype: of the weights.
        local_files_only: take hub ids from the cache alone.

    Raises:
        ImportError: see ``open_editor``.
        ValueError: see ``open_editor`` and ``InstructionEncoder.from_pretrained``.
        OSError: likewise.
    """
    if not parts["editor"]:
        return None
    editor = open_editor(parts["editor"], dtype, local_files_only)
    if not isinstance(editor, EmbeddingEditor):
        return editor
    known: Any = editor
    if parts["instructions"] is not None:
        known.set_text_encoder(
            InstructionEncoder.from_pretrained(parts["instructions"], dtype, local_files_only)
        )
    elif flux.text_encoder_2 is not None and flux.tokenizer_2 is not None:
        known.set_text_encoder(InstructionEncoder(flux.tokenizer_2, flux.text_encoder_2))
    return known


def save_adapter(adapter: Any, folder: Path) -> None:
    """Write ``adapter/`` and, if encoders are attached, ``clip/`` and ``dino/``.

    Raises:
        OSError: something cannot be written.
    """
    adapter.save_pretrained(folder / "adapter")
    if adapter.encoder is not None:
        adapter.encoder.clip.save_pretrained(folder / "clip")
        adapter.encoder.dino.save_pretrained(folder / "dino")


def save_editor(editor: Editor | None, flux: Any, folder: Path) -> None:
    """Write the editor to ``editor/``, and what reads its instructions to ``instructions/``.

    FLUX's own T5 is not written twice.

    Raises:
        ValueError: the editor is none that ``load_editor`` would load.
        OSError: something cannot be written.
    """
    if editor is None:
        return
    known: Any = editor
    if not hasattr(known, "save_pretrained"):
        raise ValueError(
            f"editor must have a folder to be saved with the pipeline, got {type(known).__name__}: "
            f"take it off first"
        )
    known.save_pretrained(folder / "editor")
    reader = getattr(known, "text_encoder", None)
    if reader is not None and reader.model is not flux.text_encoder_2:
        reader.save_pretrained(folder / "instructions")


def check_editor(editor: Editor, adapter: Any) -> None:
    """See that an editor was made for the embeddings of an adapter.

    Raises:
        ValueError: it is none, of another hierarchy or width, or learned another adapter's
            embeddings.
    """
    if not isinstance(editor, Editor):
        raise ValueError(f"editor must have a method edit, got {type(editor).__name__}")
    config = getattr(editor, "config", None)
    if config is None:
        return  # a script fits any
    tree, channels = Hierarchy(tuple(config["tokens_per_node"])), config["channels"]
    if tree != adapter.tree or channels != adapter.config["out_features"]:
        raise ValueError(
            f"editor must be for embeddings of {adapter.tree.tokens_per_node} with "
            f"{adapter.config['out_features']} channels, got {tree.tokens_per_node} with {channels}"
        )
    learned, here = config["adapter"], fingerprint(adapter)
    if learned is not None and not same_model(learned, here):
        raise ValueError(
            f"editor must have learned the embeddings of this adapter, {here}, got one that "
            f"learned those of {learned}"
        )


def blank(adapter: Any, batch: int) -> SemanticEmbedding:
    """Embeddings of zeros, as an adapter would give them."""
    tree, pooled = adapter.tree, adapter.pooled
    tokens = torch.zeros(batch, tree.num_tokens, adapter.config["out_features"])
    return SemanticEmbedding(tokens, tree, None if pooled is None else pooled.expand(batch, -1))
