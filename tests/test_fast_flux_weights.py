"""FastFlux and the weights of its transformer: shared, changed, adapted, moved, saved."""

import copy
import gc
import weakref

import pytest
import torch
from peft import LoraConfig

from sda_fast import cuda_graphs
from sda_fast.cuda_graphs import GraphCache
from sda_fast.fast_flux import FastFlux

from .attached_flux import (
    FLUX_TOLERANCE,
    TREE,
    assert_as_dense,
    dense,
    make_inputs,
    make_transformer,
    run,
)
from .tape import TapePool

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def transformer():
    return make_transformer(num_layers=2, num_single_layers=2)


@pytest.fixture
def quick(transformer):
    return FastFlux(transformer, TREE)


@pytest.fixture
def graphed(transformer, monkeypatch):
    """Its graphs are recorded on the CPU."""
    monkeypatch.setattr(cuda_graphs, "GRAPH_DEVICES", ("cpu",))
    quick = FastFlux(transformer, TREE, graph=True)
    quick.pool = TapePool()
    quick._graphs = GraphCache(make_pool=quick.pool)
    return quick


def storages(transformer):
    """Every memory that weights lie in, once."""
    found = {p.untyped_storage().data_ptr(): p.untyped_storage() for p in transformer.parameters()}
    return list(found.values())


def assert_right(quick, inputs=None, **joint):
    inputs = inputs or make_inputs()
    mask = TREE.attention_mask(4, 6)[None, None]
    want = run(quick.transformer, inputs, attention_mask=mask, **joint)
    assert_as_dense(quick, inputs, want, **joint)


def test_weights_are_shared_and_none_is_copied(transformer):
    before = sum(p.nbytes for p in transformer.parameters())
    quick = FastFlux(transformer, TREE)
    run(quick, make_inputs())
    held = storages(transformer)
    assert sum(storage.nbytes() for storage in held) == before
    groups = [
        [attn.to_q, attn.to_k, attn.to_v] + ([block.proj_mlp] if hasattr(block, "proj_mlp") else [])
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for attn in [block.attn]
    ]
    groups += [
        [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        for attn in (block.attn for block in transformer.transformer_blocks)
    ]
    for group in groups:
        for name in ("weight", "bias"):
            assert len({getattr(m, name).untyped_storage().data_ptr() for m in group}) == 1
    assert len(held) == len(list(transformer.parameters())) - 2 * sum(len(g) - 1 for g in groups)


def test_weights_that_change_in_place_are_seen(quick):
    assert_right(quick)
    for parameter in quick.transformer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.05)
    assert_right(quick)


def test_loaded_weights_are_seen(quick):
    other = make_transformer(seed=5, num_layers=2, num_single_layers=2).state_dict()
    quick.transformer.load_state_dict(other)
    assert_right(quick)
    quick.transformer.load_state_dict({k: v * 0.9 for k, v in other.items()}, assign=True)
    assert_right(quick)


def test_moved_weights_are_packed_again(quick):
    assert_right(quick)
    quick.to(torch.float64).to(torch.float32)
    assert_right(quick)
    total = sum(p.nbytes for p in quick.transformer.parameters())
    assert sum(s.nbytes() for s in storages(quick.transformer)) == total


def test_saved_weights_are_those_of_the_transformer(quick, tmp_path):
    quick.save_pretrained(tmp_path / "flux")
    again = type(quick.transformer).from_pretrained(tmp_path / "flux")
    for (name, a), b in zip(
        quick.transformer.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_copy_has_weights_of_its_own(quick):
    twin = copy.deepcopy(quick)
    for parameter in twin.transformer.parameters():
        parameter.mul_(0.9)
    assert_right(twin)
    assert_right(quick)
    assert (run(twin, make_inputs()) - run(quick, make_inputs())).abs().max() > 1e-3


def add_lora(model, name="style", seed=0):
    targets = ["to_q", "to_k", "to_v", "add_k_proj", "proj_mlp", "proj_out", "norm1.linear"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets), name)
    torch.manual_seed(seed)
    for name_, parameter in model.named_parameters():
        if "lora_B" in name_ and name in name_:
            parameter.normal_(std=0.3)


def test_lora_layers_come_change_and_go(quick):
    plain = run(quick, make_inputs())
    add_lora(quick)
    assert_right(quick)
    assert (run(quick, make_inputs()) - plain).abs().max() > 1e-3
    assert_right(quick, scale=0.5)
    assert_right(quick)
    quick.disable_adapters()
    torch.testing.assert_close(run(quick, make_inputs()), plain, **FLUX_TOLERANCE)
    quick.enable_adapters()
    quick.set_adapters("style", 0.3)
    assert_right(quick)
    quick.fuse_lora()
    assert_right(quick)
    quick.unfuse_lora()
    quick.delete_adapters("style")
    torch.testing.assert_close(run(quick, make_inputs()), plain, **FLUX_TOLERANCE)


def test_fused_projections(quick):
    quick.fuse_qkv_projections()
    assert_right(quick)
    quick.unfuse_qkv_projections()
    assert_right(quick)


def test_hooks_on_a_linear_are_heard(quick):
    linear = quick.transformer.single_transformer_blocks[0].attn.to_k
    hook = linear.register_forward_hook(lambda _module, _args, out: 2 * out)
    assert_right(quick)
    hook.remove()
    assert_right(quick)


def test_graphs_equal_the_mask_at_every_time_and_size(graphed):
    for t in (0.9, 0.2):
        inputs = make_inputs() | {"timestep": torch.full((2,), t)}
        assert_right(graphed, inputs)
    assert len(graphed.pool.tapes) == 1
    wide = make_inputs(6, 4)
    assert_as_dense(graphed, wide, dense(graphed.transformer, wide, 6, 4))
    more = make_inputs(extra=2)
    assert_as_dense(graphed, more, dense(graphed.transformer, more, extra=2))
    assert_right(graphed)
    assert len(graphed.pool.tapes) == 3


def test_graphs_of_modulation_made_ahead(graphed):
    inputs = make_inputs(batch=1)
    guidance = torch.full((2,), 3.5)
    pooled = inputs["pooled_projections"].expand(2, -1)
    rows = graphed.modulation(torch.tensor([0.9, 0.3]), pooled, guidance)
    ids = inputs["img_ids"], inputs["txt_ids"]
    for i, t in enumerate((0.9, 0.3)):
        given = inputs["hidden_states"], inputs["encoder_hidden_states"], rows[i : i + 1]
        want = dense(graphed.transformer, inputs | {"timestep": torch.tensor([t])})
        torch.testing.assert_close(
            graphed.denoise(*given, graphed.layout_of_ids(*ids)), want, **FLUX_TOLERANCE
        )
    assert len(graphed.pool.tapes) == 1


def test_no_graph_is_stale_when_lora_layers_come_change_and_go(graphed):
    assert_right(graphed)
    add_lora(graphed)
    assert_right(graphed)
    assert_right(graphed, scale=0.5)
    graphed.set_adapters("style", 0.3)
    assert_right(graphed)
    for name, parameter in graphed.transformer.named_parameters():
        if "lora_A" in name:
            parameter.mul_(2)
    assert_right(graphed)
    graphed.disable_adapters()
    assert_right(graphed)
    graphed.enable_adapters()
    add_lora(graphed, "other", seed=1)
    graphed.set_adapters(["style", "other"], [0.4, 0.7])
    assert_right(graphed)
    graphed.delete_adapters(["style", "other"])
    assert_right(graphed)


def test_no_graph_is_stale_when_weights_change_or_move(graphed):
    assert_right(graphed)
    for parameter in graphed.transformer.parameters():
        parameter.mul_(0.9)
    assert_right(graphed)
    assert len(graphed.pool.tapes) == 1
    graphed.to(torch.float64).to(torch.float32)
    assert_right(graphed)
    graphed.fuse_qkv_projections()
    assert_right(graphed)


def test_a_graph_under_autograd_is_refused(graphed):
    inputs = make_inputs()
    inputs["encoder_hidden_states"].requires_grad_()
    with torch.enable_grad(), pytest.raises(ValueError, match="graph=True gives no gradients"):
        run(graphed, inputs)


def test_modulation_weights_that_are_put_away_are_fetched(quick, monkeypatch):
    want = run(quick, make_inputs())
    linear = quick.transformer.norm_out.linear
    quick.offload_modulation()
    assert torch.equal(run(quick, make_inputs()), want)
    fetched = []
    call = torch.func.functional_call

    def spy(module, weights, args):
        fetched.append(module)
        return call(module, weights, args)

    # as on a GPU: away is on another device
    monkeypatch.setattr(torch.func, "functional_call", spy)
    weight = linear.weight.data
    linear.weight = torch.nn.Parameter(torch.empty(weight.shape, device="meta"))
    monkeypatch.setattr(
        torch.nn.Parameter, "to",
        lambda self, *args: weight if self.device.type == "meta" else self.data, raising=False,
    )  # fmt: skip
    assert torch.equal(run(quick, make_inputs()), want)
    assert fetched == [linear]


def test_a_graph_of_weights_that_learn_is_refused(graphed):
    add_lora(graphed)
    with torch.enable_grad(), pytest.raises(ValueError, match="an input or a weight requires one"):
        run(graphed, make_inputs())


def test_weights_made_in_inference_mode_stay_usable():
    with torch.inference_mode():
        transformer = make_transformer()
        inputs = make_inputs()
        want = dense(transformer, inputs)
        quick = FastFlux(transformer, TREE)
        torch.testing.assert_close(run(quick, inputs), want, **FLUX_TOLERANCE)
        torch.testing.assert_close(dense(transformer, inputs), want, rtol=0, atol=0)


def test_no_memory_of_moved_weights_stays_alive(transformer):
    quick, idle = FastFlux(transformer, TREE), FastFlux(transformer, TREE)
    run(quick, make_inputs())
    old = weakref.ref(transformer.single_transformer_blocks[0].attn.to_q.weight.untyped_storage())
    transformer.to(torch.float64)
    gc.collect()
    assert old() is None
    assert idle.tree is quick.tree


def test_a_hook_that_comes_after_the_capture_is_heard(graphed):
    assert_right(graphed)
    linear = graphed.transformer.single_transformer_blocks[0].proj_mlp
    hook = linear.register_forward_hook(lambda _module, _args, out: 2 * out)
    assert_right(graphed)
    hook.remove()
    assert_right(graphed)


def test_a_graph_knows_its_rule(graphed):
    assert_right(graphed)
    graphed.rule = "isolated"
    want = dense(graphed.transformer, make_inputs(), rule="isolated")
    assert_as_dense(graphed, make_inputs(), want)
