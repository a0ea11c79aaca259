"""Real CUDA graphs: what the stand-in of a CPU cannot show."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from sda_fast.cuda_graphs import GraphCache

from .tiny_encoders import tiny_adapter, tiny_encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture
def adapter():
    adapter = tiny_adapter(width=64, num_heads=2, pooled_features=5)
    adapter.set_encoder(tiny_encoder())
    return adapter.to(CUDA, torch.bfloat16)


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)).to(CUDA)


def assert_same(adapter, height=32, width=32, batch=1):
    pixels = torch.rand(batch, 3, height, width)
    found, expected = adapter.encode(pixels, graph=True), adapter.encode(pixels)
    assert torch.equal(found.tokens, expected.tokens)


def run(cache, model, x):
    return cache.run(model, [x], [model])


def test_embeddings_are_the_same_for_each_size(adapter):
    for height, width in [(32, 32), (40, 24), (32, 32), (24, 40)]:
        assert_same(adapter, height, width)
    assert len(adapter._graphs) == 3
    assert_same(adapter, batch=3)


def test_more_sizes_than_are_kept(adapter):
    for width in range(24, 24 + 4 * 12, 4):
        assert_same(adapter, 32, width)
    assert len(adapter._graphs) == adapter._graphs.limit
    assert_same(adapter, 32, 24)


def test_weights_that_change_in_place_or_move_are_seen(adapter):
    assert_same(adapter)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.1)
    assert_same(adapter)
    layer = adapter.qformer.layers[0].self_attention.to_out
    layer.weight.data = layer.weight.data * 2
    assert_same(adapter)
    adapter.to("cpu")
    adapter.to(CUDA)
    assert_same(adapter)


def test_under_autocast_weights_that_change_in_place_are_seen():
    adapter = tiny_adapter()
    adapter.set_encoder(tiny_encoder())
    adapter.to(CUDA)
    with torch.autocast("cuda", torch.bfloat16):
        assert_same(adapter)
        with torch.no_grad():
            adapter.proj_out.weight.mul_(2)
            adapter.qformer.to_kv.weight.mul_(2)
        adapter.encode(torch.rand(1, 3, 32, 32), graph=True)
    with torch.autocast("cuda", torch.bfloat16):  # leaving the first one emptied its casts
        assert_same(adapter)


def test_streams_take_turns(model):
    cache = GraphCache()
    xs = [torch.randn(64, 256, device=CUDA) for _ in range(64)]
    with torch.no_grad():
        expected = [model(x) for x in xs]
    run(cache, model, xs[0])
    streams, found = [torch.cuda.Stream() for _ in range(4)], []
    torch.cuda.synchronize()
    for i, x in enumerate(xs):
        with torch.cuda.stream(streams[i % 4]):
            found.append(run(cache, model, x))
    torch.cuda.synchronize()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_capture_survives_another_thread_that_allocates(model):
    stop = threading.Event()

    rounds = []

    def others():
        while not stop.is_set():
            torch.ones(256, 256, device=CUDA).sum().item()
            rounds.append(1)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        cache = GraphCache(limit=2)
        for rows in range(1, 20):
            x = torch.randn(rows, 256, device=CUDA)
            with torch.no_grad():
                assert torch.equal(run(cache, model, x), model(x))
    finally:
        stop.set()
        thread.join()
        assert rounds


def test_what_waits_for_the_device_is_refused_and_the_cache_goes_on(model):
    cache, x = GraphCache(), torch.randn(4, 256, device=CUDA)

    def waits(x):
        return x * x.sum().item()

    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError, match=r"inputs of \[\(4, 256\)\] gave no CUDA graph"):
        cache.run(waits, [x], [model])
    assert torch.cuda.current_stream() == before
    torch.cuda.synchronize()
    assert torch.randn(8, device=CUDA).std() > 0
    with torch.no_grad():
        assert torch.equal(run(cache, model, x), model(x))


def test_memory_of_graphs_that_were_given_up_comes_back(model):
    cache = GraphCache(limit=2)
    sizes = []
    for rows in range(1000, 1024):
        run(cache, model, torch.randn(rows, 256, device=CUDA))
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert max(sizes[4:]) <= max(sizes[:4]) + 2**22
    cache.clear()
    assert torch.cuda.memory_allocated() < sizes[0] + 2**20


def test_inference_mode_first(adapter):
    with torch.inference_mode():
        assert_same(adapter)
    assert_same(adapter)


def test_two_caches_in_two_threads_capture_one_after_the_other(model):
    other = nn.Linear(256, 64).to(CUDA)
    xs = [torch.randn(rows, 256, device=CUDA) for rows in range(1, 9)]

    def many(module):
        cache = GraphCache(limit=2)
        with torch.no_grad():
            return all(torch.equal(run(cache, module, x), module(x)) for x in xs)

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(many, (model, other))) == [True, True]
