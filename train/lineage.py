"""Where a run begins: at its own newest checkpoint, at another run's end, or anew."""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sda_fast.adapter import SemanticAdapter
from sda_fast.hierarchy import Hierarchy
from train.checkpoint import (
    META,
    check_checkpoint,
    checkpoints_of,
    newest_valid,
    note_best,
    read_meta,
    read_state,
)
from train.config import AdapterConfig, TrainConfig, describe, differences
from train.state import State

CHECKPOINTS = "checkpoints"
MAY_CHANGE = (
    "steps", "micro_batch", "log_every", "checkpoint_every", "checkpoint_minutes", "keep",
    "eval_every", "nonfinite_limit", "timeout_s", "out_dir", "workers", "shard_flux", "recompute",
    "flux", "clip", "dino", "data", "adapter", "instructions", "pairs", "llm",
)  # fmt: skip
"""Fields that a run may go on with other values of; what lies in the folders must be the same."""
QUERIES = "adapter.qformer.queries"
ANEW = "scratch"


def resume(
    config: TrainConfig, state: State, parent: Path | None, warn: Callable[[str], None]
) -> dict[str, Any] | None:
    """Go on from the newest whole checkpoint of the run itself, or begin with its parent's.

    Args:
        config: of the run.
        state: changed in place.
        parent: a checkpoint of ``find_parent``, for a run without one of its own; or None.
        warn: is told of checkpoints that are not whole.

    Returns:
        What the run's own checkpoint says of itself, or None if there is none.

    Raises:
        OSError: a rank cannot read what the first one found.
        ValueError: the run's folder was made by another config, stage or hierarchy, or is past
            config.steps, the differences are listed; or none of its checkpoints is whole; or see
            begin.
    """
    folder, first = config.folder / CHECKPOINTS, state.ranks.first
    # all ranks go on from what the first one finds
    newest, torn = state.ranks.gather(_find(folder, warn) if first else None)[0]
    if torn:
        raise ValueError(
            f"{folder} holds no whole checkpoint to go on from: {'; '.join(torn)}; "
            f"remove {config.folder} to begin anew"
        )
    if newest is None:
        if parent is not None:
            begin(state, parent, config.seed)
        return None
    if not first:
        _check_seen(newest, state.ranks.rank)
    meta = read_meta(newest)
    check_resume(config, state.stage.about, meta)
    if first:
        note_best(folder, meta)
    state.load(newest)
    state.inherited = meta["inherited"]
    return meta


def _find(folder: Path, warn: Callable[[str], None]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint; if there are some but none is whole, what is wrong with each."""
    told: list[str] = []
    newest = newest_valid(folder, told.append)
    if newest is None and checkpoints_of(folder):
        return None, told
    for line in told:
        warn(line)
    return newest, []


def _check_seen(path: Path, rank: int) -> None:
    try:
        check_checkpoint(path)
    except (OSError, ValueError) as error:
        raise OSError(
            f"rank {rank} cannot read the {path.name} that the first goes on from: {error}; "
            f"out_dir must be the same for all ranks"
        ) from error


def check_resume(config: TrainConfig, about: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run; see resume."""
    if meta["step"] > config.steps:
        raise ValueError(
            f"steps must be at least the {meta['step']} that are done, got {config.steps}"
        )
    now = json.loads(describe(config))
    changed = differences(meta["config"], now, MAY_CHANGE)
    changed += differences({name: meta.get(name) for name in about}, about)
    if changed:
        raise ValueError(
            f"{config.folder} holds a run of another config: {', '.join(changed)}; "
            f"choose another name or out_dir, or remove it"
        )


def find_parent(config: AdapterConfig, path: str | None) -> Path | None:
    """The checkpoint that a run begins with; read before anything heavy is loaded.

    Args:
        config: of the run.
        path: of --from: a run's folder, one of its checkpoints, "scratch", or None.

    Returns:
        A whole checkpoint, or None to begin anew.

    Raises:
        FileNotFoundError: the recipe has a parent and none is named, or nothing is there.
        ValueError: what is there is not whole, of another stage, or cannot grow into the
            hierarchy; the difference is listed.
    """
    if path == ANEW:
        return None
    if path is None:
        if config.parent is None:
            return None
        raise FileNotFoundError(
            f"this recipe goes on from {config.parent}: give --from RUN, as "
            f"--from {config.out_dir / config.parent}, or --from {ANEW} to begin anew"
        )
    folder = Path(path)
    found = folder if (folder / META).is_file() else None
    if found is None:
        told: list[str] = []
        found = newest_valid(folder / CHECKPOINTS, told.append)
        if found is None:
            raise FileNotFoundError(
                f"--from must be a run or a checkpoint, {folder} holds none that is whole"
                + "".join(f"; {line}" for line in told)
            )
    else:
        check_checkpoint(found)
    meta = read_meta(found)
    check_parent(config, found, meta)
    if meta["step"] < meta["config"]["steps"]:
        warnings.warn(
            f"--from {found} is of step {meta['step']} of {meta['config']['steps']}", stacklevel=2
        )
    return found


def check_parent(config: AdapterConfig, path: Path, meta: Mapping[str, Any]) -> None:
    """Refuse a parent that the run cannot grow from; see find_parent."""
    if "adapter" not in meta:
        raise ValueError(
            f"--from must be a run of an adapter, {path} is of stage {meta.get('stage')}"
        )
    had = meta["adapter"]
    wanted = {"width": config.width, "num_layers": config.num_layers, "num_heads": config.num_heads}
    wanted["cross_attention_rope"] = config.rope
    changed = differences({name: had.get(name) for name in wanted}, wanted)
    if changed:
        raise ValueError(f"--from {path} holds another adapter: {', '.join(changed)}")
    old, new = had["tokens_per_node"], config.tokens_per_node
    if len(new) < len(old) or any(b < a for a, b in zip(old, new, strict=False)):
        raise ValueError(
            f"tokens_per_node must not be smaller in any level than the parent's "
            f"{tuple(old)}, got {new}: {path} cannot grow into it"
        )


def begin(state: State, path: Path, seed: int) -> None:
    """Begin with the weights, average and optimizer memory of another run, grown if need be.

    Positions that were there keep all three bit for bit. A new one starts as its node's or
    ancestor's query plus noise, in weights and average each from its own, without memory.

    Args:
        state: of an adapter; changed in place.
        path: a checkpoint that ``find_parent`` gave.
        seed: of the noise.

    Raises:
        ValueError: its adapter takes other features, or gives other positions.
    """
    known = read_meta(path)["adapter"]
    changed = differences(known, state.stage.about["adapter"], ("tokens_per_node",))
    if changed:
        raise ValueError(f"--from {path} holds another adapter: {', '.join(changed)}")
    tree = Hierarchy(state.model["adapter"].config.tokens_per_node)  # pyrefly: ignore
    grown: list[dict[str, Tensor]] = []
    kept = torch.arange(Hierarchy(known["tokens_per_node"]).num_tokens)
    for kind in ("model/", "ema/"):
        had = read_state(path, kind)
        adapter: Any = SemanticAdapter(**known)
        adapter.load_state_dict(_below(had, "adapter."))
        if tree != adapter.tree:
            kept = adapter.grow(tree, seed=seed)
        own = state.model.state_dict()
        lost = sorted(name for name in had if name.startswith("encoder.") and name not in own)
        if lost:
            raise ValueError(
                f"open_layers must cover what {path} has trained of the encoder, got "
                f"{len(lost)} tensors without a place, as {lost[0]}"
            )
        opened = {name: had.get(name, own[name]) for name in own if name.startswith("encoder.")}
        grown.append(opened | {f"adapter.{name}": t for name, t in adapter.state_dict().items()})
    memory = read_state(path, "optim/")
    for name, t in memory.items():
        if name.rpartition("/")[0] == QUERIES and t.ndim:
            memory[name] = t.new_zeros(tree.num_tokens, *t.shape[1:])
            memory[name][kept] = t
    state.take_over(grown[0], grown[1], memory)
    state.inherited = True


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def begins_anew(config: TrainConfig) -> bool:
    """Whether the run has no checkpoint of its own yet, whole or not."""
    return not checkpoints_of(config.folder / CHECKPOINTS)
