"""What runs of editors need beside themselves: tiny random models of scenes and of pictures."""

import json

import torch

from sda_fast.adapter import SemanticAdapter
from sda_fast.editors.text import InstructionEncoder
from sda_fast.scenes.models import build_instruction_encoder
from sda_fast.scenes.world import SMALL
from tests.pictures import write_pictures
from tests.tiny_scenes import tiny_scenes_pipeline
from train.__main__ import build_stage
from train.checkpoint import newest_valid
from train.config import override
from train.ranks import Ranks
from train.recipes import RECIPES

TINY = [
    "steps=2", "batch_size=4", "warmup_steps=1", "log_every=1", "eval_every=2", "eval_pictures=4",
    "precision=fp32", "width=32", "num_layers=1", "num_heads=2", "ff_width=48", "adamw_lr=1e-3",
]  # fmt: skip
OF_PICTURES = [
    "rehearsal=small", "resolution=32", "workers=0", "micro_batch=2", "eval_every=1000",
]  # fmt: skip


def write_parts(folder):
    """Frozen models of the scenes world, untrained, with what reads instructions: assignments."""
    pipe = tiny_scenes_pipeline()
    encoder = pipe.adapter.encoder
    with torch.no_grad():
        for model in (pipe.adapter, encoder.clip, encoder.dino):
            for name, weight in model.named_parameters():  # as first drawn, they hardly look
                if weight.ndim == 2 and "queries" not in name:
                    weight.mul_(4)
    pipe.flux.save_pretrained(folder / "flux")
    pipe.adapter.save_pretrained(folder / "adapter")
    encoder.clip.save_pretrained(folder / "clip")
    encoder.dino.save_pretrained(folder / "dino")
    write_instructions(folder / "instructions")
    names = ("flux", "adapter", "clip", "dino", "instructions")
    return [f"{name}={folder / name}" for name in names]


def write_picture_parts(folder):
    """An adapter for the models of a small rehearsal, and what reads instructions: assignments."""
    write_picture_adapter(folder / "adapter")
    write_instructions(folder / "instructions")
    return [f"{name}={folder / name}" for name in ("adapter", "instructions")]


def write_picture_adapter(folder, channels=32):
    """12 positions; the FLUX of a small rehearsal takes 32 channels."""
    torch.manual_seed(0)
    sizes = {"width": 32, "num_layers": 1, "num_heads": 2, "out_features": channels}
    SemanticAdapter(tokens_per_node=(4, 2), in_features=32, **sizes).save_pretrained(folder)
    return folder


def write_instructions(folder):
    torch.manual_seed(1)
    tokenizer, model = build_instruction_encoder(SMALL)
    InstructionEncoder(tokenizer, model).save_pretrained(folder)


def write_edits(folder, square=10, wide=4):
    """A folder of pictures, and a list of pairs of them in edits.jsonl; its path."""
    write_pictures(folder, square, wide)
    names = sorted(path.name for path in folder.glob("*.jpg"))
    pairs = [names[:square], names[square:]]
    rows = [
        {"source": a, "target": b, "instruction": f"make the {color} one large"}
        for group in pairs
        for a, b, color in zip(group, group[1:] + group[:1], ["red", "blue"] * 50, strict=False)
    ]
    path = folder / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tiny(recipe, out_dir, parts, *more):
    """The config of a tiny run."""
    pictures = recipe.startswith("edit-")
    words = [*TINY, *(OF_PICTURES if pictures else []), *parts, f"out_dir={out_dir}", *more]
    return override(RECIPES[recipe](), words)


def build(config):
    return build_stage(config, Ranks())


def newest(config):
    """The run's newest checkpoint, which must be whole."""
    return newest_valid(config.folder / "checkpoints", lambda line: None)
