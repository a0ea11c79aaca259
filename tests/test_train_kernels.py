"""The fused path trains as the reference does: its operators on the CPU, and the kernels."""

from pathlib import Path

import pytest
import torch

from sda_fast import scenes
from tests.pictures import write_pictures
from tests.test_train_chain import tiny as tiny_scenes
from tests.tiny_training import build, gradient, tiny
from train.__main__ import build_stage
from train.loop import train
from train.ranks import Ranks
from train.report import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def step(data, out_dir):
    words = ["precision=bf16", "batch_size=1", "micro_batch=1", "tokens_per_node=2,1"]
    stage = build(tiny(out_dir, data, *words))
    return gradient(stage, next(stage.batches(1)))


def test_a_half_precision_step_is_that_of_the_reference(data, tmp_path, request):
    losses, grads = step(data, tmp_path)
    request.getfixturevalue("kernels")
    by_kernels, kernel_grads = step(data, tmp_path)
    assert by_kernels["loss"].item() == pytest.approx(losses["loss"].item(), rel=2e-2)
    ours, theirs = (
        torch.cat([grad.flatten() for grad in some.values()]) for some in (kernel_grads, grads)
    )
    assert not torch.equal(ours, theirs)
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.99
    assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=0.05)


def test_the_fused_path_learns_as_the_reference_does(tmp_path):
    """200 steps through the shipped decoder: FastFlux, and diffusers' blocks with a dense mask."""
    shipped = Path(scenes.__file__).parent / "weights"
    parts = [f"{name}={shipped / name}" for name in ("flux", "clip", "dino")]
    curves, moves = [], []
    for way in ("stock", "fast"):
        words = ["steps=200", "eval_every=200", f"decoder={way}", "adamw_lr=3e-3", "batch_size=1"]
        config = tiny_scenes("scenes-adapter", tmp_path / way, parts, *words)
        stage = build_stage(config, Ranks())
        before = weights(stage.trained)
        train(config, stage)
        moves.append(weights(stage.trained) - before)
        rows = read_log(config.folder)
        curves.append(torch.tensor([rows[step]["loss"] for step in range(1, 201)]))
    stock, fused = curves
    assert stock[-50:].mean() < 0.9 * stock[:20].mean()
    torch.testing.assert_close(fused[:20], stock[:20], rtol=1e-4, atol=0)
    # rounding grows from step to step as the weights part
    torch.testing.assert_close(fused, stock, rtol=5e-3, atol=0)
    assert torch.cosine_similarity(*moves, dim=0) > 0.999


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])
