"""Stage "flux": the adapter on pictures, through the frozen FLUX."""

import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sda_fast.adapter import SemanticAdapter
from sda_fast.weights import digest
from train.adapter import AdapterStage
from train.batch import Batch
from train.config import FluxConfig, PictureEditConfig, differences
from train.data.loader import Loader
from train.data.order import Order, Size, assign_buckets, bucket_sizes, fold_rare
from train.data.source import Source, open_source
from train.frozen import (
    Frozen,
    Readers,
    find_parts,
    frozen_flux,
    frozen_readers,
)
from train.ranks import Ranks
from train.stage import shares

INDEX = "data-index.safetensors"
FITS = 16
"""Pixels that a side of a picture is a multiple of: an image token of FLUX."""
LOWEST = 512
"""Side in pixels below which FLUX behaves badly."""
SMALL = {"width": 32, "num_layers": 2, "num_heads": 2}
"""Of the adapter of a small rehearsal."""


class FluxStage(AdapterStage[FluxConfig]):
    """The adapter learns from pictures; see AdapterStage."""

    def __init__(self, config: FluxConfig, ranks: Ranks) -> None:
        shares(config, ranks)  # refused before anything is read
        if config.resolution < LOWEST and config.rehearsal == "none":
            warnings.warn(
                f"resolution {config.resolution}: FLUX behaves badly below {LOWEST} pixels",
                stacklevel=2,
            )
        if config.rehearsal == "none":
            find_parts(config)
        source = open_for_ranks(config, ranks)
        check_precomputed(config, source)
        self.unseen, self.loader = hold_apart(config, source, ranks)
        self.num_pictures: float = len(self.loader.source)
        self.fingerprint = source.fingerprint
        super().__init__(config, ranks)
        self._open_layers()
        if source.kind == "precomputed":  # hashing takes seconds
            check_precomputed(config, source, models_of(self.frozen))

    def load_frozen(self) -> Frozen:
        """FLUX and the encoders."""
        return frozen_flux(self.config, self.ranks)

    def adapter_config(self) -> dict[str, Any]:
        """Of the reference, in the recipe's sizes; the pooled vector stays with FLUX."""
        known = {**super().adapter_config(), "pooled_features": None}
        return known | SMALL if self.config.rehearsal == "small" else known

    @property
    def about(self) -> dict[str, Any]:
        """Arguments of the adapter, which pictures there are, and which are held out."""
        unseen = sha256("\n".join(self.unseen.ids).encode()).hexdigest()
        return {**super().about, "data": self.fingerprint, "unseen": unseen}

    def unseen_shares(self, most: int) -> list[range]:
        """See AdapterStage."""
        return self.unseen.shares(most)

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return self.loader.batches(first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return self.loader.batches_of(step, places)

    def held_out(self, places: list[range]) -> list[Batch]:
        """Pictures that are never trained on; each of these places are of one size."""
        return [self.unseen.batch(share) for share in places]

    def features(self, pictures: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Of the encoders; their open layers take gradients."""
        if self.config.open_layers:
            return self.frozen.encoder(pictures)
        return super().features(pictures)

    def save(self, folder: Path) -> None:
        """Write the adapter to folder/adapter, the layers that were opened with it."""
        adapter: Any = SemanticAdapter(**self.adapter_config())
        adapter.load_state_dict(self.adapter.state_dict())
        adapter.set_encoder(self.frozen.encoder)
        adapter.save_pretrained(folder / "adapter")

    def _open_layers(self) -> None:
        """Let the encoder's last layers learn, in fp32, beside the adapter."""
        encoder = self.frozen.encoder
        encoder.unfreeze_last(self.config.open_layers)
        layers = {str(index): layer.float() for index, layer in encoder.opened_layers().items()}
        if layers:
            # names as in trained_layers
            opened = _Still({"dino": nn.ModuleDict({"layers": nn.ModuleDict(layers)})})
            self.trained = nn.ModuleDict({"adapter": self.adapter, "encoder": opened})


class _Still(nn.ModuleDict):
    """Layers of an encoder, which learn without dropout: see ImageEncoder.train."""

    def train(self, mode: bool = True) -> "_Still":
        """Stay in evaluation mode."""
        return super().train(False)


@dataclass(frozen=True, slots=True)
class Unseen:
    """Pictures that are never trained on, read once and kept; those of the commonest size first.

    Attributes:
        rows: of the source.
        ids: their names.
        samples: what the source reads of them.
        sizes: of each, after cropping.
    """

    rows: list[int]
    ids: list[str]
    samples: list[dict[str, Tensor]]
    sizes: list[Size]

    def shares(self, most: int) -> list[range]:
        """All places in parts of at most so many, each of one size."""
        found, start = [], 0
        for _, group in groupby(self.sizes):
            stop = start + len(list(group))
            found += [range(at, min(at + most, stop)) for at in range(start, stop, most)]
            start = stop
        return found

    def batch(self, share: range) -> Batch:
        """Those of some places, of one size."""
        read = [self.samples[place] for place in share]
        return Batch(
            step=0,
            places=tuple(share),
            ids=tuple(self.ids[place] for place in share),
            tensors={name: torch.stack([one[name] for one in read]) for name in read[0]},
            size=self.sizes[share[0]],
        )


def hold_apart(
    config: FluxConfig | PictureEditConfig, source: Source, ranks: Ranks
) -> tuple[Unseen, Loader]:
    """What is never trained on, and the micro-batches of all else.

    Args:
        config: of the run.
        source: of its data.
        ranks: of the run; all call this.

    Raises:
        ValueError: see ``hold_out``, ``Order`` and ``Loader``.
        OSError: see ``hold_out``.
    """
    buckets = bucket_sizes(config.resolution, FITS)
    kinds = assign_buckets(source.sizes, buckets)
    if source.kind == "pictures":
        kinds = fold_rare(kinds, buckets, config.batch_size)
    unseen = hold_out(source, kinds, buckets, config.eval_pictures, ranks)
    rest = np.setdiff1d(np.arange(len(source)), unseen.rows)
    order = Order(kinds[rest], config.batch_size, config.seed)
    pinned = ranks.device.type == "cuda"
    places = shares(config, ranks)
    return unseen, Loader(Subset(source, rest), order, buckets, places, config.workers, pinned)


def hold_out(
    source: Source,
    kinds: np.ndarray,
    buckets: tuple[Size, ...],
    most: int,
    ranks: Ranks,
) -> Unseen:
    """Take pictures by a digest of their names: in every phase the same, whatever its size or seed.

    One rank chooses; pictures that it cannot read are passed over, for the run to meet and count.

    Args:
        source: of all pictures.
        kinds: [n] bucket of each.
        buckets: their sizes.
        most: how many, at most half of all.
        ranks: of the run; all call this.

    Raises:
        ValueError: there are too few to hold one out, or a rank cannot read what the first can.
        OSError: likewise.
    """
    rows = ranks.gather(_choose(source, kinds, buckets, most) if ranks.first else None)[0]
    if not rows:
        raise ValueError(f"data must hold at least 2 whole pictures, got {len(source)}")
    common = np.bincount(kinds[rows])
    rows.sort(key=lambda row: (-common[kinds[row]], kinds[row]))
    sizes = [buckets[kinds[row]] for row in rows]
    samples = [source.read(row, size) for row, size in zip(rows, sizes, strict=True)]
    return Unseen(rows, [source.ids(row) for row in rows], samples, sizes)


def _choose(source: Source, kinds: np.ndarray, buckets: tuple[Size, ...], most: int) -> list[int]:
    # what was precomputed has the name of a shard in front
    first = int(source.kind == "precomputed")
    names = (source.ids(row).split("/", first)[-1] for row in range(len(source)))
    digests = (sha256(name.encode()).digest()[:8] for name in names)
    keys = np.fromiter(map(int.from_bytes, digests), np.uint64, len(source))
    rows: list[int] = []
    for row in keys.argsort(kind="stable").tolist():
        if len(rows) == min(most, len(source) // 2):
            break
        try:
            source.read(row, buckets[kinds[row]])
        except (OSError, ValueError):
            continue
        rows.append(row)
    return rows


def sizes_of(config: FluxConfig | PictureEditConfig) -> dict[str, Any]:
    """How pictures come before encoders and VAE; features and latents depend on it."""
    return {
        "resolution": config.resolution,
        "encoder_size": config.encoder_size,
        "squash": config.squash,
    }


def models_of(readers: Readers) -> dict[str, Any]:
    """Hashes of the models that make features and latents."""
    return {"encoder": digest(readers.encoder), "vae": digest(readers.vae)}


def check_precomputed(
    config: FluxConfig, source: Source, models: dict[str, Any] | None = None
) -> None:
    """Refuse features and latents of other sizes or models than the run's; pictures always pass.

    Args:
        config: of the run.
        source: of its data.
        models: of ``models_of``; None looks at sizes alone, before a model is loaded.

    Raises:
        ValueError: the differences are listed; or layers of an encoder shall learn.
    """
    if source.kind != "precomputed":
        return
    if config.open_layers:
        raise ValueError(
            f"data must be pictures where encoder layers learn (open_layers "
            f"{config.open_layers}), got precomputed features in {config.data}"
        )
    # what edits were made of names an adapter
    check_made("data", source, {**sizes_of(config), **(models or {}), "adapter": None})


def check_made(name: str, source: Any, wanted: Mapping[str, Any]) -> None:
    """Refuse what was precomputed otherwise than a run wants it.

    Args:
        name: of the config's field.
        source: a ShardSource.
        wanted: of its ``about``; other entries pass.

    Raises:
        ValueError: the differences are listed.
    """
    had = {key: source.about.get(key) for key in wanted}
    if changed := differences(had, wanted):
        raise ValueError(
            f"{name} must be precomputed as this run wants it, got {source.root}: "
            f"{', '.join(changed)}"
        )


class Subset:
    """Some of the samples of a source, numbered anew; see train.data.source.Source."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.kind, self.refused, self.fingerprint = source.kind, source.refused, source.fingerprint
        self.sizes = source.sizes[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, index: int) -> str:
        """The name of a sample."""
        return self.source.ids(int(self.rows[index]))

    def read(self, index: int, size: tuple[int, int]) -> dict[str, Tensor]:
        """One sample."""
        return self.source.read(int(self.rows[index]), size)


def open_for_ranks(config: FluxConfig, ranks: Ranks) -> Source:
    """The pictures of a run; one rank looks at them all, the others take over what it found.

    Raises:
        ValueError: data is not set, or see ``open_source``.
        OSError: see ``open_source``.
    """
    if config.data is None:
        raise ValueError(
            f"data must be a folder of pictures, got none: set data=... ({config.name})"
        )
    data, cache, workers = config.data, config.folder / INDEX, max(1, config.workers)
    return ranks.in_turn(lambda: open_source(data, cache, workers))


def precompute_for(config: FluxConfig, to: Path, ranks: Ranks) -> bool:
    """Write the features and latents that runs of this config read; see train.precompute.

    Returns:
        Whether all is there; other ranks may have to finish first.

    Raises:
        ValueError: layers of an encoder shall learn; or see ``open_for_ranks`` and ``precompute``.
        OSError: see these.
    """
    from train.precompute import ShardLayout, precompute

    if config.open_layers:
        raise ValueError(
            f"open_layers must be 0 for what is precomputed, got {config.open_layers}: features "
            f"of layers that learn change with every step"
        )
    if config.rehearsal == "none":
        find_parts(config)
    source = open_for_ranks(config, ranks)
    readers = frozen_readers(config, ranks)

    def encode(pictures: Tensor) -> dict[str, Tensor]:
        pixels = pictures.to(ranks.device).float() / 255
        return {"features": readers.features(pixels)[0], "latents": readers.latents(pixels)}

    layout = ShardLayout(
        buckets=bucket_sizes(config.resolution, FITS),
        about=sizes_of(config) | models_of(readers),
        batch_size=config.micro_batch or 8,
    )
    return precompute(source, to, encode, layout, ranks.rank, ranks.world, ranks.first)
