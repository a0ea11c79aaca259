"""Is a training step right? Asked before it is timed: the loss and every gradient of the adapter.

What is exact is the step written out in plain torch in float32 (float64 for float32 weights): the
plain adapter, diffusers' transformer at full depth with its blocks cast one by one, and the loss by
its formula. It starts from features and latents, which come from the same frozen modules for all.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.check import Places
from bench.flux_cases import GUIDANCE
from bench.flux_check import EXACT, OUTPUT_RATIO, as_dtype, streamed
from bench.flux_model import run_stock
from bench.plain_adapter import plain_adapter, reference_turns
from bench.training_cases import TrainingCase
from bench.training_model import Models
from bench.training_step import PENALTY, autocast, draw

RATIO = 2.0
"""An error's norm over that of plain torch in the models' own dtype; OUTPUT_RATIO for the loss."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the check starts from.

    Attributes:
        features: [B, S, F] of the encoders.
        latents: [B, S_img, C], packed.
        inputs: of the transformer's forward, but for latents, positions and times.
        mask: [1, 1, S, S] bool.
        places: of positions and patches.
    """

    features: Tensor
    latents: Tensor
    inputs: dict[str, Tensor]
    mask: Tensor
    places: Places

    @classmethod
    def make(cls, case: TrainingCase, models: Models, pictures: Tensor) -> "Given":
        """Of pictures [B, 3, H, W] uint8."""
        device = models.adapter.device
        pixels = pictures.to(device).float() / 255
        with torch.no_grad():
            features, _ = models.encoder(pixels)
        inputs = case.flux.inputs(device)
        inputs["pooled_projections"] = models.pooled(len(pictures))
        inputs["guidance"] = torch.full((len(pictures),), GUIDANCE, device=device)
        mask = case.flux.tree.attention_mask(*case.flux.grid)[None, None].to(device)
        places = models.places(case.picture)
        return cls(features, models.latents(pixels), inputs, mask, places)


@dataclass(frozen=True, slots=True)
class TrainingYardstick:
    """The exact loss and gradients, and how far from them a step may be.

    Attributes:
        names: "loss" and the parameters'.
        exact: in that order, on the CPU.
        limit: largest norm of the error of each.
        notes: takes "error", of all gradients together over their norm, and "loss_error".
    """

    names: list[str]
    exact: list[Tensor]
    limit: list[float]
    notes: dict[str, Any] = field(default_factory=dict)

    def noting(self, notes: dict[str, Any]) -> "TrainingYardstick":
        """The same for one variant, which has notes of its own."""
        return TrainingYardstick(self.names, self.exact, self.limit, notes)

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """What is wrong with a step's results; empty if nothing is."""
        if len(results) != len(self.exact):
            return [f"it gave {len(results)} results, not {len(self.exact)}"]
        found, errors = [], []
        wanted = zip(self.names, self.exact, self.limit, results, strict=True)
        for name, exact, limit, result in wanted:
            if result.shape != exact.shape:
                found.append(f"{name} is {list(result.shape)}, not {list(exact.shape)}")
                continue
            error = (result.to(exact.dtype) - exact.to(result.device)).norm().item()
            errors.append(error)
            if not error <= limit:  # NaN is not
                found.append(f"{name} is off by {error:.2e} in norm, allowed {limit:.2e}")
        if len(errors) == len(self.exact) and all(error == error for error in errors):
            self.notes["loss_error"] = errors[0] / self.exact[0].norm().item()
            self.notes["error"] = _norm(errors[1:]) / _norm(
                [g.norm().item() for g in self.exact[1:]]
            )
        return found[:4] + ([f"and {len(found) - 4} more"] if len(found) > 4 else [])


def training_yardstick(models: Models, given: Given) -> TrainingYardstick:
    """Work out what is exact, and how close is close enough.

    A gradient may be off by RATIO times what plain torch is off in the models' own dtype, in its
    own proportion or in that of the median parameter: a small one may have hit by luck.
    """
    own = models.frozen.transformer.dtype
    exact = loss_and_gradients(models, given, EXACT[own])
    off = [
        (own_way.to(x.dtype) - x).norm().item()
        for own_way, x in zip(loss_and_gradients(models, given, own), exact, strict=True)
    ]
    norms = [x.norm().item() for x in exact]
    usual = median(e / n if n else 0.0 for e, n in zip(off[1:], norms[1:], strict=True))
    eps = torch.finfo(own).eps / 2  # one rounding
    limit = [
        (OUTPUT_RATIO * e if i == 0 else RATIO * max(e, usual * n)) + eps * n
        for i, (e, n) in enumerate(zip(off, norms, strict=True))
    ]
    names = ["loss", *(name for name, _ in models.adapter.named_parameters())]
    return TrainingYardstick(names, [x.cpu() for x in exact], limit)


def loss_and_gradients(models: Models, given: Given, dtype: torch.dtype) -> list[Tensor]:
    """The loss and the gradient of every parameter of the adapter, by plain torch.

    Args:
        models: their weights are left as they are.
        given: for all pictures at once.
        dtype: of every frozen weight and sum; that of the models themselves is plain torch as it
            would train, under autocast.
    """
    as_it_is = dtype == models.frozen.transformer.dtype
    wide = torch.float32 if as_it_is else dtype
    adapter: Any = nn.Module.to(copy.deepcopy(models.adapter), wide)
    turns = reference_turns(given.places, models.head_dim)
    with autocast(models) if as_it_is else nullcontext():
        tokens = plain_adapter(adapter, given.features.to(wide), turns)
    t, noise = draw(given.latents)
    x0, noise, at = given.latents.to(wide), noise.to(wide), t.to(wide).view(-1, 1, 1)
    inputs = given.inputs | {"timestep": t, "hidden_states": given.latents}
    inputs = inputs if as_it_is else as_dtype(inputs, dtype, len(x0))
    inputs["hidden_states"] = ((1 - at) * x0 + at * noise).to(dtype)
    inputs["encoder_hidden_states"] = tokens.to(dtype)
    velocity = run_stock(streamed(models.frozen.twin(), dtype), inputs, given.mask)
    flow = (velocity.to(wide) - (noise - x0)).square().mean()
    loss = flow + PENALTY * _mean_square_cosine(tokens.to(wide))
    return [loss.detach(), *torch.autograd.grad(loss, list(adapter.parameters()))]


def _mean_square_cosine(tokens: Tensor) -> Tensor:
    """Of different positions [B, N, C] of a picture."""
    unit = F.normalize(tokens, dim=-1)
    squares = (unit @ unit.mT).square()
    others = squares.sum() - squares.diagonal(dim1=1, dim2=2).sum()
    batch, count = tokens.shape[:2]
    return others / (batch * count * (count - 1))


def _norm(parts: Sequence[float]) -> float:
    return sum(part * part for part in parts) ** 0.5
