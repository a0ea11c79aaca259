"""What ``LLMEditor`` keeps in its folder beside weights, and what each argument may be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sda_fast.editors.llm_lora import check_lora
from sda_fast.hierarchy import Hierarchy
from sda_fast.model_folder import check_class, check_sizes
from sda_fast.weights import check_fingerprint, check_safetensors, check_weights, read_config

OWN_FILE, LORA_FOLDER = "editor.safetensors", "lora"
SAVED = (
    "tokens_per_node", "channels", "lora_rank", "max_length", "adapter", "base", "base_fingerprint",
)  # fmt: skip


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse arguments of ``LLMEditor`` of a wrong type or size; other keys pass.

    Raises:
        ValueError: one cannot be; the message names it.
    """
    check_sizes(config, ("channels", "lora_rank", "max_length"))
    for name, value in config.items():
        if name == "adapter":
            check_fingerprint(name, value)
        elif name in ("base", "base_fingerprint") and not isinstance(value, str):
            raise ValueError(f"{name} must be a text, got {value!r}")


def check_prompt(model: Any, tree: Hierarchy, max_length: int) -> None:
    """Refuse a prompt that is longer than the language model can tell places apart.

    Raises:
        ValueError: an instruction of max_length tokens and twice the positions do not fit.
    """
    longest, limit = max_length + 2 * tree.num_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(
            f"base must take a prompt of {longest} tokens, {max_length} of max_length and twice "
            f"{tree.num_tokens} positions, got a model for {limit}"
        )


def read_checked(folder: Path, name: str) -> dict[str, Any]:
    """Arguments of the editor in a folder, its base by name and fingerprint, its files looked at.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another model, or a file is torn or pickled.
    """
    config = read_config(folder, "editor")
    check_class(config, name, "editor", folder)
    try:
        known = {argument: config[argument] for argument in SAVED}
        check_config(known)
    except (KeyError, ValueError) as error:
        raise ValueError(f"editor: {folder / 'config.json'}: {error}") from error
    check_weights(folder, "editor")
    check_safetensors(folder / OWN_FILE)
    check_lora(folder / LORA_FOLDER, known["lora_rank"])
    return known
