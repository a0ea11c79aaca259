"""Ways through the frozen decoder: its velocity, differentiable in the embedding."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        assert emb.pooled is not None
        joint = self._joint(emb.tree, grid, x_t.device)
        velocity = StockVelocity(self.flux, emb.tokens, emb.pooled, grid, self.guidance, joint)
        return velocity(x_t, t)

    def free(self) -> None:
        """See Decoder."""
        if self._attached is not None:
            self._attached[1].detach()
            self._attached = None

    def _joint(
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


@dataclass(frozen=True, slots=True)
class StockVelocity:
    """Diffusers' transformer as a function (x_t [B, S_img, C], t [B]) -> velocity like x_t.

    Attributes:
        flux: a Flux pipeline.
        text: [B, T, C], what its txt stream holds.
        pooled: [B, P].
        grid: rows and columns of image tokens.
        guidance: for a transformer with guidance embeddings.
        joint: its joint_attention_kwargs.
    """

    flux: Any
    text: Tensor
    pooled: Tensor
    grid: tuple[int, int]
    guidance: float = 1.0
    joint: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """See the class."""
        transformer = self.flux.transformer
        to = {"device": x_t.device, "dtype": next(transformer.parameters()).dtype}
        guides = transformer.config.guidance_embeds
        return transformer(
            hidden_states=x_t.to(**to),
            encoder_hidden_states=self.text.to(**to),
            pooled_projections=self.pooled.to(**to),
            timestep=t.to(**to),
            img_ids=self.flux._prepare_latent_image_ids(1, *self.grid, **to),
            txt_ids=torch.zeros(self.text.shape[1], 3, **to),
            guidance=torch.full_like(t, self.guidance) if guides else None,
            joint_attention_kwargs=dict(self.joint),
            return_dict=False,
        )[0]


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
