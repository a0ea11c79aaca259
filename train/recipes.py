"""Runs by name: ``python -m train NAME``. A new experiment is a new function, not a flag."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.config import AdapterConfig, EditConfig, FluxConfig, PictureEditConfig, TrainConfig

AT_SCALE: dict[str, Any] = {
    "batch_size": 256, "micro_batch": 8, "muon_lr": 0.0, "adamw_lr": 1e-4, "warmup_steps": 2000,
    "ema_decay": 0.9999, "log_every": 10, "checkpoint_every": 1000, "eval_every": 1000, "keep": 3,
    "decoder": "fast",
}  # fmt: skip
"""Of runs on pictures: 32 GPUs with 8 each."""


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


def scenes_16() -> AdapterConfig:
    """The chain of phases on scenes, first link: 16 positions of the whole picture."""
    return replace(scenes_adapter(), name="scenes-16", steps=1000, tokens_per_node=(16,))


def scenes_32() -> AdapterConfig:
    """Second link: 32 positions of the whole picture."""
    return replace(scenes_16(), name="scenes-32", tokens_per_node=(32,), parent="scenes-16")


def scenes_64() -> AdapterConfig:
    """Third link: quadrants, 64 positions."""
    return replace(
        scenes_32(), name="scenes-64", tokens_per_node=(32, 8), level_dropout=0.1,
        parent="scenes-32",
    )  # fmt: skip


def scenes_128() -> AdapterConfig:
    """Fourth link: their quadrants, 128 positions."""
    return replace(scenes_64(), name="scenes-128", tokens_per_node=(32, 8, 4), parent="scenes-64")


def scenes_instructions() -> TrainConfig:
    """What reads instructions, by filling in words of instructions and captions."""
    return TrainConfig(
        name="scenes-instructions", stage="instructions", steps=1500, batch_size=128,
        precision="fp32", muon_lr=0.0,
    )  # fmt: skip


def scenes_edit_autoregressive() -> EditConfig:
    """An editor of scenes that writes position after position, as the seed does."""
    return EditConfig(
        name="scenes-edit-autoregressive", stage="edit", steps=5000, precision="fp32",
        muon_lr=0.0, adamw_lr=2e-3, width=128, num_heads=4, ff_width=384,
    )  # fmt: skip


def scenes_edit_prefilled() -> EditConfig:
    """An editor of scenes that writes all positions at once."""
    return replace(scenes_edit_autoregressive(), name="scenes-edit-prefilled", mode="prefilled")


def scenes_edit_level() -> EditConfig:
    """An editor of scenes that writes a level at a time."""
    return replace(scenes_edit_autoregressive(), name="scenes-edit-level", mode="level")


def scenes_edit_delta() -> EditConfig:
    """An editor of scenes that says which positions change, and how."""
    return replace(scenes_edit_autoregressive(), name="scenes-edit-delta", mode="delta")


def edit_t5_large() -> PictureEditConfig:
    """An editor behind FLUX's adapter in the sizes of a T5-large decoder. 32 GPUs x 8 pairs."""
    return PictureEditConfig(
        name="edit-t5-large",
        stage="edit-pictures",
        steps=50_000,
        width=1024,
        num_layers=24,
        num_heads=16,
        ff_width=2816,
        **AT_SCALE,
    )


def edit_t5_xxl() -> PictureEditConfig:
    """As wide as FLUX's positions: 6 B parameters learn, 125 GB of state a rank; from pairs=..."""
    return replace(
        edit_t5_large(), name="edit-t5-xxl", width=4096, num_heads=64, ff_width=10240,
        decoder="none",
    )  # fmt: skip


def edit_llm() -> PictureEditConfig:
    """A causal language model edits, by LoRA."""
    return replace(edit_t5_large(), name="edit-llm", llm=Path("Qwen/Qwen2.5-1.5B"))


def phase0_16() -> FluxConfig:
    """Through FLUX at 512 pixels: 16 positions of the whole picture. 32 GPUs x 8 pictures."""
    return FluxConfig(
        name="phase0-16",
        stage="flux",
        steps=100_000,
        tokens_per_node=(16,),
        width=1024,
        num_layers=12,
        num_heads=16,
        **AT_SCALE,
    )


def phase1_32() -> FluxConfig:
    """16 positions grow to 32."""
    return replace(
        phase0_16(), name="phase1-32", steps=50_000, tokens_per_node=(32,), parent="phase0-16"
    )


def phase2_quadrants() -> FluxConfig:
    """Quadrants are added: 64 positions; from here on some steps see the first levels alone."""
    return replace(
        phase1_32(), name="phase2-quadrants", tokens_per_node=(32, 8), level_dropout=0.1,
        parent="phase1-32",
    )  # fmt: skip


def phase3_128() -> FluxConfig:
    """The quadrants' quadrants are added: 128 positions."""
    return replace(
        phase2_quadrants(), name="phase3-128", tokens_per_node=(32, 8, 4),
        parent="phase2-quadrants",
    )  # fmt: skip


def phase3_112() -> FluxConfig:
    """Three levels in 112 positions, grown from 16."""
    return replace(phase3_128(), name="phase3-112", tokens_per_node=(16, 8, 4), parent="phase0-16")


def phase3_64() -> FluxConfig:
    """Three levels in 64 positions, grown from 16."""
    return replace(phase3_128(), name="phase3-64", tokens_per_node=(16, 4, 2), parent="phase0-16")


def phase4_768() -> FluxConfig:
    """768 pixels, with DINOv2's last layers open."""
    return replace(
        phase3_128(), name="phase4-768", steps=20_000, resolution=768, micro_batch=2,
        open_layers=4, adamw_lr=5e-5, parent="phase3-128",
    )  # fmt: skip


def phase4_1024() -> FluxConfig:
    """1024 pixels, likewise."""
    return replace(
        phase4_768(), name="phase4-1024", resolution=1024, micro_batch=1, parent="phase4-768"
    )


def rehearse() -> FluxConfig:
    """Try memory, speed and cluster with random frozen models of full size; learns nothing."""
    return replace(
        phase3_128(), name="rehearse", steps=60, warmup_steps=10, batch_size=8, log_every=5,
        eval_every=30, eval_pictures=8, checkpoint_every=20, rehearsal="full", parent=None,
    )  # fmt: skip


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    make().name: make
    for make in (
        phase0_16,
        phase1_32,
        phase2_quadrants,
        phase3_112,
        phase3_128,
        phase3_64,
        phase4_768,
        phase4_1024,
        rehearse,
        edit_t5_large,
        edit_t5_xxl,
        edit_llm,
        scenes_text,
        scenes_clip,
        scenes_dino,
        scenes_adapter,
        scenes_flat,
        scenes_16,
        scenes_32,
        scenes_64,
        scenes_128,
        scenes_instructions,
        scenes_edit_autoregressive,
        scenes_edit_prefilled,
        scenes_edit_level,
        scenes_edit_delta,
    )
}

CHAINS = {"scenes-encoders": ("scenes-clip", "scenes-dino")}
"""Names that stand for several recipes, run one after the other."""
