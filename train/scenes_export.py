"""Gather the runs of the scenes world into the model that the package ships."""

import json
import tempfile
from pathlib import Path

import torch

from sda_fast.adapter import SemanticAdapter
from sda_fast.encoders import HALF, ImageEncoder
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults, load_flux
from train.stage import WORLDS

SHIPPED = Path("sda_fast/scenes/weights")
FLAT = Path("bench/baselines/scenes-flat")
STEPS = 20
MOST_BYTES = 16 * 10**6


def export_scenes(runs: Path, target: Path = SHIPPED, flat: Path = FLAT) -> int:
    """Write the finished runs as one pipeline, and the flat baseline beside the benchmark, bf16.

    Args:
        runs: folder of the runs "scenes-text", "-clip", "-dino", "-adapter" and "-flat".
        target: folder of the pipeline; replaced when the new one is whole.
        flat: folder of the baseline's adapter.

    Returns:
        Bytes written, all together.

    Raises:
        OSError: a run is not finished.
        ValueError: the runs are of different worlds, or the models are larger than what may be
            shipped; nothing was replaced.
    """
    world = WORLDS[_one_world(runs)]
    exports = {name: runs / f"scenes-{name}" / "export" for name in ("text", "clip", "dino")}
    encoder = ImageEncoder.from_pretrained(
        exports["clip"] / "clip",
        exports["dino"] / "dino",
        torch.bfloat16,
        size=world.size,
        clip_mean=HALF,
        clip_std=HALF,
        dino_mean=HALF,
        dino_std=HALF,
    )
    adapter, baseline = (
        SemanticAdapter.from_pretrained(runs / name / "export/adapter", dtype=torch.bfloat16)
        for name in ("scenes-adapter", "scenes-flat")
    )
    adapter.set_encoder(encoder)
    flux = load_flux(exports["text"] / "flux", torch.bfloat16, {})
    defaults = DecodeDefaults(height=world.size, width=world.size, steps=STEPS, guidance=1.0)
    with tempfile.TemporaryDirectory() as scratch:
        whole, beside = Path(scratch) / "pipeline", Path(scratch) / "flat"
        SemanticPipeline(flux, adapter, defaults).save_pretrained(whole)
        baseline.save_pretrained(beside)
        written = sum(f.stat().st_size for f in Path(scratch).rglob("*") if f.is_file())
        if written > MOST_BYTES:
            raise ValueError(f"the models must be at most {MOST_BYTES} bytes, got {written}")
    SemanticPipeline(flux, adapter, defaults).save_pretrained(target)
    baseline.save_pretrained(flat)
    return written


def _one_world(runs: Path) -> str:
    """Return the world that all five runs share.

    Raises:
        OSError: a run is not there.
        ValueError: the runs are of different worlds.
    """
    worlds = {}
    for name in ("text", "clip", "dino", "adapter", "flat"):
        config = json.loads((runs / f"scenes-{name}" / "config.json").read_text())
        worlds[f"scenes-{name}"] = config["world"]
    if len(set(worlds.values())) > 1:
        raise ValueError(f"the runs must be of one world, got {worlds}")
    return worlds["scenes-text"]
