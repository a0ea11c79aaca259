"""The file of an embedding: safetensors that carry the hierarchy of their positions."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from sda_fast.files import write_whole
from sda_fast.flux_inputs import check_finite
from sda_fast.hierarchy import Hierarchy

FORMAT, VERSION = "sda_fast.embedding", 1
METADATA_KEY = "sda_fast"  # one key alone: several are written in no fixed order


def write_tensors(
    path: str | PathLike[str], tensors: Mapping[str, Tensor], tree: Hierarchy
) -> None:
    """Write one safetensors file, whole or not at all; equal tensors give equal bytes.

    Raises:
        ValueError: the name does not end in ``.safetensors``, or a tensor holds a NaN or an
            infinity.
        FileNotFoundError: the folder is not there.
    """
    path = _check_suffix(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in a folder that is there, got {path}")
    for name, tensor in tensors.items():
        check_finite(name, tensor)
    # a clone: safetensors refuses views that share storage
    whole = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    about = {"format": FORMAT, "hierarchy": tree.tokens_per_node, "version": VERSION}
    write_whole(path, to_safetensors(whole, {METADATA_KEY: json.dumps(about, sort_keys=True)}))


def read_tensors(path: str | PathLike[str]) -> tuple[dict[str, Tensor], Hierarchy]:
    """What ``write_tensors`` wrote, onto the CPU.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is truncated or foreign.
    """
    path = _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be an embedding file, got {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    return tensors, _parse_metadata(path, metadata)


def _check_suffix(path: str | PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors (no pickle is read), got {path}")
    return path


def _parse_metadata(path: Path, metadata: Mapping[str, str]) -> Hierarchy:
    try:
        about = json.loads(metadata[METADATA_KEY])
        known = about["format"] == FORMAT and about["version"] == VERSION
        tokens_per_node = about["hierarchy"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is a safetensors file but no embedding") from error
    if not known:
        raise ValueError(
            f"{path} must be of format {FORMAT} {VERSION}, "
            f"got {about['format']!r} {about['version']!r}"
        )
    try:
        return Hierarchy(tokens_per_node)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
