"""Ways through the frozen decoder: its velocity, differentiable in the embedding."""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sda_fast.attachment import Attachment, attach
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_checkpoints import Checkpoint
from sda_fast.fast_flux import FastFlux
from sda_fast.hierarchy import Hierarchy
from train.config import AdapterConfig, FluxConfig
from train.ranks import Ranks


class Decoder(Protocol):
    """A frozen decoder."""

    def velocity(
        self, x_t: Tensor, t: Tensor, emb: SemanticEmbedding, grid: tuple[int, int]
    ) -> Tensor:
        """[B, S_img, C] packed latents at times [B] -> their velocity, as x_t."""
        ...

    def free(self) -> None:
        """Leave the transformer as a stock pipeline wants it; velocity may be called again."""
        ...


def build_decoder(config: AdapterConfig, flux: Any, ranks: Ranks) -> Decoder:
    """The decoder that the config asks for.

    Args:
        config: of the run.
        flux: a Flux pipeline; its transformer is used as it is, sharded in place if need be.
        ranks: over which it is sharded.
    """
    guidance = config.guidance if isinstance(config, FluxConfig) else 1.0
    if isinstance(config, FluxConfig) and config.shard_flux:
        shard(flux.transformer, ranks)
        return StockDecoder(flux, config, guidance, attached=True)
    if config.decoder == "stock":
        return StockDecoder(flux, config, guidance, attached=False)
    return FastDecoder(flux, config, guidance)


def mask_rule(config: AdapterConfig) -> str:
    """The rule of the decoder's mask; for "none" that of ``mask_tree``."""
    return "overlap" if config.rule == "none" else config.rule


def mask_tree(config: AdapterConfig) -> Hierarchy:
    """The hierarchy that the decoder sees; "none": a root that holds all there is."""
    tree = Hierarchy(config.tokens_per_node)
    return Hierarchy((tree.num_tokens,)) if config.rule == "none" else tree


class FastDecoder:
    """FastFlux: fused operators, no mask tensor; nothing is kept for frozen weights."""

    def __init__(self, flux: Any, config: AdapterConfig, guidance: float) -> None:
        fp8 = isinstance(config, FluxConfig) and config.flux_precision == "fp8"
        tree, rule = mask_tree(config), mask_rule(config)
        self.fast = FastFlux(flux.transformer, tree, rule, precision="fp8" if fp8 else None)
        self.options: dict[str, Any] = {"guidance": guidance, "checkpoint": config.recompute}

    def velocity(
        self, x_t: Tensor, t: Tensor, emb: SemanticEmbedding, grid: tuple[int, int]
    ) -> Tensor:
        """See Decoder."""
        # casts are FastFlux's own; autocast would cast beside its operators
        with torch.autocast(x_t.device.type, enabled=False):
            return self.fast.velocity(x_t, t, emb, grid=grid, **self.options)

    def free(self) -> None:
        """See Decoder."""


class StockDecoder:
    """Diffusers' own blocks, with a dense mask or with the operator attached."""

    def __init__(self, flux: Any, config: AdapterConfig, guidance: float, attached: bool) -> None:
        self.flux, self.config, self.guidance = flux, config, guidance
        self.attaches = attached
        self._attached: tuple[Hierarchy, Attachment] | None = None
        self._masks: dict[tuple, Tensor] = {}
        if config.recompute != "none":
            keep = Checkpoint(config.recompute)
            flux.transformer.enable_gradient_checkpointing(partial(_checkpoint, keep))

    def velocity(
        self, x_t: Tensor, t: Tensor, emb: SemanticEmbedding, grid: tuple[int, int]
    ) -> Tensor:
        """See Decoder."""
        transformer, dtype, device = self.flux.transformer, self._dtype, x_t.device
        guides, pooled = transformer.config.guidance_embeds, emb.pooled
        assert pooled is not None
        return transformer(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=emb.tokens.to(dtype),
            pooled_projections=pooled.to(dtype),
            timestep=t.to(dtype),
            img_ids=self.flux._prepare_latent_image_ids(1, *grid, device, dtype),
            txt_ids=torch.zeros(emb.tokens.shape[1], 3, device=device, dtype=dtype),
            guidance=torch.full_like(t, self.guidance) if guides else None,
            joint_attention_kwargs=self._mask(emb.tree, grid, device),
            return_dict=False,
        )[0]

    def free(self) -> None:
        """See Decoder."""
        if self._attached is not None:
            self._attached[1].detach()
            self._attached = None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.flux.transformer.parameters()).dtype

    def _mask(
        self, tree: Hierarchy, grid: tuple[int, int], device: torch.device
    ) -> dict[str, Tensor]:
        if self.attaches:
            # it stays until another is wanted: the backward may run blocks again
            if self._attached is None or self._attached[0] != tree:
                self.free()
                self._attached = tree, attach(self.flux.transformer, tree, mask_rule(self.config))
            return {}
        if self.config.rule == "none":
            return {}
        key = tree, grid
        if key not in self._masks:
            self._masks[key] = tree.attention_mask(*grid, self.config.rule).to(device)
        return {"attention_mask": self._masks[key]}


def shard(transformer: Any, ranks: Ranks) -> None:
    """Spread frozen weights over all ranks, block by block; they are gathered where they are used.

    FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html.

    Raises:
        ValueError: there is no process group, as under torchrun.
    """
    if not dist.is_initialized():
        raise ValueError("shard_flux needs ranks to spread the decoder over: start with torchrun")
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh)
    fully_shard(transformer, mesh=mesh)


def _checkpoint(keep: Checkpoint, block: Callable[..., Any], *args: Any) -> Any:
    return keep(block, *args)
