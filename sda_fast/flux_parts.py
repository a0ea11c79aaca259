"""Whether each model of a Flux folder holds the very weights that its config asks for.

diffusers and transformers fill what is missing at random, drop what is too much, and only warn. So
names and shapes are compared before anything is loaded; values are not looked at.
"""

import json
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sda_fast.weights import check_weights, read_config, require_folder

OWN_VAE = ["sda_fast.scenes.vae", "SpaceToDepthVAE"]
LIBRARIES = ("diffusers", "transformers", OWN_VAE[0])  # whose classes a folder may name
STEM = "diffusion_pytorch_model"  # of the weight files of diffusers


def check_parts(folder: Path, index: dict[str, Any], options: dict[str, Any]) -> None:
    """Compare the weights of every model that a pipeline's folder holds with the model's config.

    Args:
        folder: of the pipeline.
        index: its ``model_index.json``.
        options: of diffusers' ``from_pretrained``; parts given there, or left out with None, are
            not looked at, and files of ``variant`` come first.

    Raises:
        OSError: the folder of a part, its config or its weights are not there.
        ValueError: weights are pickled, torn, another model's, missing, unexpected or of another
            shape, or the config is another model's.
    """
    for name, entry in index.items():
        listed = isinstance(entry, list) and len(entry) == 2 and entry[0] in LIBRARIES
        if not listed or name in options:
            continue
        library, class_name = entry
        kind = getattr(import_module(library), class_name, None)
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            continue  # a scheduler or a tokenizer
        argument = f"flux {name}"
        part = require_folder(folder / name, argument)
        config = read_config(part, argument)
        found = config.get("_class_name", class_name)
        if found != class_name:
            raise ValueError(f"{argument}: {part} must hold a {class_name}, got {found!r}")
        check_weights(part, argument)
        if config.get("quantization_config"):
            continue  # packed weights have names and shapes of their own
        find = _faults_of_transformers if library == "transformers" else _faults
        faults = find(kind, part, options.get("variant"))
        if any(faults.values()):
            about = "; ".join(f"{k} {_some(keys)}" for k, keys in faults.items() if keys)
            raise ValueError(f"{argument}: the weights in {part} do not fit its config: {about}")


def check_loaded(parts: dict[str, Any]) -> None:
    """Refuse parts of which some tensor was never filled.

    Raises:
        ValueError: a parameter or buffer is on the meta device.
    """
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            tensors = chain(part.named_parameters(), part.named_buffers())
            empty = [key for key, tensor in tensors if tensor.is_meta]
            if empty:
                raise ValueError(
                    f"flux {name} must be loaded whole, got nothing for {_some(empty)}"
                )


def check_plain(parts: dict[str, Any]) -> None:
    """Refuse parts whose weights, saved as they are, would not fit their config.

    Raises:
        ValueError: a part carries an adapter of peft, or fused projections.
    """
    for name, part in parts.items():
        if getattr(part, "peft_config", None):
            raise ValueError(
                f"flux {name} must be saved without adapters, got {', '.join(part.peft_config)}: "
                "fuse_lora() and then unload_lora_weights(), or unload them alone"
            )
        modules = part.modules() if isinstance(part, nn.Module) else ()
        if any(getattr(module, "fused_projections", False) for module in modules):
            raise ValueError(
                f"flux {name} must be saved without fused projections: call "
                "unfuse_qkv_projections() first"
            )


def _faults(kind: Any, part: Path, variant: str | None) -> dict[str, list[str]]:
    """Names that differ between a model of diffusers and its files."""
    found: dict[str, list[int]] = {}
    for file in _weight_files(part, variant):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    try:
        with torch.device("meta"):
            model = kind.from_config(kind.load_config(part))
    except (TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{part}/config.json makes no {kind.__name__}: {error}") from error
    model._fix_state_dict_keys_on_load(found)  # names of old versions
    wanted = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    return {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(k for k in wanted if wanted[k] != found.get(k, wanted[k])),
    }


def _faults_of_transformers(kind: Any, part: Path, variant: str | None) -> dict[str, list[str]]:
    """The same by transformers itself, which renames and ties weights in its own way."""
    tagged = variant is not None and any(part.glob(f"model*.{variant}*"))
    _, info = kind.from_pretrained(
        part,
        device_map="meta",
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        variant=variant if tagged else None,
    )
    faults = {k: info[f"{k}_keys"] for k in ("missing", "unexpected", "mismatched")}
    return {k: sorted(map(str, found)) for k, found in faults.items()}


def _weight_files(part: Path, variant: str | None) -> list[Path]:
    """The files that diffusers reads: those of the variant first, shards before a whole file."""
    for tag in (f".{variant}", "") if variant else ("",):
        index = part / f"{STEM}.safetensors.index{tag}.json"
        whole = part / f"{STEM}{tag}.safetensors"
        if index.is_file():
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{index} must be an index of safetensors: {error!r}") from error
            lost = [name for name in sorted(names) if not (part / name).is_file()]
            if lost:
                raise FileNotFoundError(f"{index} names {_some(lost)}, which are not there")
            return [part / name for name in sorted(names)]
        if whole.is_file():
            return [whole]
    raise FileNotFoundError(f"{part} must hold {STEM}.safetensors or its shards")


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return ", ".join(keys[:4]) + more
