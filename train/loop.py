"""The training loop, on one screen."""

import copy
import json
import time
from collections.abc import Callable

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sda_fast.files import write_whole
from train.checkpoint import check_resume, latest_checkpoint, load_checkpoint, save_checkpoint
from train.config import TrainConfig, describe
from train.optim import build_optimizers, set_learning_rate
from train.plot import open_log, plot_losses, save_sheet
from train.stage import Stage


def train(config: TrainConfig, stage: Stage) -> None:
    """Run or resume config.steps optimizer steps, then write config.folder/export from the EMA.

    The log is one JSON line every config.log_every steps. A step's batch depends on
    (config.seed, step) alone, so a resumed run sees what an unbroken one would have seen.
    """
    checkpoints = config.folder / "checkpoints"
    newest = latest_checkpoint(checkpoints)
    check_resume(config, newest)
    model = stage.trained.train()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = build_optimizers(model, config)
    modules = {"model": model, "ema": ema}
    first = 1 + (load_checkpoint(newest, modules, optimizers) if newest else 0)
    config.folder.mkdir(parents=True, exist_ok=True)
    write_whole(config.folder / "config.json", describe(config))
    with open_log(config.folder) as log, _progress() as bar:
        task = bar.add_task(config.name, total=config.steps, completed=first - 1, loss="")
        start = time.perf_counter()
        for step in range(first, config.steps + 1):
            factor = set_learning_rate(optimizers, config, step)
            losses, grad_norm = _step(stage, model, optimizers, config, step)
            _update_ema(ema, model, min(config.ema_decay, (1 + step) / (10 + step)))
            bar.update(task, completed=step)
            if step % config.log_every == 0:
                row = {key: round(value.item(), 6) for key, value in losses.items()}
                seconds = (time.perf_counter() - start) / config.log_every
                row |= {"grad_norm": round(grad_norm, 4), "lr": factor, "seconds": seconds}
                print(json.dumps({"step": step, **row}), file=log, flush=True)
                bar.update(task, loss=f"loss {row['loss']:.4f}")
                start = time.perf_counter()
            if step % config.checkpoint_every == 0 or step == config.steps:
                save_checkpoint(checkpoints, step, modules, optimizers)
            if step % config.sheet_every == 0 or step == config.steps:
                _with_weights(stage, ema, lambda step=step: save_sheet(config.folder, step, stage))
                plot_losses(config.folder)
    _with_weights(stage, ema, lambda: stage.save(config.folder / "export"))


def _step(
    stage: Stage,
    model: nn.Module,
    optimizers: dict[str, torch.optim.Optimizer],
    config: TrainConfig,
    step: int,
) -> tuple[dict[str, torch.Tensor], float]:
    # the CPU flash kernel's backward costs six times that of plain matrix products at this size
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        losses = stage.losses(config.seed * 10**9 + step)
    losses["loss"].backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
    if not grad_norm < float("inf"):
        raise FloatingPointError(f"gradient norm is {grad_norm} at step {step} of {config.name}")
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses, grad_norm


@torch.no_grad()
def _update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    for average, value in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(value, 1 - decay)


def _with_weights(stage: Stage, ema: nn.Module, act: Callable[[], None]) -> None:
    """Call act while the stage holds the averaged weights."""
    own = {k: t.clone() for k, t in stage.trained.state_dict().items()}
    stage.trained.load_state_dict(ema.state_dict())
    stage.trained.eval()
    try:
        with torch.no_grad():
            act()
    finally:
        stage.trained.load_state_dict(own)
        stage.trained.train()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
