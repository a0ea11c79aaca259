"""LoRA around a frozen language model, through peft and in peft's own files."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sda_fast.files import write_whole
from sda_fast.weights import check_weights, read_safetensors, write_safetensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
ALPHA = 2
"""What LoRA adds is multiplied by lora_alpha / rank."""


def require_peft() -> Any:
    """The module peft.

    Raises:
        ImportError: it is not installed; the message says what is to be.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            'LLMEditor needs peft, which is not installed: pip install "sda-fast[train]"'
        ) from error
    return peft


def add_lora(model: Any, rank: int, name: str) -> Any:
    """Put LoRA on every linear of a language model but its head, in place.

    Hu et al. 2021, https://arxiv.org/abs/2106.09685; on all linears as Dettmers et al. 2023,
    https://arxiv.org/abs/2305.14314, found best.

    Args:
        model: of transformers, frozen; what is added learns, in f32 if the model is in half
            precision, and adds nothing yet.
        rank: of LoRA.
        name: of the model, for peft's config.

    Returns:
        peft's PeftModel around it.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has LoRA already.
    """
    peft = require_peft()
    if any(isinstance(module, peft.tuners.lora.LoraLayer) for module in model.modules()):
        raise ValueError(f"base must be one editor's alone, got {name} with LoRA: load it again")
    about = peft.LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=ALPHA * rank, target_modules="all-linear"
    )
    wrapped = peft.get_peft_model(model, about)
    about.base_model_name_or_path = name  # peft takes the path it was loaded from
    return wrapped


def lora_modules(wrapped: Any) -> nn.ModuleDict:
    """What LoRA learns, by the linear it is on: the modules themselves, as ``LINEAR.A`` and ``B``.

    Args:
        wrapped: of ``add_lora``.
    """
    layer = require_peft().tuners.lora.LoraLayer
    found = {
        name.removeprefix("model.layers.").replace(".", "-"): nn.ModuleDict(
            {"A": module.lora_A["default"], "B": module.lora_B["default"]}
        )
        for name, module in wrapped.get_base_model().named_modules()
        if isinstance(module, layer)
    }
    return nn.ModuleDict(found)


def write_lora(wrapped: Any, folder: Path) -> None:
    """Write the two files of peft that ``PeftModel.from_pretrained`` takes."""
    about = wrapped.peft_config["default"].to_dict() | {"inference_mode": True}
    about["target_modules"] = sorted(about["target_modules"])  # a set: in no fixed order
    write_safetensors(folder / WEIGHTS_FILE, _state(wrapped))
    write_whole(folder / CONFIG_FILE, json.dumps(about, indent=2, sort_keys=True) + "\n")


def check_lora(folder: Path, rank: int) -> None:
    """See that a folder holds whole files of LoRA of this rank, before anything is built.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one is pickled, torn or of something else.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"editor must hold its LoRA, got {folder} without {CONFIG_FILE}")
    wanted = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA * rank}
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        found = {name: about.get(name) for name in wanted}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"editor: {file} is torn or no config of peft: {error}") from error
    if found != wanted:
        raise ValueError(f"editor: {file} must say {wanted}, got {found}")
    check_weights(folder, "editor")


def read_lora(wrapped: Any, folder: Path) -> None:
    """Load what ``write_lora`` wrote of such a model, in place.

    Raises:
        ValueError: names or sizes are not those of this model.
    """
    found = read_safetensors(folder / WEIGHTS_FILE)
    check_fits(found, _state(wrapped), folder / WEIGHTS_FILE)
    require_peft().set_peft_model_state_dict(wrapped, found)


def check_fits(found: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    """Refuse tensors of a file whose names or sizes are not those that are wanted.

    Raises:
        ValueError: some are; the message names the first.
    """
    sizes = [{name: tuple(t.shape) for name, t in state.items()} for state in (own, found)]
    odd = sorted(dict(sizes[0].items() ^ sizes[1].items()))
    if odd:
        raise ValueError(
            f"editor: {file} holds weights that do not fit: "
            + ", ".join(f"{n} {sizes[1].get(n)} for {sizes[0].get(n)}" for n in odd[:4])
        )


def _state(wrapped: Any) -> dict[str, Tensor]:
    # "auto" would ask the hub about the vocabulary
    return require_peft().get_peft_model_state_dict(wrapped, save_embedding_layers=False)
