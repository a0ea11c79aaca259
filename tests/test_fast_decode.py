"""A compiled pipeline paints what it painted before."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxImg2ImgPipeline, FluxKontextPipeline
from diffusers.models.transformers import transformer_flux
from PIL import ImageChops

from sda_fast import cuda_graphs, fast_decode
from sda_fast.cuda_graphs import GraphCache
from sda_fast.pipeline import SemanticPipeline

from .tape import TapePool
from .tiny_flux import WIDTH, tiny_flux_pipeline
from .tiny_pipeline import CLOSE, make_adapter, make_embedding, make_picture, make_pipe


@pytest.fixture
def pipe():
    return make_pipe()


def no_diffusers(*args, **kwargs):
    raise AssertionError("diffusers' own loop or attention ran")


@pytest.mark.parametrize("rule", ["overlap", "local", "isolated"])
def test_it_paints_the_same_by_a_loop_of_its_own(pipe, rule, monkeypatch):
    emb, text = make_embedding(), torch.randn(1, 3, WIDTH)
    options = {"rule": rule, "text": text, "output": "pt"}
    args = emb, 48, 32, 3, 2.0, [4, 5]
    want = pipe.decode(*args, **options)
    pipe.compile()
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", no_diffusers)
    monkeypatch.setattr(type(pipe.flux), "__call__", no_diffusers)
    monkeypatch.setattr(type(pipe.flux.transformer), "forward", no_diffusers)
    torch.testing.assert_close(pipe.decode(*args, **options), want, **CLOSE)


def test_pictures_of_pil_too(pipe):
    want = pipe.decode(make_embedding(), 48, 32, 2)
    found = pipe.compile().decode(make_embedding(), 48, 32, 2)
    for a, b in zip(found, want, strict=True):
        assert max(top for _, top in ImageChops.difference(a, b).getextrema()) <= 1


def test_everything_above_decode_goes_the_same_way(pipe):
    pictures = [make_picture(seed=0), make_picture(seed=1)]
    options = {"height": 32, "width": 32, "steps": 2, "output": "pt"}
    want = pipe.reconstruct(pictures, **options)
    way = pipe.interpolate(*pictures, steps=3, denoise_steps=2, output="pt")
    pipe.compile()
    torch.testing.assert_close(pipe.reconstruct(pictures, **options), want, **CLOSE)
    found = pipe.interpolate(*pictures, steps=3, denoise_steps=2, output="pt")
    torch.testing.assert_close(found, way, **CLOSE)


@pytest.mark.parametrize("guidance_embeds", [True, False])
def test_modulation_is_made_once_a_picture(guidance_embeds):
    flux = tiny_flux_pipeline(fast_decode.FluxPipeline, guidance_embeds=guidance_embeds)
    pipe = SemanticPipeline(flux, make_adapter())
    args = make_embedding(), 32, 32, 5
    want = pipe.decode(*args, output="pt")
    calls = []
    linear = flux.transformer.single_transformer_blocks[0].norm.linear
    linear.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(pipe.compile().decode(*args, output="pt"), want, **CLOSE)
    assert len(calls) == 1


@pytest.mark.parametrize("cls", [FluxKontextPipeline, FluxImg2ImgPipeline])
def test_other_pipelines_run_their_loop_around_it(cls, monkeypatch):
    pipe = SemanticPipeline(tiny_flux_pipeline(cls), make_adapter())
    options = {"image": torch.rand(2, 3, 32, 48), "output": "pt"}
    want = pipe.decode(make_embedding(), 48, 32, 2, **options)
    stock = pipe.flux.transformer
    pipe.compile()
    monkeypatch.setattr(type(stock), "forward", no_diffusers)
    found = pipe.decode(make_embedding(), 48, 32, 2, **options)
    torch.testing.assert_close(found, want, **CLOSE)
    assert pipe.flux.transformer is stock
    with pytest.raises(TypeError):
        pipe.decode(make_embedding(), 48, 32, 2, nonsense=1, **options)
    assert pipe.flux.transformer is stock


def test_callbacks_and_other_schedulers_run_the_stock_loop(pipe):
    seen = []

    def callback(_pipe, step, _t, tensors):
        seen.append(step)
        return tensors

    args = make_embedding(), 32, 32, 3
    want = pipe.decode(*args, output="pt")
    pipe.compile()
    found = pipe.decode(*args, output="pt", callback_on_step_end=callback)
    torch.testing.assert_close(found, want, **CLOSE)
    assert seen == [0, 1, 2]

    class Other(FlowMatchEulerDiscreteScheduler):
        def step(self, *args, **kwargs):
            seen.append("other")
            return super().step(*args, **kwargs)

    pipe.flux.scheduler = Other.from_config(pipe.flux.scheduler.config)
    torch.testing.assert_close(pipe.decode(*args, output="pt"), want, **CLOSE)
    assert seen[-3:] == ["other"] * 3


def test_the_mask_is_still_there_for_those_who_ask(pipe):
    args = make_embedding(), 32, 32, 2
    want = pipe.decode(*args, attention="mask", output="pt")
    found = pipe.compile().decode(*args, attention="mask", output="pt")
    assert torch.equal(found, want)


def test_a_pipeline_given_later_is_used(pipe):
    args = make_embedding(), 32, 32, 2
    pipe.compile()
    first = pipe.decode(*args, output="pt")
    pipe.flux = tiny_flux_pipeline(type(pipe.flux), seed=1)
    second = pipe.decode(*args, output="pt")
    assert (first - second).abs().max() > 1e-3
    want = SemanticPipeline(pipe.flux, make_adapter()).decode(*args, output="pt")
    torch.testing.assert_close(second, want, **CLOSE)


def test_threads_take_turns(pipe):
    pipe.compile()
    sizes = [(32, 32), (48, 32), (32, 48), (32, 32)]
    emb = make_embedding()
    paint = lambda i: pipe.decode(emb, *sizes[i], 3, seed=i, output="pt")
    want = list(map(paint, range(4)))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(paint, range(4)))
    for a, b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def graphs(pipe, monkeypatch):
    """Graphs are recorded on the CPU."""
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    pool = TapePool()
    monkeypatch.setattr(cuda_graphs, "GraphPool", pool)
    pipe.adapter._graphs = GraphCache()
    return pool


def test_graphs_of_every_part_are_captured_by_warmup_alone(pipe, graphs):
    """Adapter, denoiser and VAE; then no more, whatever picture, seed and number of steps."""
    picture = torch.rand(1, 3, 32, 48)
    emb = pipe.encode(picture)
    want = pipe.decode(emb, 32, 48, 3, 2.0, 7, output="pt")
    pipe.compile(graph=True).warmup([(32, 48)])
    assert len(graphs.tapes) == 3
    found = pipe.decode(pipe.encode(picture), 32, 48, 3, 2.0, 7, output="pt")
    torch.testing.assert_close(found, want, **CLOSE)
    assert len(graphs.tapes) == 3
    pipe.decode(emb, 32, 32, 1)
    assert len(graphs.tapes) == 5


def test_warmup_without_an_encoder():
    pipe = make_pipe()
    pipe.adapter.set_encoder(None)
    pipe.compile().warmup([(32, 32)], batch=2)


def test_refuses(pipe):
    with pytest.raises(ValueError, match="width must be a multiple of the 16 pixels"):
        pipe.warmup([(32, 40)])
    with pytest.raises(ValueError, match="batch must be an integer >= 1, got 0"):
        pipe.warmup([(32, 32)], batch=0)
    pipe.flux.transformer.single_transformer_blocks[0].attn.norm_k.eps = 1e-5
    with pytest.raises(ValueError, match="must be a norm with eps"):
        pipe.compile()
    plain = make_pipe()
    with pytest.raises(ValueError, match="graph must be False for weights on a cpu"):
        plain.compile(graph=True)


@torch.inference_mode()
def test_no_step_reads_anything_from_the_device(pipe, monkeypatch):
    pipe.compile()
    pipe.decode(make_embedding(), 32, 32, 1, output="pt")

    def refuse(*args, **kwargs):
        raise AssertionError("a step waited for the device")

    from sda_fast import flux_layout

    monkeypatch.setattr(flux_layout, "read_grids", refuse)
    waits = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__")
    denoise = fast_decode.FastFlux.denoise
    inside = []

    def spied(self, *args):
        with pytest.MonkeyPatch.context() as patch:
            for name in waits:
                patch.setattr(torch.Tensor, name, refuse)
            inside.append(1)
            return denoise(self, *args)

    monkeypatch.setattr(fast_decode.FastFlux, "denoise", spied)
    pipe.decode(make_embedding(), 32, 32, 3, output="pt")
    assert inside == [1, 1, 1]


def test_another_transformer_sets_the_old_one_free(pipe):
    pipe.compile()
    for rule in ("overlap", "local"):
        pipe.decode(make_embedding(), 32, 32, 1, rule=rule)
    old = weakref.ref(pipe.flux.transformer)
    pipe.flux = tiny_flux_pipeline(type(pipe.flux), seed=1)
    pipe.decode(make_embedding(), 32, 32, 1)
    gc.collect()
    assert old() is None


def test_the_vae_s_settings_are_seen(pipe, graphs):
    args = make_embedding(), 32, 32, 1
    pipe.compile(graph=True).decode(*args)
    pipe.flux.vae.register_to_config(scaling_factor=0.8)
    found = pipe.decode(*args, output="pt")
    want = pipe.decode(*args, output="pt", attention="mask")
    torch.testing.assert_close(found, want, **CLOSE)


def test_want_of_memory_in_the_vae_says_what_would_fit(pipe, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate much")

    pipe.compile()
    monkeypatch.setattr(type(pipe.flux.vae), "decode", full)
    words = "VAE's decoding of 2 pictures of 48 x 32: fewer pictures at once, or .*enable_tiling"
    with pytest.raises(torch.OutOfMemoryError, match=words):
        pipe.decode(make_embedding(), 48, 32, 1)
