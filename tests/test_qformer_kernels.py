"""The adapter on the kernels against the adapter on the reference: same weights, same gradients."""

import copy

import pytest
import torch

from csrc_triton.tiles import ROPE3D_KERNELS, Tile, forced
from sda_fast import qformer, reference
from sda_fast.adapter import SemanticAdapter
from sda_fast.flux_latents import latents_of, pack
from sda_fast.hierarchy import Hierarchy
from sda_fast.losses import cosine_penalty, flow_matching_loss, sample_t
from sda_fast.scenes.render import render
from sda_fast.scenes.world import SMALL, sample_scenes
from train.decoders import StockVelocity

from .tiny_scenes import POOLED, SIZE, tiny_scenes_pipeline

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def tiles():
    if torch.cuda.is_available():
        yield
    else:
        with forced(**{name: Tile(32, 64, 4, 2) for name in ROPE3D_KERNELS}):
            yield


def on_reference(monkeypatch):
    """From here on the QFormer attends by the reference."""
    monkeypatch.setattr(qformer, "rope3d_attention", reference.rope3d_attention)


def run(adapter, features, grid, dtype):
    """Embedding and the gradients of all parameters."""
    adapter = copy.deepcopy(adapter).to(dtype)
    out = adapter(features.to(dtype), grid)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator).to(out)
    (out * weight).sum().backward()
    grads = {name: p.grad for name, p in adapter.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    return {"out": out.detach(), **grads}


@pytest.mark.parametrize("options", [{}, {"self_attention_rope": True, "cross_attention_every": 2}])
def test_embedding_and_gradients_of_all_parameters(options, kernels, monkeypatch, device):
    """By the yardstick: off from float64 by at most twice the reference's error and a rounding."""
    adapter = SemanticAdapter(
        tokens_per_node=(4, 2), in_features=24, width=32, num_layers=2, num_heads=2,
        out_features=16, **options,
    ).to(device)  # fmt: skip
    features = torch.randn(2, 35, 24).to(device)
    ours = run(adapter, features, (5, 7), torch.float32)
    on_reference(monkeypatch)
    eager = run(adapter, features, (5, 7), torch.float32)
    exact = run(adapter, features, (5, 7), torch.float64)
    for name, x in exact.items():
        error, allowed = (ours[name] - x).abs().max(), (eager[name] - x).abs().max()
        # two roundings of each of the dozen products behind a parameter's gradient
        assert error <= 2 * allowed + 24 * EPS * x.abs().max(), name


def losses_of(pipe, adapter, steps):
    """The loss curve of an adapter that learns two scenes through the frozen decoder.

    Every fourth step draws the same noise, so that what was learned shows.
    """
    pictures = render(sample_scenes(SMALL, "train", 0, 2), SIZE)
    with torch.no_grad():
        features, grid = pipe.adapter.encoder(pictures)
    x0 = pack(latents_of(pipe.flux.vae, pictures))
    mask = Hierarchy(adapter.tree.tokens_per_node).attention_mask(8, 8)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step % 4)
        t = sample_t(len(x0), x0.shape[1], generator)
        noise = torch.randn(x0.shape, generator=generator)
        tokens = adapter(features, grid)
        pooled = torch.zeros(len(tokens), POOLED)
        velocity = StockVelocity(pipe.flux, tokens, pooled, (8, 8), joint={"attention_mask": mask})
        loss = flow_matching_loss(velocity, x0, t, noise) + 0.01 * cosine_penalty(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_eight_steps_on_scenes_give_the_same_loss_curve(kernels, monkeypatch):
    pipe = tiny_scenes_pipeline(tokens_per_node=(3, 1))
    start = pipe.adapter.train()
    ours = losses_of(pipe, copy.deepcopy(start), 8)
    on_reference(monkeypatch)
    right = losses_of(pipe, copy.deepcopy(start), 8)
    assert (right[4:] < right[:4]).all()
    torch.testing.assert_close(ours, right, rtol=2e-4, atol=0)
