"""The denoising loop at low latency: modulation ahead of it, nothing waits for the device in it."""

import copy
from collections import OrderedDict
from functools import partial
from threading import RLock
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import (
    FluxPipeline,
    calculate_shift,
    retrieve_timesteps,
)
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sda_fast.cuda_graphs import GraphCache
from sda_fast.fast_flux import FastFlux
from sda_fast.fast_memory import advised
from sda_fast.hierarchy import Hierarchy

KEPT = 4  # FastFlux of different trees and rules, which share their weights
OWN_LOOP = {
    "height", "width", "num_inference_steps", "guidance_scale", "generator", "prompt_embeds",
    "pooled_prompt_embeds",
}  # fmt: skip
"""Arguments of a Flux pipeline that the loop here knows."""

Attention = tuple[Hierarchy, str, int | None]
"""Hierarchy, rule and isolate_level."""


class FastDecoder:
    """Runs a stock Flux pipeline with FastFlux in the place of its transformer.

    A plain FluxPipeline with its own scheduler is run by the loop here: all modulation in one pass
    ahead, no step waits for the device, the VAE as a graph too. Others (Kontext, Img2Img,
    callbacks, another scheduler ...) run their own loop around FastFlux. Calls from several
    threads take turns.

    Args:
        graph: whether to use CUDA graphs.

    Attributes:
        turn: held by the call whose turn it is.
    """

    def __init__(self, graph: bool) -> None:
        self.graph = graph
        self.flux: Any = None  # of the call whose turn it is
        self._fast: OrderedDict[Attention, FastFlux] = OrderedDict()
        self._pictures = GraphCache()
        self.turn = RLock()

    def __call__(self, flux: Any, inputs: dict[str, Any], attention: Attention, output: str) -> Any:
        """Pictures.

        Args:
            flux: the pipeline.
            inputs: keyword arguments of the Flux pipeline.
            attention: who may attend to whom.
            output: "pil" or "pt".

        Raises:
            ValueError: FastFlux cannot run the transformer as it is.
        """
        with self.turn:
            self.flux = flux
            fast = self.fast_flux(attention)
            if self._knows(inputs):
                return self._decode(fast, **inputs, output=output)
            stock, self.flux.transformer = self.flux.transformer, fast
            try:
                return self.flux(**inputs, output_type=output).images
            finally:
                self.flux.transformer = stock

    def fast_flux(self, attention: Attention) -> FastFlux:
        """The FastFlux of a hierarchy and rule, around the pipeline's transformer of now."""
        transformer = self.flux.transformer
        for old in [how for how, fast in self._fast.items() if fast.transformer is not transformer]:
            del self._fast[old]  # it would keep another transformer alive
        fast = self._fast.pop(attention, None)
        if fast is None:
            tree, rule, level = attention
            fast = FastFlux(transformer, tree, rule, isolate_level=level, graph=self.graph)
        self._fast[attention] = fast
        while len(self._fast) > KEPT:
            self._fast.popitem(last=False)
        return fast

    def _knows(self, inputs: dict[str, Any]) -> bool:
        scheduler = self.flux.scheduler
        plain = type(scheduler) is FlowMatchEulerDiscreteScheduler
        return plain and type(self.flux) is FluxPipeline and set(inputs) <= OWN_LOOP

    def _decode(
        self,
        fast: FastFlux,
        height: int,
        width: int,
        num_inference_steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        output: str,
    ) -> Any:
        flux, dtype = self.flux, prompt_embeds.dtype
        device = prompt_embeds.device
        latents = self._noise(generator, height, width, dtype, device)
        grid = height // (2 * flux.vae_scale_factor), width // (2 * flux.vae_scale_factor)
        layout = fast.layout_of_grid(latents, prompt_embeds, grid)
        scheduler, times = self._schedule(num_inference_steps, latents.shape[1], device)
        rows = self._modulation(fast, times.to(dtype), pooled_prompt_embeds, guidance_scale)
        with flux.progress_bar(total=len(times)) as bar:
            for i, t in enumerate(times):
                velocity = fast.denoise(latents, prompt_embeds, rows[i], layout)
                latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
                bar.update()
        what = f"the VAE's decoding of {len(latents)} pictures of {height} x {width}"
        with advised(what, lambda: "fewer pictures at once, or flux.vae.enable_tiling()"):
            picture = self._picture(latents, height, width)
        return flux.image_processor.postprocess(picture, output_type=output)

    def _noise(
        self,
        generator: list[torch.Generator],
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Tensor:
        """Packed latents of the generators."""
        flux = self.flux
        rows, cols = (2 * (side // (flux.vae_scale_factor * 2)) for side in (height, width))
        channels = flux.transformer.config.in_channels // 4
        shape = len(generator), channels, rows, cols
        noise = randn_tensor(shape, generator=generator, device=torch.device("cpu"), dtype=dtype)
        if device.type == "cuda":
            noise = noise.pin_memory()
        noise = noise.to(device, non_blocking=True)
        return flux._pack_latents(noise, *shape)

    def _schedule(self, steps: int, tokens: int, device: torch.device) -> tuple[Any, Tensor]:
        """A scheduler of this call's own, and its times, as FluxPipeline sets them."""
        scheduler = copy.deepcopy(self.flux.scheduler)
        config = scheduler.config
        sigmas = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        mu = calculate_shift(
            tokens,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        times, _ = retrieve_timesteps(scheduler, steps, device, sigmas=sigmas, mu=mu)
        scheduler.set_begin_index(0)
        return scheduler, times

    def _modulation(
        self, fast: FastFlux, times: Tensor, pooled: Tensor, guidance_scale: float
    ) -> Tensor:
        """[steps, B, R, C] of every step and picture, in one pass."""
        steps, batch = len(times), len(pooled)
        guidance = None
        if fast.config.guidance_embeds:
            guidance = torch.full([steps * batch], guidance_scale, device=times.device)
        rows = fast.modulation(
            (times / 1000).repeat_interleave(batch), pooled.repeat(steps, 1), guidance
        )
        return rows.unflatten(0, (steps, batch))

    def _picture(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Pixels [B, 3, height, width] in [-1, 1]."""
        vae = self.flux.vae
        paint = partial(self._paint, height=height, width=width)
        if not self.graph:
            return paint(latents)
        config = vae.config
        about = height, width, config.scaling_factor, config.shift_factor, *_tiles(vae)
        return self._pictures.run(paint, [latents], [vae], about)

    def _paint(self, latents: Tensor, height: int, width: int) -> Tensor:
        flux = self.flux
        latents = flux._unpack_latents(latents, height, width, flux.vae_scale_factor)
        latents = latents / flux.vae.config.scaling_factor + flux.vae.config.shift_factor
        return flux.vae.decode(latents, return_dict=False)[0]


def _tiles(vae: Any) -> tuple:
    """How a VAE cuts its work up."""
    names = (
        "use_slicing", "use_tiling", "tile_sample_min_size", "tile_latent_min_size",
        "tile_overlap_factor",
    )  # fmt: skip
    return tuple(getattr(vae, name, None) for name in names)
