"""What stays frozen around the adapter: decoder, encoders, pooled vector."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sda_fast.encoders import HALF, ImageEncoder
from sda_fast.flux_latents import latents_of
from sda_fast.flux_prompt import empty_prompt
from sda_fast.pipeline_folder import flux_folder, load_flux
from sda_fast.weights import resolve_folder
from train.config import AdapterConfig, FluxConfig
from train.decoders import Decoder, build_decoder
from train.ranks import Ranks

PARTS = ("flux", "clip", "dino")
UNUSED = ("text_encoder_2", "tokenizer_2", "image_encoder", "feature_extractor")
"""Of a Flux pipeline, by the name of the component."""
TO_DECODE = ("transformer", "text_encoder", "tokenizer")
"""Likewise, what only decoding needs."""


@dataclass(frozen=True, slots=True)
class Readers:
    """What makes numbers of pictures, on the rank's device.

    Attributes:
        vae: of FLUX.
        encoder: of patches; its last layers may be opened.
    """

    vae: Any
    encoder: ImageEncoder

    @torch.no_grad()
    def features(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Pictures [B, 3, H, W] in [0, 1] -> ([B, S, F], its grid), in the encoder's own dtype."""
        # under autocast some norms would give float32, and all that comes behind them with it
        with torch.autocast(pictures.device.type, enabled=False):
            return self.encoder(pictures)

    def latents(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> what diffusion starts from, [B, C, h, w]."""
        return latents_of(self.vae, pictures)


@dataclass(frozen=True, slots=True)
class Frozen(Readers):
    """Models that no step changes, on the rank's device.

    Attributes:
        flux: a Flux pipeline, of which the transformer, VAE and scheduler are used.
        pooled: [1, P].
        decoder: the way through flux.transformer.
        about: which models these are; see ``describe_parts``.
    """

    flux: Any
    pooled: Tensor
    decoder: Decoder
    about: dict[str, str]

    @property
    def patch(self) -> int:
        """Pixels along an image token."""
        return 2 * self.flux.vae_scale_factor


def frozen_scenes(config: AdapterConfig, ranks: Ranks, size: int) -> Frozen:
    """The models of the scenes world.

    Args:
        config: of the run.
        ranks: whose device they go to.
        size: side of the world's pictures.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: an encoder is of another world.
    """
    parts = {name: require(config.part(name), name) for name in PARTS}
    # autocast computes with fp32 weights; FastFlux in the dtype of its own
    fast = config.decoder == "fast" and config.precision == "bf16"
    dtype = torch.bfloat16 if fast else torch.float32
    flux: Any = load_flux(parts["flux"], dtype, {})
    options: dict[str, Any] = dict.fromkeys(
        ("clip_mean", "clip_std", "dino_mean", "dino_std"), HALF
    )
    encoder = ImageEncoder.from_pretrained(parts["clip"], parts["dino"], size=size, **options)
    for name in ("clip", "dino"):
        seen = getattr(encoder, name).config.image_size
        if seen != size:
            raise ValueError(
                f"{name} must be of world {config.world}, trained on pictures of {size} pixels, "
                f"got one for {seen}"
            )
    pooled = torch.zeros(1, flux.transformer.config.pooled_projection_dim)
    return _placed(flux, encoder, pooled, config, ranks, describe_parts(parts))


def frozen_flux(config: FluxConfig, ranks: Ranks) -> Frozen:
    """FLUX and the encoders, from folders or the hub's cache, in config.precision.

    Raises:
        FileNotFoundError: one is not there.
        ValueError: see ``load_flux`` and ``ImageEncoder.from_pretrained``.
    """
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.rehearsal != "none":
        from train.rehearsal import random_encoder, random_flux

        small, device = config.rehearsal == "small", ranks.device
        flux, pooled = random_flux(small, device, dtype)
        return _placed(flux, random_encoder(small, device, dtype), pooled, config, ranks)
    folders = find_parts(config)
    flux = load_flux(folders["flux"], dtype, dict.fromkeys(UNUSED))
    with torch.no_grad():
        pooled = empty_prompt(flux)
    # it has said what it had to say
    flux.register_modules(text_encoder=None, tokenizer=None)
    encoder = _load_encoder(config, folders, dtype)
    return _placed(flux, encoder, pooled, config, ranks, describe_parts(folders))


def frozen_readers(config: FluxConfig, ranks: Ranks) -> Readers:
    """The encoders and the VAE alone; see ``frozen_flux``."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.rehearsal != "none":
        from train.rehearsal import random_encoder, random_vae

        small, device = config.rehearsal == "small", ranks.device
        return Readers(random_vae(small, device, dtype), random_encoder(small, device, dtype))
    folders = find_parts(config)
    flux: Any = load_flux(folders["flux"], dtype, dict.fromkeys((*UNUSED, *TO_DECODE)))
    encoder = _load_encoder(config, folders, dtype)
    return Readers(flux.vae.to(ranks.device), encoder.to(ranks.device))


def _load_encoder(config: FluxConfig, folders: dict[str, Path], dtype: torch.dtype) -> ImageEncoder:
    sides: dict[str, Any] = {"size": config.encoder_size, "squash": config.squash}
    return ImageEncoder.from_pretrained(folders["clip"], folders["dino"], dtype, **sides)


def find_parts(config: FluxConfig) -> dict[str, Path]:
    """Where FLUX and the encoders are; nothing is loaded yet.

    Raises:
        FileNotFoundError: one is not there; all that are missing are named.
        OSError: a hub id cannot be fetched.
    """
    unset = [f"{name}=..." for name in PARTS if getattr(config, name) is None]
    if unset:
        raise FileNotFoundError(
            f"folders or hub ids of the frozen models must be given: set {', '.join(unset)}"
        )
    found, missing = {}, []
    for name in PARTS:
        try:
            path = getattr(config, name)
            # of FLUX's repository only what is used, not all that lies there
            of_flux = name == "flux"
            found[name] = (
                flux_folder(path, dict.fromkeys(UNUSED)) if of_flux else resolve_folder(path, name)
            )
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError("; ".join(missing))
    return found


def describe_parts(folders: dict[str, Path]) -> dict[str, str]:
    """Which models lie in folders, wherever these are: by configs, and names and sizes of weights.

    To read all weights of FLUX would take a minute at every start.
    """
    found = {}
    for name, folder in folders.items():
        digest = hashlib.sha256()
        for file in sorted(folder.rglob("*")):
            if file.suffix == ".safetensors":
                digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
            elif file.name == "config.json":
                digest.update(file.read_bytes())
        found[name] = digest.hexdigest()
    return found


def _placed(
    flux: Any,
    encoder: ImageEncoder,
    pooled: Tensor,
    config: AdapterConfig,
    ranks: Ranks,
    about: dict[str, str] | None = None,
) -> Frozen:
    flux.set_progress_bar_config(disable=True)
    sharded = isinstance(config, FluxConfig) and config.shard_flux
    decoder = build_decoder(config, flux, ranks) if sharded else None
    # sharding moves what it spreads by itself, block by block: nowhere is all of it at once
    flux.to(ranks.device)
    decoder = decoder or build_decoder(config, flux, ranks)
    encoder, pooled = encoder.to(ranks.device), pooled.to(ranks.device)
    return Frozen(flux.vae, encoder, flux, pooled, decoder, about or {})


def require(folder: Path, name: str) -> Path:
    """Return the folder, or say which run makes it.

    Raises:
        FileNotFoundError: it is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must be the folder of a trained model, {folder} is not there; "
            f"run the recipe that makes it first, or set {name}=..."
        )
    return folder
