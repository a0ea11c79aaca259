"""One training step, whole and in parts: pictures in, weights updated."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.measure import Results, quantiles
from bench.training_model import EMA_DECAY, SEED, Models
from sda_fast.losses import cosine_penalty, flow_matching_loss, sample_t

PARTS = ("data", "encoders", "vae", "adapter", "flux", "backward", "optimizer")
"""In their order. "data" brings pictures to the device, "flux" is its forward with the loss;
clipping and the average belong to "optimizer"."""
PENALTY = 0.01
NO_CLIP = 1e9
"""Norm that gradients are clipped to: none comes near, so that those checked are the step's own;
clipping costs what it costs."""

Embed = Callable[[Tensor], Tensor]
"""Features [B, S, F] in the encoders' dtype -> positions [B, N, C]."""
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x_t [B, S_img, C], t [B], positions [B, N, C] -> velocity like x_t."""
Mark = Callable[[str], None]
"""Told the name of the part that ends here."""


def unmarked(_part: str) -> None:
    """Tells nobody."""


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """A step of one variant; called, it is timed whole.

    Attributes:
        models: shared with the others.
        pictures: [B, 3, H, W] uint8 on the CPU, pinned where the device is a GPU.
        embed: the variant's way through the adapter.
        velocity: the variant's way through the transformer.
    """

    models: Models
    pictures: Tensor
    embed: Embed
    velocity: Velocity

    def __call__(self) -> Results:
        """The loss and the gradient of every parameter of the adapter."""
        return self.run(unmarked)

    def run(self, mark: Mark) -> Results:
        """As a call, with the end of each of PARTS marked."""
        models, device = self.models, self.models.adapter.device
        pixels = self.pictures.to(device, non_blocking=True).float() / 255
        mark("data")
        with torch.no_grad():
            features, _ = models.encoder(pixels)
        mark("encoders")
        x0 = models.latents(pixels)
        mark("vae")
        with autocast(models):
            tokens = self.embed(features)
        mark("adapter")
        t, noise = draw(x0)
        loss = flow_matching_loss(lambda x_t, t: self.velocity(x_t, t, tokens), x0, t, noise)
        loss = loss + PENALTY * cosine_penalty(tokens)
        mark("flux")
        loss.backward()
        mark("backward")
        grads = self._update()
        mark("optimizer")
        return loss.detach(), *grads

    def _update(self) -> list[Tensor]:
        models, parameters = self.models, self.models.parameters
        torch.nn.utils.clip_grad_norm_(parameters, NO_CLIP)
        models.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(models.average, parameters, 1 - EMA_DECAY)
        grads = [p.grad for p in parameters if p.grad is not None]
        models.optimizer.zero_grad(set_to_none=True)
        return grads

    def parts(self, runs: int) -> dict[str, float]:
        """Median milliseconds of each of PARTS over so many runs."""
        device = self.models.adapter.device
        times: dict[str, list[float]] = {part: [] for part in PARTS}
        for _ in range(runs):
            marks: list[Any] = [_now(device)]
            self.run(lambda _part, marks=marks: marks.append(_now(device)))
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            for part, (begin, end) in zip(PARTS, pairwise(marks), strict=True):
                ms = begin.elapsed_time(end) if device.type == "cuda" else (end - begin) * 1e3
                times[part].append(ms)
        return {part: quantiles(ms)[1] for part, ms in times.items()}


def autocast(models: Models) -> torch.autocast:
    """The adapter learns in float32 and multiplies in the dtype of the frozen models."""
    dtype, device = models.frozen.transformer.dtype, models.adapter.device
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def draw(x0: Tensor) -> tuple[Tensor, Tensor]:
    """t [B] and noise, shaped as x0, f32: the same at every call, drawn on the device."""
    generator = torch.Generator(x0.device).manual_seed(SEED)
    t = sample_t(len(x0), x0.shape[1], generator)
    return t, torch.randn(x0.shape, generator=generator, device=x0.device)


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
