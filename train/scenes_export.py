"""Gather the runs of the scenes world into the model that the package ships."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from sda_fast.adapter import SemanticAdapter
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.encoders import HALF, ImageEncoder
from sda_fast.files import write_manifest
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import (
    OPTIONAL,
    PARTS,
    SETTINGS,
    DecodeDefaults,
    load_flux,
    replaced_when_whole,
)
from sda_fast.pipeline_parts import save_editor
from train.config import EditConfig, restore
from train.frozen import require
from train.stage import WORLDS

SHIPPED = Path("sda_fast/scenes/weights")
FLAT = Path("bench/baselines/scenes-flat")
STEPS = 20
MOST_BYTES = 16 * 10**6
"""Of the pipeline without an editor and the baseline together."""
EDITOR_BYTES = 8 * 10**6
"""Of an editor with what reads its instructions."""


def export_scenes(runs: Path, target: Path = SHIPPED, flat: Path = FLAT) -> int:
    """Write the finished runs as one pipeline, and the flat baseline beside the benchmark, bf16.

    An editor that was there is gone: it knew the embeddings of another adapter.

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
        written = _bytes(Path(scratch))
        if written > MOST_BYTES:
            raise ValueError(f"the models must be at most {MOST_BYTES} bytes, got {written}")
    SemanticPipeline(flux, adapter, defaults).save_pretrained(target)
    baseline.save_pretrained(flat)
    return written


def export_editor(run: Path, target: Path = SHIPPED) -> int:
    """Put the editor of a finished run, bf16, into a pipeline; all else in it stays as it is.

    Args:
        run: folder of a run of a recipe scenes-edit-...
        target: folder of the pipeline; replaced when the new one is whole.

    Returns:
        Bytes of the editor with what reads its instructions.

    Raises:
        OSError: the run is not there or not finished.
        ValueError: it trains no editor of scenes, the editor is behind another adapter than the
            pipeline's, or larger than what may be shipped; nothing was replaced.
    """
    config = restore((require(run, "editor") / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, EditConfig) or config.stage != "edit":
        raise ValueError(f"editor must be a run of scenes-edit-..., got {run} of {config.name}")
    folder = require(run / "export" / "editor", "editor")
    editor: Any = EmbeddingEditor.from_pretrained(folder, dtype=torch.bfloat16).eval()
    reader = InstructionEncoder.from_pretrained(run / "export/instructions", torch.bfloat16)
    editor.set_text_encoder(reader)
    pipe = SemanticPipeline.from_pretrained(target, dtype=torch.bfloat16)
    pipe.editor = editor
    with replaced_when_whole(target) as new:
        save_editor(editor, pipe.flux, new)
        written = _bytes(new)
        if written > EDITOR_BYTES:
            raise ValueError(f"the editor must be at most {EDITOR_BYTES} bytes, got {written}")
        for part in PARTS:
            if part not in OPTIONAL and (target / part).is_dir():
                shutil.copytree(target / part, new / part)
        shutil.copy(target / SETTINGS, new)
        write_manifest(new)
    return written


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


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
