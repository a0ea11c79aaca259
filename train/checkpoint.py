"""Checkpoints: a folder a step, made valid by a rename; safetensors only."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.config import TrainConfig, describe

MAY_CHANGE = ("steps", "log_every", "checkpoint_every", "sheet_every", "out_dir")


def save_checkpoint(
    folder: Path,
    step: int,
    modules: dict[str, nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
) -> Path:
    """Write ``folder/step-NNNNNN`` whole, then remove the older ones."""
    tensors: dict[str, Tensor] = {}
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": t for key, t in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optim.{name}/{index}/{key}": t for key, t in state.items()}
    target = folder / f"step-{step:06d}"
    part = folder / f".step-{step:06d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(
        {k: t.detach().clone().contiguous() for k, t in tensors.items()}, part / "state.safetensors"
    )
    (part / "meta.json").write_text(json.dumps({"step": step}))
    shutil.rmtree(target, ignore_errors=True)
    os.replace(part, target)
    for old in folder.glob("step-*"):
        if old != target:
            shutil.rmtree(old)
    return target


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint below folder, or None."""
    return max(folder.glob("step-*"), default=None)


def check_resume(config: TrainConfig, newest: Path | None) -> None:
    """Refuse to go on from a checkpoint of another run.

    How long a run is, how often it reports and where it lies may change; nothing else.

    Raises:
        ValueError: the run's folder was made by another config, or is past config.steps.
    """
    if newest is None:
        return
    done = json.loads((newest / "meta.json").read_text())["step"]
    if done > config.steps:
        raise ValueError(f"steps must be at least the {done} that are done, got {config.steps}")
    had = json.loads((config.folder / "config.json").read_text())
    now = json.loads(describe(config))
    changed = [
        f"{key} (was {had.get(key)}, now {now.get(key)})"
        for key in sorted(had.keys() | now.keys())
        if key not in MAY_CHANGE and had.get(key) != now.get(key)
    ]
    if changed:
        raise ValueError(
            f"{config.folder} holds a run of another config: {', '.join(changed)}; "
            f"choose another out_dir or remove it"
        )


def load_checkpoint(
    path: Path, modules: dict[str, nn.Module], optimizers: dict[str, torch.optim.Optimizer]
) -> int:
    """Restore modules and optimizers in place; return the step that was finished."""
    tensors = load_file(path / "state.safetensors")
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict(
            {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        )
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for key, t in tensors.items():
            if key.startswith(f"optim.{name}/"):
                _, index, field = key.split("/")
                state.setdefault(int(index), {})[field] = t
        optimizer.load_state_dict(
            {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
        )
    return int(json.loads((path / "meta.json").read_text())["step"])
