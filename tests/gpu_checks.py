"""What the tests of attention on a GPU ask alike of every operator."""

import subprocess
import sys

import pytest
import torch

from .test_bench_measure import ROOT

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BITS = {2: torch.int16, 4: torch.int32}


def bits(t):
    return t.contiguous().view(BITS[t.element_size()])


def assert_same_bits(found, expected):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(bits(a), bits(b)), f"result {i}"


def assert_repeats(step, times, load):
    """Every result has the bits of the first one, with other work on the device meanwhile."""
    first = [bits(t).clone() for t in step()]
    differ = [torch.zeros((), dtype=torch.int64, device=t.device) for t in first]
    for _ in range(times):
        load()
        for count, a, b in zip(differ, step(), first, strict=True):
            count += bits(a).ne(b).any()
    assert [int(count) for count in differ] == [0] * len(first)


def other_work(device):
    """A load for assert_repeats: large products on another stream."""
    side, x = torch.cuda.Stream(), torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    side.wait_stream(torch.cuda.current_stream())
    x.record_stream(side)  # whoever gets its memory next waits for them

    def load():
        with torch.cuda.stream(side):
            for _ in range(4):
                x @ x

    return load


def assert_a_side_stream_may_run_first(step):
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        found = step()
    expected = step()  # at the same time, with what the side stream made
    main.wait_stream(side)
    assert_same_bits(found, expected)


def assert_rows_alike(results, batch):
    """Of inputs that are expanded over the batch, bit for bit."""
    for result in results:
        assert result.shape[0] == batch
        assert bits(result).eq(bits(result[:1])).all()


def far_apart(tensors, place, reach):
    """Copies of [B, S, H, D] tensors in one buffer full of NaN, neighbours in `place` so far apart
    that the last is `reach` elements or more from the first."""
    first = tensors[0]
    shape = first.shape
    _, length, heads, head_dim = shape
    pack = len(tensors) * head_dim
    strides = [pack * heads * length, pack * heads, pack, 1]
    if place == 2:
        strides[1] = pack  # a head's tokens lie together
    strides[place] = -(-reach // (shape[place] - 1) // pack) * pack
    assert strides[place] >= pack * heads
    assert strides[place] * (shape[place] - 1) >= reach
    size = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + pack
    buffer = torch.full((size,), float("nan"), dtype=first.dtype, device=first.device)
    views = [buffer.as_strided(shape, strides, i * head_dim) for i in range(len(tensors))]
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t)
    return buffer, views


CAPTURE = """
import traceback
import torch


def capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    graph.replay()
    return out


try:
    capture()
except RuntimeError:
    print(traceback.format_exc())
expected = attend()
print("then the same:", torch.equal(capture(), expected))
"""


def assert_a_capture_must_wait_for_a_run(attend, refusal):
    """In a process of its own, where nothing has run; `attend` is code that defines attend()."""
    done = subprocess.run(
        [sys.executable, "-c", attend + CAPTURE],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert f"RuntimeError: {refusal}" in done.stdout, done.stdout + done.stderr
    assert "then the same: True" in done.stdout, done.stdout + done.stderr
