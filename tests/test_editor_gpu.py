"""Editors as real CUDA graphs."""

import pytest
import torch

from sda_fast.editors.t5_config import MODES

from .test_editor import CHANNELS, N
from .tiny_editors import FEATURES, tiny_editor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = {"rtol": 0, "atol": 1e-5}


def given(batch=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    source = torch.randn(batch, N, CHANNELS, generator=generator).to("cuda", dtype)
    text = torch.randn(batch, 10, FEATURES, generator=generator).to("cuda", dtype)
    said = torch.tensor([10 - 3 * row for row in range(batch)], device="cuda")
    return source, text, torch.arange(10, device="cuda") < said[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_a_graph_says_what_the_editor_says(mode, dtype):
    editor = tiny_editor(mode).to("cuda", dtype)
    for seed in (0, 1, 0):
        plain = editor.generate(*given(seed=seed, dtype=dtype))
        found = editor.generate(*given(seed=seed, dtype=dtype), graph=True)
        close = CLOSE if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
        torch.testing.assert_close(found.tokens, plain.tokens, **close)
    with torch.no_grad():
        editor.positions.mul_(2)
    plain, found = (editor.generate(*given(dtype=dtype), graph=graph) for graph in (False, True))
    torch.testing.assert_close(found.tokens, plain.tokens, **close)


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_on_the_gpu_is_that_on_the_cpu(mode):
    from .test_editor import embedding

    emb, words = embedding(), ["remove the red circle", "make the blue one white"]
    on_cpu = tiny_editor(mode).edit(emb, words)
    on_gpu = tiny_editor(mode).to("cuda").edit(emb, words, graph=True)
    torch.testing.assert_close(on_gpu.embedding.tokens, on_cpu.embedding.tokens, rtol=0, atol=1e-4)
    assert on_gpu.embedding.tokens.device.type == "cpu"
