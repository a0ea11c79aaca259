"""FastFlux at FLUX's width on a GPU: kernels, packed products, fp8 and CUDA graphs together."""

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.hierarchy import Hierarchy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TREE = Hierarchy((32, 8, 4))
EPS = torch.finfo(torch.bfloat16).eps
NAMES = ("encoder_hidden_states", "hidden_states")


@pytest.fixture(scope="module")
def transformer():
    """Two blocks of each kind at FLUX.1-dev's width: 1 B parameters."""
    torch.manual_seed(0)
    with CUDA:
        model = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def make_inputs(side=32, batch=1, dtype=torch.bfloat16):
    draw = torch.Generator(CUDA).manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=draw, device=CUDA).to(dtype)
    return {
        "hidden_states": randn(batch, side * side, 64),
        "encoder_hidden_states": randn(batch, TREE.num_tokens, 4096),
        "pooled_projections": randn(batch, 768),
        "timestep": torch.full((batch,), 0.7, device=CUDA),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, CUDA, torch.float32),
        "txt_ids": torch.zeros(TREE.num_tokens, 3, device=CUDA),
        "guidance": torch.full((batch,), 3.5, device=CUDA),
    }


def run(model, inputs, **joint):
    return model(**inputs, joint_attention_kwargs=joint or None).sample


def stock(transformer, inputs, side=32, **joint):
    mask = TREE.attention_mask(side, side)[None, None].to(CUDA)
    return run(transformer, inputs, attention_mask=mask, **joint)


def in_float32(transformer):
    with CUDA:
        twin = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    twin.load_state_dict(transformer.state_dict())
    return twin.eval().requires_grad_(False)


def assert_as_close(found, plain, exact, ratio=1.25):
    """To float32 as the stock transformer in bfloat16."""
    found, plain = found.float() - exact, plain.float() - exact
    assert found.abs().max() <= ratio * plain.abs().max() + 2 * EPS * exact.abs().max()
    assert found.norm() <= ratio * plain.norm()


@pytest.mark.parametrize(("side", "batch"), [(32, 1), (32, 4), (64, 1)])
@torch.no_grad()
def test_it_is_as_close_to_float32_as_the_stock_transformer(transformer, side, batch):
    inputs = make_inputs(side, batch)
    exact = stock(in_float32(transformer), {k: v.float() for k, v in inputs.items()}, side)
    plain = stock(transformer, inputs, side)
    assert_as_close(run(FastFlux(transformer, TREE), inputs), plain, exact)
    assert_as_close(run(FastFlux(transformer, TREE, graph=True), inputs), plain, exact)


def gradients(forward, inputs):
    leaves = [inputs[name].detach().requires_grad_() for name in NAMES]
    out = forward(*leaves)
    draw = torch.Generator(CUDA).manual_seed(2)
    weight = torch.randn(out.shape, generator=draw, device=CUDA).to(out)
    return torch.autograd.grad(out, leaves, weight)


@pytest.mark.parametrize("checkpoint", ["none", "attention-out", "full"])
def test_gradients_are_as_close_too(transformer, checkpoint):
    inputs, quick = make_inputs(), FastFlux(transformer, TREE)

    def velocity(positions, latents):
        emb = SemanticEmbedding(positions, TREE, inputs["pooled_projections"])
        return quick.velocity(latents, inputs["timestep"], emb, checkpoint=checkpoint)

    by_stock = lambda model, given: gradients(
        lambda *leaves: stock(model, given | dict(zip(NAMES, leaves, strict=True))), given
    )
    exact = by_stock(in_float32(transformer), {k: v.float() for k, v in inputs.items()})
    plain = by_stock(transformer, inputs)
    for a, b, x in zip(gradients(velocity, inputs), plain, exact, strict=True):
        assert_as_close(a, b, x, ratio=2.0)


@torch.no_grad()
def test_graphs_give_what_launches_give_for_other_inputs_sizes_and_weights(transformer):
    graphed, launched = FastFlux(transformer, TREE, graph=True), FastFlux(transformer, TREE)
    for side, batch, t in [(32, 1, 0.9), (32, 1, 0.1), (16, 2, 0.5), (32, 1, 0.9)]:
        inputs = make_inputs(side, batch) | {"timestep": torch.full((batch,), t, device=CUDA)}
        assert torch.equal(run(graphed, inputs), run(launched, inputs))
    assert len(graphed._graphs) == 2
    inputs = make_inputs()
    block = transformer.single_transformer_blocks[0]
    block.proj_out.weight.mul_(1.5)
    assert torch.equal(run(graphed, inputs), run(launched, inputs))
    block.proj_out.weight.data = block.proj_out.weight.data.clone().div_(1.5)
    assert torch.equal(run(graphed, inputs), run(launched, inputs))
    assert torch.equal(run(graphed, inputs), run(launched, inputs))


@torch.no_grad()
def test_modulation_ahead_and_lora_in_graphs(transformer):
    graphed, launched = FastFlux(transformer, TREE, graph=True), FastFlux(transformer, TREE)
    inputs = make_inputs()
    rows = graphed.modulation(
        torch.tensor([0.9, 0.4], device=CUDA), inputs["pooled_projections"].expand(2, -1),
        torch.full((2,), 3.5, device=CUDA),
    )  # fmt: skip
    given = [inputs[name] for name in ("hidden_states", "encoder_hidden_states")]
    ids = inputs["img_ids"], inputs["txt_ids"]
    for row in rows:
        found = graphed.denoise(*given, row[None], graphed.layout_of_ids(*ids))
        assert torch.equal(found, launched.denoise(*given, row[None], graphed.layout_of_ids(*ids)))
    graphed.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_mlp"]), "style")
    try:
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        for scale in (1.0, 0.5, 1.0):
            assert torch.equal(
                run(graphed, inputs, scale=scale), run(launched, inputs, scale=scale)
            )
    finally:
        graphed.delete_adapters("style")
    assert torch.equal(run(graphed, inputs), run(launched, inputs))


@torch.no_grad()
def test_fp8_is_off_by_a_few_percent(transformer):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    inputs = make_inputs(batch=2)
    exact = run(FastFlux(transformer, TREE), inputs).float()
    for graph in (False, True):
        quick = FastFlux(transformer, TREE, precision="fp8", graph=graph)
        error = (run(quick, inputs).float() - exact).norm() / exact.norm()
        assert 1e-3 < error < 0.1


def test_gradients_through_fp8(transformer):
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs fp8")
    inputs, found = make_inputs(), []
    for precision in (None, "fp8"):
        quick = FastFlux(transformer, TREE, precision=precision)

        def velocity(positions, latents, quick=quick):
            emb = SemanticEmbedding(positions, TREE, inputs["pooled_projections"])
            return quick.velocity(latents, inputs["timestep"], emb)

        found.append([g.float() for g in gradients(velocity, inputs)])
    for right, lossy in zip(*found, strict=True):
        assert 1e-3 < (lossy - right).norm() / right.norm() < 0.2


@torch.no_grad()
def test_weights_take_their_memory_once(transformer):
    before = torch.cuda.memory_allocated()
    quick = FastFlux(transformer, TREE)
    run(quick, make_inputs())
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 2**24


@torch.no_grad()
def test_modulation_from_the_cpu_is_the_same(transformer):
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    want = run(quick, inputs)
    quick.offload_modulation()
    assert transformer.norm_out.linear.weight.device.type == "cpu"
    try:
        assert torch.equal(run(quick, inputs), want)
        graphed = FastFlux(transformer, TREE, graph=True)
        assert torch.equal(run(graphed, inputs), want)
    finally:
        transformer.to(CUDA)
    assert torch.equal(run(quick, inputs), want)
