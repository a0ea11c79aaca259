"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else; their schedule."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from train.config import FluxConfig, TrainConfig

Optimizers = dict[str, torch.optim.Optimizer]
OPENED = "encoder."
"""Before the names of encoder layers that learn."""


def build_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """Return the optimizers by name; opened layers of an encoder have a rate of their own.

    Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
    """
    groups: dict[str, dict[str, Tensor]] = {"muon": {}, "adamw": {}, "encoder": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_group(name, parameter, config)][name] = parameter
    fused = {"fused": True} if any(p.is_cuda for p in model.parameters()) else {}
    optimizers: Optimizers = {}
    if groups["muon"]:
        optimizers["muon"] = torch.optim.Muon(
            groups["muon"].items(),
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    for name in ("adamw", "encoder"):
        if groups[name]:
            optimizers[name] = torch.optim.AdamW(
                groups[name].items(),
                lr=_peak(config, name),
                betas=(0.9, 0.98),
                weight_decay=config.weight_decay,
                **fused,
            )
    return optimizers


def _group(name: str, parameter: Tensor, config: TrainConfig) -> str:
    if name.startswith(OPENED):
        return "encoder"
    in_block = "block" in name or "layer" in name
    return "muon" if parameter.ndim == 2 and in_block and config.muon_lr > 0 else "adamw"


def _peak(config: TrainConfig, name: str) -> float:
    if name == "encoder":
        assert isinstance(config, FluxConfig)
        return config.encoder_lr
    return config.muon_lr if name == "muon" else config.adamw_lr


def set_learning_rate(optimizers: Optimizers, config: TrainConfig, step: int) -> float:
    """Warm up linearly, then follow a cosine to 2 %; return the factor at this step, from 1."""
    warmup = min(1.0, step / max(1, config.warmup_steps))
    progress = max(0.0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    factor = warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = _peak(config, name) * factor
    return factor


def optimizer_tensors(optimizers: Optimizers) -> dict[str, Tensor]:
    """State of every parameter, as ``PARAMETER/FIELD``."""
    tensors = {}
    for optimizer in optimizers.values():
        for name, parameter in _named(optimizer).items():
            for field, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{field}"] = torch.as_tensor(value)
    return tensors


def load_optimizers(optimizers: Optimizers, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave; parameters that it does not name start anew."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, field = key.rpartition("/")
        by_name.setdefault(name, {})[field] = value
    for optimizer in optimizers.values():
        for name, parameter in _named(optimizer).items():
            for field, value in by_name.get(name, {}).items():
                # counters stay where the optimizer keeps them
                device = parameter.device if value.ndim or _on_device(optimizer) else value.device
                optimizer.state[parameter][field] = value.to(device, copy=True)


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("fused"))


def _named(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
