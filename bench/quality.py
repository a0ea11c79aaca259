"""How well the model of a small world rebuilds unseen scenes: ``python -m bench quality``.

Every picture is parsed back into a scene and compared with the scene it should show, so the parser's
own ceiling is measured first, on the very same scenes.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench.inversion import invert
from bench.records import Record, append_record, commit, versions
from bench.report import quality_tables
from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.pipeline import SemanticPipeline
from sda_fast.scenes.captions import caption
from sda_fast.scenes.models import TEXT_TOKENS, token_ids
from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import Sums, psnr, row, score
from sda_fast.scenes.world import FULL, SMALL, Scene, Split, World, sample_scenes

SCENE_SEED = 20_000
"""Of the scenes. Training draws from another split, so any seed is unseen."""
SEED_STEP = 100_000
"""Noise seed k of scene i is k * SEED_STEP + i: the same noise for every variant."""
BATCH = 64
"""Pictures drawn at once."""
NOISE = 0.05
"""Standard deviation of the noise that the parser is also measured under."""
RESAMPLES = 1000
"""Of the bootstrap."""

Draw = Callable[[slice, list[int]], Tensor]
"""(rows of the case, one noise seed a row) -> pictures [rows, 3, H, W] in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Case:
    """One variant, ready to be measured.

    Attributes:
        variant: a key of bench.report.VARIANTS.
        scenes: what its pictures should show.
        draw: makes the pictures.
        reader: digest of what made the txt stream out of a scene, or None.
    """

    variant: str
    scenes: list[Scene]
    draw: Draw
    reader: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """The model under test and how much of it to test.

    Attributes:
        pipe: with a text encoder that reads captions.
        flat: the baseline adapter, with its encoder, or None to leave it out.
        scenes: unseen scenes of each variant; half as many of each held-out split.
        seeds: noise seeds of each scene.
        steps: of denoising.
        inversions: scenes whose prompt is inverted; 0 leaves it out.
    """

    pipe: SemanticPipeline
    flat: SemanticAdapter | None
    scenes: int
    seeds: int
    steps: int
    inversions: int

    @property
    def world(self) -> World:
        """The world the pictures of this model come from, known by its size.

        Raises:
            ValueError: there is no world of that size.
        """
        worlds = {(world.size, world.size): world for world in (SMALL, FULL)}
        size = (self.pipe.defaults.height, self.pipe.defaults.width)
        if size not in worlds:
            raise ValueError(f"model must draw pictures of {sorted(worlds)} pixels, got {size}")
        return worlds[size]

    def cases(self, progress: Progress) -> Iterator[Case]:
        """Make the cases one by one; what is slow to prepare shows its own progress."""
        scenes = sample_scenes(self.world, "test", SCENE_SEED, self.scenes)
        pictures = render(scenes, self.world.size)
        yield Case("parser_clean", scenes, lambda rows, _: pictures[rows])
        yield Case("parser_noise", scenes, lambda rows, s: pictures[rows] + NOISE * _noise(rows, s, pictures))
        yield Case("caption", scenes, self.from_captions(scenes), digest(self.pipe.flux.text_encoder_2))
        yield self.rebuilt("reconstruction", scenes, self.pipe.adapter)
        if self.flat is not None:
            yield self.rebuilt("flat", scenes, self.flat)
        for split in ("held_out_pairs", "held_out_count"):
            held_out = sample_scenes(self.world, split, SCENE_SEED, max(1, self.scenes // 2))
            yield self.rebuilt(split, held_out, self.pipe.adapter)
        ...
