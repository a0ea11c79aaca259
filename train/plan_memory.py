"""What a run needs of a GPU's memory, by arithmetic: nothing is loaded, nothing allocated."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sda_fast.cost import adapter_parameters, flux_parameters, vision_parameters
from sda_fast.fast_memory import forward_bytes, kept_bytes
from sda_fast.hierarchy import Hierarchy
from train.config import AdapterConfig, FluxConfig

LEARNT, CAST = 4 + 4 + 8 + 4, 2
"""Bytes of a number that learns: weight, gradient, two moments and average, f32; its bf16 copy."""
FLUX_VAE_NUMBERS = 83_819_683
"""Of an AutoencoderKL in the shape of sda_fast.shapes.FLUX_VAE."""
VAE_MAPS, VAE_CHANNELS = 4, 128
"""Feature maps of full size that the VAE's encoder holds at once, about, and their channels."""
LAYER_KEPT = 17
"""Widths a token that an encoder's layer keeps for its backward, as one of FLUX's streams."""
QUERY_KEPT = 27
"""Widths a query that a layer of the adapter keeps, likewise; with the cross-attention's."""
RESERVED = 3 * 10**9
"""Bytes for the CUDA context, NCCL, and what the allocator cannot use."""
MODELLED = "modelled: by the shapes of what is kept"
GATHERED = 2
"""Blocks that are whole at a time where weights are sharded: the one at work, and the next."""


@dataclass(frozen=True, slots=True)
class Outline:
    """What sda_fast.fast_memory asks of a FluxTransformer2DModel, without one.

    Attributes:
        config: of it.
        dtype: of its weights.
    """

    config: Mapping[str, Any]
    dtype: torch.dtype

    @property
    def inner_dim(self) -> int:
        """Channels of a token."""
        return self.config["num_attention_heads"] * self.config["attention_head_dim"]

    @property
    def transformer_blocks(self) -> range:
        """As many as there are double blocks."""
        return range(self.config["num_layers"])

    @property
    def single_transformer_blocks(self) -> range:
        """As many as there are single blocks."""
        return range(self.config["num_single_layers"])

    @property
    def numbers(self) -> int:
        """Parameters."""
        outside, double, single = flux_parameters(self.config)
        doubles, singles = len(self.transformer_blocks), len(self.single_transformer_blocks)
        return outside + doubles * double + singles * single

    @property
    def nbytes(self) -> int:
        """Of all weights."""
        return self.numbers * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Models:
    """What a run holds, without weights.

    Attributes:
        transformer: of FLUX.
        vae: parameters.
        clip: of a vision tower, its config.
        dino: likewise.
        adapter: arguments of a SemanticAdapter.
        patch: pixels along an image token.
        encoder_size: pixels along the encoders' square.
    """

    transformer: Outline
    vae: int
    clip: Any
    dino: Any
    adapter: dict[str, Any]
    patch: int
    encoder_size: int

    @property
    def patches(self) -> int:
        """Of a square picture, in the finer of the encoders."""
        finest = min(tower.patch_size for tower in (self.clip, self.dino))
        return (self.encoder_size // finest) ** 2

    @property
    def positions(self) -> int:
        """Of an embedding."""
        return Hierarchy(self.adapter["tokens_per_node"]).num_tokens

    def image_tokens(self, side: int) -> int:
        """Of a square picture of so many pixels."""
        return (side // self.patch) ** 2


def models_of(config: AdapterConfig) -> Models:
    """The models that a config asks for, in their published shapes or those of scenes."""
    return _flux_models(config) if isinstance(config, FluxConfig) else _scenes_models(config)


def side_of(config: AdapterConfig) -> int:
    """Pixels along a square picture."""
    from train.stage import WORLDS

    return config.resolution if isinstance(config, FluxConfig) else WORLDS[config.world].size


def _flux_models(config: FluxConfig) -> Models:
    from transformers import CLIPVisionConfig, Dinov2Config

    from sda_fast.shapes import CLIP_VIT_H, DINOV2_VIT_L, FLUX_DEV

    if config.rehearsal == "small":
        raise ValueError("rehearsal must be none or full to be planned for, got small")
    transformer = Outline(FLUX_DEV, torch.bfloat16)
    clip, dino = CLIPVisionConfig(**CLIP_VIT_H), Dinov2Config(**DINOV2_VIT_L)
    adapter = _adapter(config, clip, dino, FLUX_DEV["joint_attention_dim"])
    return Models(transformer, FLUX_VAE_NUMBERS, clip, dino, adapter, 16, config.encoder_size)


def _scenes_models(config: AdapterConfig) -> Models:
    from sda_fast.scenes.models import PATCH, WIDTH, build_clip, build_dino, build_flux
    from train.stage import WORLDS

    world = WORLDS[config.world]
    # as in train.frozen: FastFlux computes in the dtype of its weights, autocast with f32 ones
    half = config.decoder == "fast" and config.precision == "bf16"
    flux: Any = build_flux(world)
    transformer = Outline(flux.transformer.config, torch.bfloat16 if half else torch.float32)
    clip, dino = build_clip(world).config, build_dino(world).config
    vae = sum(p.numel() for p in flux.vae.parameters())
    adapter = _adapter(config, clip, dino, WIDTH)
    return Models(transformer, vae, clip, dino, adapter, PATCH, world.size)


def _adapter(config: AdapterConfig, clip: Any, dino: Any, out: int) -> dict[str, Any]:
    return {
        "tokens_per_node": config.tokens_per_node,
        "in_features": clip.hidden_size + dino.hidden_size,
        "width": config.width,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "out_features": out,
    }


@dataclass(frozen=True, slots=True)
class Part:
    """Of the memory.

    Attributes:
        what: it is.
        fixed: bytes, whatever the micro-batch.
        each: bytes a picture of a micro-batch.
        source: "modelled", or "assumed", and from what.
    """

    what: str
    fixed: float
    each: float
    source: str


def memory_parts(config: AdapterConfig, models: Models, gpus: int) -> list[Part]:
    """What a GPU holds at the peak of a step: between FLUX's forward and its backward.

    Args:
        config: of the run.
        models: of the config.
        gpus: over which weights are sharded, if they are.
    """
    side, transformer = side_of(config), models.transformer
    tokens = models.positions + models.image_tokens(side)
    trained = trained_numbers(config, models)
    kept = kept_bytes(transformer, tokens, config.recompute)
    at_once = forward_bytes(transformer, tokens)
    # the VAE is done before FLUX begins: it counts where it needs more than all that FLUX keeps
    item = transformer.dtype.itemsize
    vae_maps = VAE_MAPS * VAE_CHANNELS * side * side * item if models.vae else 0
    own = "" if _fused(config) else "; diffusers' own blocks keep more"
    towers = vision_parameters(models.clip) + vision_parameters(models.dino)
    towers -= _opened(config) * _layer_numbers(models.dino)  # those are among what learns
    return [
        *_decoder_parts(config, models, gpus),
        Part("VAE", models.vae * item, 0, f"modelled: {_number(models.vae)} numbers"),
        Part("encoders", towers * item, 0, f"modelled: {_number(towers)} numbers"),
        Part(
            "what learns: weights, gradient, moments, average", trained * LEARNT, 0,
            f"modelled: {_number(trained)} numbers, {LEARNT} bytes each",
        ),
        Part("their bf16 copies under autocast", trained * CAST, 0, f"modelled: {CAST} bytes each"),
        Part(
            f"kept by FLUX for its backward, recompute {config.recompute}", 0, kept,
            f"modelled: {kept / 2**30:.2f} GiB a picture, {tokens} tokens{own}",
        ),
        Part("kept by what learns", 0, _kept_by_trained(config, models), MODELLED),
        Part("held at once by a block, or the VAE", 0, max(at_once, vae_maps - kept), MODELLED),
        Part("reserved for CUDA, NCCL and the allocator", RESERVED, 0, "assumed"),
    ]  # fmt: skip


def trained_numbers(config: AdapterConfig, models: Models) -> int:
    """Of the adapter and of opened encoder layers."""
    return adapter_parameters(models.adapter) + _opened(config) * _layer_numbers(models.dino)


def _decoder_parts(config: AdapterConfig, models: Models, gpus: int) -> list[Part]:
    """Weights of FLUX."""
    transformer = models.transformer
    item = transformer.dtype.itemsize
    source = f"modelled: {_number(transformer.numbers)} numbers, {item} bytes each"
    if isinstance(config, FluxConfig) and config.shard_flux and gpus > 1:
        largest = max(flux_parameters(transformer.config)[1:])
        held = transformer.nbytes / gpus + GATHERED * largest * item
        source += f", on {gpus} GPUs; {GATHERED} blocks whole"
        return [Part("FLUX weights, sharded", held, 0, source)]
    parts = [Part("FLUX weights", transformer.nbytes, 0, source)]
    if isinstance(config, FluxConfig) and config.flux_precision == "fp8":
        doubles, singles = transformer.transformer_blocks, transformer.single_transformer_blocks
        # what makes shifts, scales and gates is not quantised
        linears = (24 * len(doubles) + 12 * len(singles)) * transformer.inner_dim**2
        source = f"modelled: {_number(linears)} numbers, for the forward and for the backward"
        parts.append(Part("FLUX weights once more, fp8", 2 * linears, 0, source))
    return parts


def _kept_by_trained(config: AdapterConfig, models: Models) -> float:
    """Of adapter and opened layers, bytes a picture; bf16 under autocast."""
    adapter, width = models.adapter, models.adapter["width"]
    of_patches = models.patches * (adapter["in_features"] + (4 + 2 * config.num_layers) * width)
    of_queries = models.positions * (
        QUERY_KEPT * config.num_layers * width + 2 * adapter["out_features"]
    )
    opened = _opened(config) * LAYER_KEPT * models.patches * models.dino.hidden_size
    return 2.0 * (of_patches + of_queries + opened)


def _opened(config: AdapterConfig) -> int:
    return config.open_layers if isinstance(config, FluxConfig) else 0


def _layer_numbers(tower: Any) -> int:
    width = tower.hidden_size
    return 4 * width * width + 2 * width * int(tower.mlp_ratio * width)


def _fused(config: AdapterConfig) -> bool:
    """Whether FLUX runs as FastFlux, whose memory is known."""
    return config.decoder == "fast" and not (isinstance(config, FluxConfig) and config.shard_flux)


def _number(value: float) -> str:
    """12.3 B, 0.94 B, 211 M."""
    return f"{value / 1e9:.2f} B" if value >= 5e8 else f"{value / 1e6:.3g} M"
