"""The model that comes with the package: whole, small, and good at what it is for."""

from pathlib import Path

import pytest
import torch

import sda_fast as sda
from sda_fast.files import check_manifest
from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import row, score
from sda_fast.scenes.world import SMALL, sample_scenes

ROOT = Path(__file__).parent.parent
WEIGHTS = Path(sda.__file__).parent / "scenes" / "weights"
FLAT = ROOT / "bench/baselines/scenes-flat"


@pytest.fixture(scope="module")
def pipe():
    pipe = sda.SemanticPipeline.from_pretrained("scenes")
    pipe.flux.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_whole_and_small():
    check_manifest(WEIGHTS)
    files = [f for folder in (WEIGHTS, FLAT) for f in folder.rglob("*") if f.is_file()]
    named = (WEIGHTS / "SHA256SUMS").read_text().count("\n")
    assert named == len([f for f in WEIGHTS.rglob("*") if f.is_file()]) - 1
    assert sum(f.stat().st_size for f in files) <= 24e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]


def test_it_rebuilds_unseen_scenes(pipe):
    """Well below what bench quality measures, far above what an untrained model reaches."""
    scenes = sample_scenes(SMALL, "test", 77, 48)
    rebuilt = pipe.reconstruct(render(scenes, SMALL.size), seed=range(48), output="pt")
    rates = row(score(parse(rebuilt.float(), SMALL), scenes))
    assert rates["recall"] > 0.9
    assert rates["color"] > 0.8
    assert rates["shape"] > 0.7
    assert rates["miou"] > 0.6


@pytest.mark.parametrize("path", ["/0", "/1", "/2", "/3"])
def test_a_transplant_changes_its_quadrant_and_little_else(pipe, path):
    emb = pipe.encode(render(sample_scenes(SMALL, "test", 12, 16), SMALL.size))
    a, b = emb.select(slice(0, 8)), emb.select(slice(8, 16))
    was, now = (pipe.decode(e, seed=range(8), output="pt") for e in (a, a.transplant(b, path)))
    change = (now - was).abs().mean((0, 1))
    y0, x0, y1, x1 = (int(edge * SMALL.size) for edge in a.tree.box(path))
    inside = torch.zeros_like(change, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert change[inside].mean() > 4 * change[~inside].mean()


def test_the_same_seed_gives_the_same_picture_alone_and_in_a_batch(pipe):
    pictures = render(sample_scenes(SMALL, "test", 9, 3), SMALL.size)
    emb = pipe.encode(pictures)
    together = pipe.decode(emb, steps=4, seed=[1, 2, 3], output="pt")
    alone = pipe.decode(emb.select(1), steps=4, seed=2, output="pt")
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=0)


def test_the_stock_pipeline_takes_its_embeddings(pipe):
    emb = pipe.encode(render(sample_scenes(SMALL, "test", 9, 1), SMALL.size))
    inputs = emb.flux_inputs(32, 32, patch=pipe.patch)
    options = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    stock = pipe.flux(**inputs, **options, generator=torch.Generator().manual_seed(4)).images
    ours = pipe.decode(emb, steps=3, seed=4, output="pt")
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=0)
