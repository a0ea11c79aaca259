"""What a file or folder of this package holds, read from its header where that is enough."""

from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sda_fast.cli.terminal import quiet
from sda_fast.embedding import SemanticEmbedding
from sda_fast.embedding_file import METADATA_KEY
from sda_fast.hierarchy import Hierarchy
from sda_fast.weights import check_safetensors, read_config

ADAPTER_FIELDS = ("in_features", "width", "num_layers", "num_heads", "out_features")


def describe(path: str | PathLike[str]) -> dict[str, Any]:
    """Describe an embedding file, an adapter (its folder or safetensors) or a saved pipeline.

    Args:
        path: a ``.safetensors`` file or a folder.

    Returns:
        What can be written as JSON; ``kind`` is "embedding", "adapter" or "pipeline".

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it is something else, torn, or pickled.
    """
    path = Path(path)
    if path.is_dir():
        return _pipeline(path) if (path / "semantic_pipeline.json").is_file() else _adapter(path)
    if not path.exists():
        raise FileNotFoundError(f"FILE must be a file or a folder, got {path}, which is not there")
    check_safetensors(path)
    with safe_open(path, framework="pt") as file:
        is_embedding = METADATA_KEY in (file.metadata() or {})
    if is_embedding:
        return _embedding(path)
    if not (path.parent / "config.json").is_file():
        raise ValueError(f"{path} is neither an embedding nor the weights of an adapter")
    return _adapter(path.parent)


def _embedding(path: Path) -> dict[str, Any]:
    emb = SemanticEmbedding.load(path)
    return {
        "kind": "embedding",
        "file": str(path),
        "pictures": len(emb),
        **_tree(emb.tree),
        "channels": emb.tokens.shape[2],
        "pooled_channels": None if emb.pooled is None else emb.pooled.shape[1],
        "dtype": str(emb.tokens.dtype).removeprefix("torch."),
        "bytes": path.stat().st_size,
    }


def _adapter(folder: Path) -> dict[str, Any]:
    config = read_config(folder, "FILE")
    if config.get("_class_name") != "SemanticAdapter":
        raise ValueError(
            f"FILE must be of a SemanticAdapter, got the config of {config.get('_class_name')!r} "
            f"in {folder}"
        )
    missing = [name for name in ("tokens_per_node", *ADAPTER_FIELDS) if name not in config]
    if missing:
        raise ValueError(
            f"FILE must be of a SemanticAdapter, got a config without {', '.join(missing)} "
            f"in {folder}"
        )
    parameters, size, dtypes = 0, 0, set()
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        check_safetensors(file)
        size += file.stat().st_size
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (a file, not a mapping)
                tensor = weights.get_slice(name)
                dtypes.add(str(tensor.get_dtype()))
                count = 1
                for side in tensor.get_shape():
                    count *= side
                parameters += count
    if not files:
        raise FileNotFoundError(f"FILE must hold *.safetensors, got {folder} without any")
    return {
        "kind": "adapter",
        "folder": str(folder),
        **_tree(Hierarchy(config["tokens_per_node"])),
        **{name: config[name] for name in ADAPTER_FIELDS},
        "pooled_channels": config.get("pooled_features"),
        "parameters": parameters,
        "dtype": sorted(dtypes),
        "bytes": size,
        "opened_encoder_layers": (folder / "encoder_layers.safetensors").is_file(),
    }


def _pipeline(folder: Path) -> dict[str, Any]:
    with quiet():
        from sda_fast.pipeline_folder import MANIFEST, read_settings
    settings = read_settings(folder)
    adapter = _adapter(folder / "adapter")
    parts = [name for name in ("flux", "adapter", "clip", "dino") if (folder / name).is_dir()]
    return {
        "kind": "pipeline",
        "folder": str(folder),
        "parts": parts,
        "checksums": (folder / MANIFEST).is_file(),
        "patch": settings.patch,
        "decode": asdict(settings.decode) if settings.decode else None,
        "encoder": settings.encoder,
        "adapter": {name: adapter[name] for name in ("tokens_per_node", "positions", "parameters")},
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


def _tree(tree: Hierarchy) -> dict[str, Any]:
    return {
        "tokens_per_node": list(tree.tokens_per_node),
        "positions": tree.num_tokens,
        "nodes": tree.num_nodes,
    }
