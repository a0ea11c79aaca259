"""Where weights come from: folders and hub ids, safetensors only, checked before they are used."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from sda_fast.files import write_whole

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# diffusers 0.40 renamed the argument and warns of the old name
DTYPE = (
    "dtype" if tuple(map(int, version("diffusers").split(".")[:2])) >= (0, 40) else "torch_dtype"
)
UNTOLD = ("dtype", "torch_dtype", "transformers_version", "architectures", "use_cache")
"""Entries of a config that say nothing of what the model computes."""
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]


def resolve_folder(
    path: str | PathLike[str], argument: str, local_files_only: bool = False
) -> Path:
    """The folder a path or hub id stands for; a hub id is downloaded into the hub's own cache.

    Args:
        path: a folder, or ``owner/name`` on the Hugging Face hub. A folder comes first.
        argument: the caller's name for it, for messages.
        local_files_only: take a hub id from the cache alone.

    Raises:
        FileNotFoundError: there is no such folder, and it is no hub id either.
        NotADirectoryError: it is a file.
        OSError: it may be a hub id, but the hub was not reached or has no such repository.
    """
    folder = Path(path)
    if folder.exists() or folder.is_absolute() or str(path).count("/") != 1:
        return require_folder(folder, argument)
    try:
        return Path(
            snapshot_download(
                str(path), allow_patterns=HUB_FILES, local_files_only=local_files_only
            )
        )
    except HFValidationError:
        return require_folder(folder, argument)
    except (HfHubHTTPError, OSError) as error:
        raise OSError(
            f"{argument} must be a folder or a hub id, got {str(path)!r}: there is no such folder "
            f"here, and the Hugging Face hub is out of reach or has no such repository "
            f"({type(error).__name__})"
        ) from error


def require_folder(path: str | PathLike[str], argument: str) -> Path:
    """The path, if it is a folder.

    Raises:
        FileNotFoundError: there is nothing of that name; the message names the argument.
        NotADirectoryError: it is a file.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{argument} must be a folder, got {folder}, which is not there")
    if not folder.is_dir():
        raise NotADirectoryError(f"{argument} must be a folder, got the file {folder}")
    return folder


def read_config(folder: Path, argument: str) -> dict[str, Any]:
    """The ``config.json`` of a model folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{argument} must be a model folder, got {folder} without config.json"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{argument}: {path} must hold a JSON object, got {type(config).__name__}")
    return config


def check_weights(folder: Path, argument: str, beside: Collection[str] = ()) -> None:
    """See that a model folder holds whole safetensors files, before anything is built from it.

    Args:
        folder: of the model.
        argument: the caller's name for it, for messages.
        beside: names of files that are not the weights of the model itself; they must be whole,
            but do not do alone.

    Raises:
        ValueError: it holds pickled weights only, or a truncated or foreign safetensors file.
        FileNotFoundError: it holds no weights at all.
    """
    files = sorted(folder.glob("*.safetensors"))
    if all(file.name in beside for file in files):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise ValueError(
                f"{argument} must hold safetensors, got {folder} with pickled weights "
                f"{', '.join(pickles)}: loading them could run code, convert them first"
            )
        raise FileNotFoundError(f"{argument} must hold *.safetensors, got {folder} without any")
    for file in files:
        check_safetensors(file)


def check_safetensors(path: str | PathLike[str]) -> None:
    """See that a file is whole safetensors: its header is read, its length compared.

    Raises:
        ValueError: a pickle by its name, truncated, or no safetensors; the message names the file.
        FileNotFoundError: there is no such file.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"weights must be .safetensors (no pickle is read), got {file}")
    if not file.is_file():
        raise FileNotFoundError(f"no such weights file: {file}")
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or no safetensors file: {error}") from error


def read_safetensors(path: str | PathLike[str]) -> dict[str, torch.Tensor]:
    """All tensors of one file, on the CPU; errors as ``check_safetensors``."""
    check_safetensors(path)
    return load_file(path)


def write_safetensors(path: str | PathLike[str], tensors: dict[str, torch.Tensor]) -> None:
    """Write one file: a temporary beside it first, renamed when whole.

    Raises:
        ValueError: the name does not end in ``.safetensors``.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        raise ValueError(f"weights must be .safetensors (no pickle is written), got {file}")
    write_whole(file, save({name: t.detach().contiguous() for name, t in tensors.items()}))


def fingerprint(model: nn.Module, most: int | None = None) -> str:
    """Which model this is: ``SIZES-WEIGHTS``, hashes of its arguments and of its weights.

    Weights count as bfloat16, so that a model saved in that or in float32 is the same in both.
    float16 loses what is small: then WEIGHTS is "float16", which fits any.

    Args:
        model: of diffusers or transformers.
        most: values of each weight that count, the first ones; None for all.
    """
    config: Any = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    known = {k: v for k, v in config.items() if k not in UNTOLD and not k.startswith("_")}
    state = model.state_dict()
    shapes = {name: list(t.shape) for name, t in state.items()}
    told = json.dumps([known, shapes], sort_keys=True, default=str)
    sizes = hashlib.sha256(told.encode()).hexdigest()[:16]
    if any(t.dtype == torch.float16 for t in state.values()):
        return f"{sizes}-float16"
    weights = _digest([{n: t.flatten()[:most].to(torch.bfloat16) for n, t in state.items()}])
    return f"{sizes}-{weights[:32]}"


def check_fingerprint(name: str, value: object) -> None:
    """Refuse what is neither None nor of the form of ``fingerprint``.

    Raises:
        ValueError: it is not; the message names the argument.
    """
    if value is not None and not (isinstance(value, str) and value.count("-") == 1):
        raise ValueError(f"{name} must be a fingerprint or None, got {value!r}")


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints may be of one model."""
    (sizes, weights), (sizes_too, weights_too) = one.split("-"), other.split("-")
    return sizes == sizes_too and (weights == weights_too or "float16" in (weights, weights_too))


def digest(*modules: nn.Module) -> str:
    """sha256 over the modules' weights, by name and value, in hex."""
    return _digest([module.state_dict() for module in modules])


def _digest(states: Iterable[Mapping[str, torch.Tensor]]) -> str:
    sha = hashlib.sha256()
    for state in states:
        for name, tensor in sorted(state.items()):
            sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            sha.update(raw.numpy().tobytes())
    return sha.hexdigest()
