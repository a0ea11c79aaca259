"""FastFlux against the stock transformer with the dense mask: same outputs, same gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sda_fast import fast_blocks, fast_flux, fast_memory
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.hierarchy import RULES
from sda_fast.packed_linear import PackedLinear

from .attached_flux import FLUX_TOLERANCE, TREE, dense, make_inputs, make_transformer, run
from .tiny_flux import WIDTH

DEEP = {"num_layers": 2, "num_single_layers": 3}
EPS = torch.finfo(torch.bfloat16).eps


@pytest.fixture
def transformer():
    return make_transformer(**DEEP).requires_grad_(False)


def fast(transformer, **options):
    return FastFlux(transformer, TREE, **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
@torch.no_grad()
def test_it_equals_the_stock_transformer_with_the_mask(rule, guidance):
    transformer = make_transformer(**DEEP, guidance_embeds=guidance)
    inputs = make_inputs()
    if not guidance:
        inputs["guidance"] = None
    want = dense(transformer, inputs, rule=rule)
    torch.testing.assert_close(run(fast(transformer, rule=rule), inputs), want, **FLUX_TOLERANCE)


@pytest.mark.parametrize("layout", ["text", "source", "text and source", "one", "local level"])
@torch.no_grad()
def test_other_layouts(transformer, layout):
    sizes, mask, options = {}, {}, {}
    if "text" in layout:
        sizes["extra"] = mask["extra"] = 3
    if "source" in layout:
        sizes["source"] = mask["source"] = (3, 5)
    if layout == "one":
        sizes |= {"h": 5, "w": 3, "batch": 1}
        mask |= {"h": 5, "w": 3}
    if layout == "local level":
        mask |= {"rule": "isolated", "isolate_level": 1}
        options = {"rule": "isolated", "isolate_level": 1}
    inputs = make_inputs(**sizes)
    want = dense(transformer, inputs, **mask)
    torch.testing.assert_close(run(fast(transformer, **options), inputs), want, **FLUX_TOLERANCE)


@torch.no_grad()
def test_in_bfloat16_it_is_as_close_to_float64_as_the_stock_transformer(transformer):
    inputs = {k: v.bfloat16() if v.ndim == 3 else v for k, v in make_inputs().items()}
    inputs["pooled_projections"] = inputs["pooled_projections"].bfloat16()
    exact_inputs = {k: v.double() for k, v in inputs.items()}
    exact = dense(transformer.double(), exact_inputs)
    transformer.bfloat16()
    stock = dense(transformer, inputs).double() - exact
    error = run(fast(transformer), inputs).double() - exact
    assert error.abs().max() <= 1.25 * stock.abs().max() + 2 * EPS * exact.abs().max()
    assert error.square().mean() <= 1.25**2 * stock.square().mean()


def embedding(inputs):
    return SemanticEmbedding(inputs["encoder_hidden_states"], TREE, inputs["pooled_projections"])


def gradients(function, inputs):
    """Of a random functional of the velocity, in positions and latents."""
    leaves = [
        inputs[n].detach().requires_grad_() for n in ("encoder_hidden_states", "hidden_states")
    ]
    torch.manual_seed(7)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad((out * torch.randn_like(out)).sum(), leaves)


def stock_gradients(transformer, inputs):
    mask = TREE.attention_mask(4, 6)[None, None]

    def forward(positions, latents):
        given = inputs | {"encoder_hidden_states": positions, "hidden_states": latents}
        return run(transformer, given, attention_mask=mask)

    return gradients(forward, inputs)


@pytest.mark.parametrize("checkpoint", ["none", "attention-out", "full"])
def test_gradients_through_frozen_weights(transformer, checkpoint):
    inputs = make_inputs()
    quick = fast(transformer)

    def velocity(positions, latents):
        emb = SemanticEmbedding(positions, TREE, inputs["pooled_projections"])
        return quick.velocity(latents, inputs["timestep"], emb, grid=(4, 6), checkpoint=checkpoint)

    found = gradients(velocity, inputs)
    for a, b in zip(found, stock_gradients(transformer, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_drop_in_is_differentiable_too(transformer):
    inputs = make_inputs()
    quick = fast(transformer)
    forward = lambda positions, latents: run(
        quick, inputs | {"encoder_hidden_states": positions, "hidden_states": latents}
    )
    found = gradients(forward, inputs)
    for a, b in zip(found, stock_gradients(transformer, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_gradients_of_weights_that_are_trained():
    """As of a decoder that is not frozen: every weight gets what the stock forward gives it."""
    inputs = make_inputs()
    mask = TREE.attention_mask(4, 6)[None, None]
    grads = []
    for quick in (False, True):
        transformer = make_transformer(**DEEP)
        model = fast(transformer) if quick else transformer
        out = run(model, inputs, **({} if quick else {"attention_mask": mask}))
        out.square().sum().backward()
        grads.append({name: p.grad for name, p in transformer.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=2e-5, msg=name)


class Attentions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.sda_fast.hierarchical_attention.default
        return func(*args, **(kwargs or {}))


def kept_and_recomputed(transformer, checkpoint):
    """Bytes that autograd keeps, but for weights; attentions that the backward runs again."""
    inputs, quick, seen = make_inputs(batch=4), fast(transformer), {}
    weights = {p.untyped_storage().data_ptr() for p in transformer.parameters()}

    def keep(t):
        if t.untyped_storage().data_ptr() not in weights:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    emb = SemanticEmbedding(
        inputs["encoder_hidden_states"].requires_grad_(), TREE, inputs["pooled_projections"]
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        options = {"grid": (4, 6), "checkpoint": checkpoint}
        out = quick.velocity(inputs["hidden_states"], inputs["timestep"], emb, **options)
    with Attentions() as again:
        out.sum().backward()
    return sum(seen.values()), again.count


def test_policies_keep_less_or_recompute_less(transformer):
    policies = ("none", "attention-out", "full")
    kept, again = zip(*(kept_and_recomputed(transformer, p) for p in policies), strict=True)
    assert again == (0, 0, 5)
    assert kept[0] > 3 * kept[2]
    # what the selective one keeps of the attentions, autograd does not see
    assert kept[1] == kept[2]


@torch.no_grad()
def test_modulation_ahead_of_time_gives_each_step_the_same(transformer):
    inputs, quick = make_inputs(batch=1), fast(transformer)
    times = torch.tensor([1.0, 0.7, 0.2])
    pooled = inputs["pooled_projections"].expand(3, -1)
    rows = quick.modulation(times, pooled, torch.full((3,), 3.5))
    ids = inputs["img_ids"], inputs["txt_ids"]
    for i, t in enumerate(times):
        want = run(quick, inputs | {"timestep": t[None]})
        found = quick.denoise(
            inputs["hidden_states"],
            inputs["encoder_hidden_states"],
            rows[i : i + 1],
            quick.layout_of_ids(*ids),
        )
        torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


def test_velocity_is_the_drop_ins(transformer):
    inputs, quick = make_inputs(h=4, w=4), fast(transformer)
    found = quick.velocity(inputs["hidden_states"], inputs["timestep"], embedding(inputs))
    torch.testing.assert_close(found, run(quick, inputs), rtol=0, atol=1e-6)


def test_everything_else_is_the_transformers(transformer):
    quick = fast(transformer)
    assert quick.config is transformer.config
    assert quick.dtype == torch.float32
    with quick.cache_context("cond"):
        pass
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quick.nonsense  # noqa: B018


def test_tuple_is_given_on_demand(transformer):
    (sample,) = fast(transformer)(**make_inputs(), return_dict=False)
    assert sample.shape == (2, 24, 16)
    assert WIDTH == 32


@torch.no_grad()
def test_under_autocast_it_is_as_close_to_float32_as_the_stock_transformer(transformer):
    inputs, quick = make_inputs(), fast(transformer)
    exact = dense(transformer, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        stock = dense(transformer, inputs) - exact
        out = run(quick, inputs)
    error = out - exact
    assert error.abs().max() <= 1.25 * stock.abs().max() + 2 * EPS * exact.abs().max()
    assert error.square().mean() <= 1.25**2 * stock.square().mean()


def test_norm_weights_alone_can_learn(transformer):
    weight = transformer.single_transformer_blocks[-1].attn.norm_q.weight.requires_grad_()
    inputs, mask = make_inputs(), TREE.attention_mask(4, 6)[None, None]
    (want,) = torch.autograd.grad(run(transformer, inputs, attention_mask=mask).sum(), weight)
    (found,) = torch.autograd.grad(run(fast(transformer), inputs).sum(), weight)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("graded", [True, False])
def test_want_of_memory_says_what_was_made_and_what_would_fit(transformer, graded, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate much")

    monkeypatch.setattr(fast_blocks, "norm_rope", full)
    monkeypatch.setattr(fast_memory, "_size_of", lambda _: 2**20)
    quick, inputs = fast(transformer), make_inputs()
    words = "the forward of a training step" if graded else "a forward"
    match = rf"out of memory in {words} for 2 pictures of 51 tokens each.*about [1-9]\d* fit.*much"
    args = inputs["hidden_states"], inputs["timestep"], embedding(inputs)
    go = (lambda: quick.velocity(*args, grid=(4, 6))) if graded else lambda: run(quick, inputs)
    with pytest.raises(torch.OutOfMemoryError, match=match):
        go()


def test_the_estimate_of_what_is_kept_is_about_right():
    """At FLUX's ratio of widths, between 0.8 and 1.4 of what autograd keeps."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 16}
    transformer = make_transformer(**DEEP, **sizes).requires_grad_(False)
    kept, _ = kept_and_recomputed(transformer, "none")
    assert 0.8 < 4 * fast_memory.kept_bytes(transformer, 51, "none") / kept < 1.4


def test_all_kernels_together_equal_the_stock_transformer(kernels, tiles):
    transformer = make_transformer().requires_grad_(False)
    inputs = make_inputs(3, 2, extra=2)
    with torch.no_grad():
        want = dense(transformer, inputs, 3, 2, extra=2)
        found = run(fast(transformer), inputs)
    torch.testing.assert_close(found, want, **FLUX_TOLERANCE)
    inputs = make_inputs(3, 2)
    mask = TREE.attention_mask(3, 2)[None, None]
    quick = fast(transformer)
    by_kernels, by_torch = (
        gradients(
            lambda positions, latents, model=model, joint=joint: run(
                model,
                inputs | {"encoder_hidden_states": positions, "hidden_states": latents},
                **joint,
            ),
            inputs,
        )
        for model, joint in ((quick, {}), (transformer, {"attention_mask": mask}))
    )
    for a, b in zip(by_kernels, by_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("part", ["pack", "modulation"])
def test_want_of_memory_elsewhere_says_what_would_fit(transformer, part, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate much")

    quick, inputs = fast(transformer), make_inputs()
    monkeypatch.setattr(PackedLinear, "pack", full)
    monkeypatch.setattr(fast_flux, "modulation_rows", full)
    if part == "pack":
        with pytest.raises(torch.OutOfMemoryError, match=r"in packing weights: beside .* much"):
            quick.pack()
    else:
        args = inputs["timestep"], inputs["pooled_projections"], inputs["guidance"]
        with pytest.raises(torch.OutOfMemoryError, match=r"modulation of 2 forwards: .* MiB"):
            quick.modulation(*args)
