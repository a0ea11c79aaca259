"""FastFlux in fp8: lossy by so much and no more, and never with yesterday's weights."""

import pytest
import torch
from peft import LoraConfig

from sda_fast import cuda_graphs
from sda_fast.cuda_graphs import GraphCache
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.packed_linear import is_plain

from .attached_flux import TREE, dense, make_inputs, make_transformer, run
from .tape import TapePool


@pytest.fixture
def transformer():
    return make_transformer(num_layers=2, num_single_layers=2).requires_grad_(False)


@pytest.fixture
def quick(transformer):
    return FastFlux(transformer, TREE, precision="fp8")


def quantised_twin(transformer):
    """The stock transformer with what fp8 makes of the weights of its blocks' linears."""
    from sda_fast.ops import Fp8Weight

    twin = make_transformer(num_layers=2, num_single_layers=2)
    twin.load_state_dict(transformer.state_dict())
    for block in (*twin.transformer_blocks, *twin.single_transformer_blocks):
        for name, linear in block.named_modules():
            if is_plain(linear.requires_grad_(False)) and "norm" not in name:
                weight = Fp8Weight.of(linear.weight)
                linear.weight.data = weight.values.float() * weight.scale[:, None]
    return twin


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_it_is_off_by_about_what_rounding_to_three_bits_costs(transformer, quick):
    """Weights rounded alone give an error of 2.6 % in each product; inputs rounded as much again.
    With so few channels they hardly average out."""
    inputs = make_inputs()
    exact = dense(transformer, inputs)
    by_weights = distance(dense(quantised_twin(transformer), inputs), exact)
    found = distance(run(quick, inputs), exact)
    assert 0.3 * by_weights < found < 3 * by_weights
    assert found < 0.15
    assert distance(run(FastFlux(transformer, TREE), inputs), exact) < 1e-5


def test_gradients_are_as_close(transformer, quick):
    grads = []
    for model in (quick, FastFlux(transformer, TREE)):
        inputs = make_inputs()
        positions = inputs["encoder_hidden_states"].requires_grad_()
        emb = SemanticEmbedding(positions, TREE, inputs["pooled_projections"])
        args = inputs["hidden_states"], inputs["timestep"], emb
        out = model.velocity(*args, grid=(4, 6))
        torch.manual_seed(1)
        grads += torch.autograd.grad((out * torch.randn_like(out)).sum(), positions)
    assert 1e-3 < distance(*grads) < 0.3


@torch.no_grad()
def test_weights_that_are_written_are_quantised_again(transformer, quick):
    inputs = make_inputs()
    before = run(quick, inputs)
    for parameter in transformer.parameters():
        parameter.mul_(1.3)
    assert distance(run(quick, inputs), dense(transformer, inputs)) < 0.15
    assert distance(run(quick, inputs), before) > 0.05
    assert torch.equal(
        run(quick, inputs), run(FastFlux(transformer, TREE, precision="fp8"), inputs)
    )


@torch.no_grad()
def test_pack_sees_what_leaves_no_trace(transformer, quick):
    inputs = make_inputs()
    run(quick, inputs)
    for parameter in transformer.parameters():
        parameter.data.mul_(1.3)
    quick.pack()
    assert torch.equal(
        run(quick, inputs), run(FastFlux(transformer, TREE, precision="fp8"), inputs)
    )


@torch.no_grad()
def test_lora_layers_are_called_as_they_are(transformer, quick):
    inputs = make_inputs()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp", "proj_out"]))
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.3)
    mask = TREE.attention_mask(4, 6)[None, None]
    assert distance(run(quick, inputs), run(transformer, inputs, attention_mask=mask)) < 0.15


@torch.no_grad()
def test_no_graph_is_stale(transformer, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    quick = FastFlux(transformer, TREE, precision="fp8", graph=True)
    pool = TapePool()
    quick._graphs = GraphCache(make_pool=pool)
    plain = FastFlux(transformer, TREE, precision="fp8")
    inputs = make_inputs()
    for change in (lambda _: None, lambda p: p.mul_(1.1), lambda p: p.mul_(0.8)):
        for parameter in transformer.parameters():
            change(parameter)
        assert torch.equal(run(quick, inputs), run(plain, inputs))
        assert torch.equal(run(quick, inputs), run(plain, inputs))
    assert len(pool.tapes) == 3


def test_other_precisions_are_refused(transformer):
    with pytest.raises(ValueError, match="precision must be None or 'fp8', got 'int4'"):
        FastFlux(transformer, TREE, precision="int4")


def test_weights_that_are_not_finite_are_refused(transformer):
    transformer.single_transformer_blocks[0].proj_mlp.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="Fp8Weight: weight must be finite"):
        FastFlux(transformer, TREE, precision="fp8")
