"""The frozen causal language model under ``LLMEditor``: where it comes from and which one it is."""

import hashlib
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from sda_fast.weights import check_weights, read_config, resolve_folder

KINDS = ("llama", "mistral", "qwen2", "qwen3")
"""``model_type`` of the configs that are taken: decoders whose prompt may be given as vectors."""
FIRST_VALUES = 1024
"""So many of each weight go into a fingerprint: sisters of one size differ in these already."""


@dataclass(frozen=True, eq=False)
class CausalBase:
    """A causal language model with its tokenizer.

    Attributes:
        model: of transformers, frozen, in evaluation mode.
        tokenizer: of tokenizers, without truncation and padding.
        name: hub id, or the last part of a folder's path.
        fingerprint: see ``base_fingerprint``.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    fingerprint: str


def load_base(
    base: str | PathLike[str],
    dtype: torch.dtype = torch.float32,
    local_files_only: bool = False,
    wanted: str | None = None,
) -> CausalBase:
    """Load a Llama, Mistral or Qwen from safetensors, its words from ``tokenizer.json``.

    Args:
        base: folder or hub id.
        dtype: of the weights.
        local_files_only: take a hub id from the cache alone.
        wanted: the fingerprint that it must have; None for any.

    Raises:
        OSError: there is no such folder, or the hub is out of reach.
        ValueError: the model is of another kind or another one than wanted, its weights are
            pickled, truncated or incomplete, or the tokenizer is missing, torn or too large.
    """
    folder = resolve_folder(base, "base", local_files_only)
    kind = read_config(folder, "base").get("model_type")
    if kind not in KINDS:
        raise ValueError(f"base must be one of {KINDS}, got a model of {kind!r} in {folder}")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"base must be without an adapter of its own, got {folder} with one")
    check_weights(folder, "base")
    found = base_fingerprint(folder)
    if wanted not in (None, found):
        raise ValueError(
            f"base must be the model that the editor was trained on, fingerprint {wanted}, got "
            f"{found} in {folder}"
        )
    tokenizer = _read_tokenizer(folder)
    model = _read_model(folder, dtype)
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.get_vocab_size() > rows:
        raise ValueError(
            f"base: the tokenizer in {folder} must know at most the model's {rows} tokens, got "
            f"{tokenizer.get_vocab_size()}"
        )
    name = Path(base).resolve().name if Path(base).exists() else str(base)
    return CausalBase(model, tokenizer, name, found)


def base_fingerprint(folder: Path) -> str:
    """sha256 over names, dtypes, sizes and ``FIRST_VALUES`` of the weights in a folder, in hex.

    The same however the weights are shared out to files; nothing else of them is read.
    """
    lines: dict[str, str] = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                weight = weights.get_tensor(name)
                first = weight.flatten()[:FIRST_VALUES].view(torch.uint8).numpy()
                values = hashlib.sha256(first).hexdigest()
                lines[name] = f"{name} {weight.dtype} {list(weight.shape)} {values}\n"
    return hashlib.sha256("".join(lines[name] for name in sorted(lines)).encode()).hexdigest()


def _read_tokenizer(folder: Path) -> Tokenizer:
    """Of tokenizer.json itself: transformers may build another one by the model's kind."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"base must come with its tokenizer, got {folder} without {file}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the bindings raise nothing narrower
        raise ValueError(f"base: {file} is torn or no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_model(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    faults = {name: found for name, found in info.items() if found}
    if faults:
        raise ValueError(f"base: {folder} holds weights that do not fit its config: {faults}"[:600])
    return model.requires_grad_(False).eval()
