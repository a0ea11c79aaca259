"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else; their schedule."""

import math

import torch
from torch import nn

from train.config import TrainConfig


def build_optimizers(model: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """Return the optimizers by name. Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_block = "block" in name or "layer" in name
            (matrices if parameter.ndim == 2 and in_block else rest).append(parameter)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(
            matrices,
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    if rest:
        optimizers["adamw"] = torch.optim.AdamW(
            rest, lr=config.adamw_lr, betas=(0.9, 0.98), weight_decay=config.weight_decay
        )
    return optimizers


def set_learning_rate(
    optimizers: dict[str, torch.optim.Optimizer], config: TrainConfig, step: int
) -> float:
    """Warm up linearly, then follow a cosine to 2 %; return the factor at this step, from 1."""
    warmup = min(1.0, step / max(1, config.warmup_steps))
    progress = max(0.0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factor = warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    peak = {"muon": config.muon_lr, "adamw": config.adamw_lr}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = peak[name] * factor
    return factor
