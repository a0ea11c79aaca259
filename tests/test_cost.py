"""FLOPs, sizes and sent bytes by arithmetic, against what torch counts on real modules."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, Dinov2Config

from sda_fast.adapter import SemanticAdapter
from sda_fast.adapter_config import PRESETS
from sda_fast.cost import (
    adapter_flops,
    adapter_parameters,
    all_reduce_bytes,
    all_reduce_seconds,
    flux_parameters,
    vision_flops,
    vision_parameters,
)
from sda_fast.shapes import CLIP_VIT_H, DINOV2_VIT_L, FLUX_DEV

from .tiny_encoders import tiny_vision_model
from .tiny_flux import TRANSFORMER

TINY = {
    "tokens_per_node": (3, 2), "in_features": 20, "width": 32, "num_layers": 3, "num_heads": 2,
    "out_features": 12,
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
    """Made before any test: torch remembers what it puts on the meta device at the first use."""
    with torch.device("meta"):
        return SemanticAdapter(**PRESETS["reference"].config)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_an_adapter_has_that_many_parameters(every, reference):
    config = TINY | {"cross_attention_every": every}
    for known, adapter in (
        (config, SemanticAdapter(**config)),
        (PRESETS["reference"].config, reference),
    ):
        assert adapter_parameters(known) == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("guidance", [True, False])
def test_a_transformer_has_that_many_parameters(guidance):
    config = {**TRANSFORMER, "num_layers": 2, "num_single_layers": 3, "guidance_embeds": guidance}
    model = FluxTransformer2DModel(**config)
    size = lambda module: sum(p.numel() for p in module.parameters())
    outside, double, single = flux_parameters(config)
    assert double == size(model.transformer_blocks[0])
    assert single == size(model.single_transformer_blocks[0])
    assert outside + 2 * double + 3 * single == size(model)


def test_the_large_transformer_has_the_published_size():
    outside, double, single = flux_parameters(FLUX_DEV)
    assert (outside + 19 * double + 38 * single) / 1e9 == pytest.approx(11.90, rel=1e-3)


def attention(q, k, v, *args, out_val=None, **kwargs):
    """FLOPs of the operator, which torch asks for by shapes."""
    batch, queries, heads, dim = q
    return 4 * batch * heads * dim * queries * k[1]


@pytest.mark.parametrize("every", [1, 2])
def test_an_adapter_computes_what_torch_counts(every):
    config = TINY | {"cross_attention_every": every}
    adapter = SemanticAdapter(**config)
    features = torch.randn(1, 35, 20, requires_grad=True)
    ours = {torch.ops.sda_fast.rope3d_attention: attention}
    with FlopCounterMode(display=False, custom_mapping=ours) as counted:
        out = adapter(features, (5, 7))
        assert counted.get_total_flops() == adapter_flops(config, 35)
    with FlopCounterMode(display=False) as counted:
        out.sum().backward()
    # torch does not look into the operator's backward
    linears = adapter_flops(config, 35) - attention_of(config)
    both = adapter_flops(config, 35, backward=True)
    assert counted.get_total_flops() == 2 * linears
    assert both == pytest.approx(3 * linears + 3.5 * attention_of(config), rel=1e-12)


def attention_of(config):
    reads = -(-3 // config["cross_attention_every"])
    return 4 * 11 * 32 * (3 * 11 + reads * 35)


@pytest.mark.parametrize("kind", ["clip", "siglip", "internvl", "dinov2", "dinov2_with_registers"])
def test_an_encoder_computes_what_torch_counts(kind):
    model = tiny_vision_model(kind)
    pixels = torch.randn(1, 3, 32, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted, torch.no_grad():
        model(pixels)
    pooling = 0
    if kind == "siglip":  # its pooled vector, which nobody reads, comes from one more layer
        with FlopCounterMode(display=False) as head, torch.no_grad():
            model.head(torch.randn(1, 16, 32))
        pooling = head.get_total_flops()
    assert vision_flops(model.config, 16) == counted.get_total_flops() - pooling


@pytest.mark.parametrize(
    ("config", "millions"),
    [(CLIPVisionConfig(**CLIP_VIT_H), 631.7), (Dinov2Config(**DINOV2_VIT_L), 304.4)],
)
def test_the_published_encoders_have_the_published_sizes(config, millions):
    assert vision_parameters(config) / 1e6 == pytest.approx(millions, rel=3e-3)


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_an_encoder_has_that_many_matrices_and_positions(kind):
    model = tiny_vision_model(kind)
    held = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "_token" not in name
    )
    assert vision_parameters(model.config) == held - model.config.hidden_size  # of the class token


def test_an_all_reduce_sends_what_a_ring_sends():
    assert all_reduce_bytes(1000, 1) == 0
    assert all_reduce_bytes(1000, 2) == 1000
    assert all_reduce_bytes(1000, 4) == 1500
    # simulated: each rank passes on one of W parts, 2 (W - 1) times
    parts, ranks = 250, 4
    assert all_reduce_bytes(1000, ranks) == sum(parts for _ in range(2 * (ranks - 1)))
    assert all_reduce_seconds(1000, 4, 500.0, 0.1) == pytest.approx(6 * 0.1 + 3)
    assert all_reduce_seconds(1000, 1, 500.0, 0.1) == 0
    for bad in ((-1, 2), (1, 0)):
        with pytest.raises(ValueError, match="payload_bytes must be at least 0 and ranks"):
            all_reduce_bytes(*bad)
    for speed, latency in ((0.0, 0.0), (1.0, -1.0), (float("nan"), 0.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="bytes_per_second must be positive"):
            all_reduce_seconds(1, 2, speed, latency)
