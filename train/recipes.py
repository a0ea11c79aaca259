"""Runs by name: ``python -m train NAME``. A new experiment is a new function, not a flag."""

from collections.abc import Callable
from dataclasses import replace

from train.config import AdapterConfig, TrainConfig


def scenes_text() -> TrainConfig:
    """Decoder and text encoder together, caption to picture; frozen ever after."""
    return TrainConfig(name="scenes-text", stage="text", steps=4200)


def scenes_clip() -> TrainConfig:
    """Vision encoder by contrast with captions: stands in for CLIP."""
    return TrainConfig(name="scenes-clip", stage="clip", steps=700, batch_size=128)


def scenes_dino() -> TrainConfig:
    """Vision encoder by filling in masked patches: stands in for DINOv2."""
    return TrainConfig(name="scenes-dino", stage="dino", steps=1000)


def scenes_adapter() -> AdapterConfig:
    """The adapter, through the frozen decoder: 28 positions in three levels."""
    return AdapterConfig(name="scenes-adapter", stage="adapter", steps=4400)


def scenes_flat() -> AdapterConfig:
    """The baseline: the same adapter and tokens, no hierarchy, no mask, no RoPE."""
    return replace(
        scenes_adapter(), name="scenes-flat", tokens_per_node=(28,), rule="none", rope=False
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "scenes-text": scenes_text,
    "scenes-clip": scenes_clip,
    "scenes-dino": scenes_dino,
    "scenes-adapter": scenes_adapter,
    "scenes-flat": scenes_flat,
}

CHAINS = {"scenes-encoders": ("scenes-clip", "scenes-dino")}
"""Names that stand for several recipes, run one after the other."""
