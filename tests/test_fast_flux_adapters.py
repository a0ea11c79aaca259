"""LoRA by the methods of a pipeline that carries FastFlux, against one that does not."""

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sda_fast.attachment import attach
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.pipeline import SemanticPipeline

from .attached_flux import FLUX_TOLERANCE, TREE, make_inputs, make_transformer, run
from .tiny_flux import WIDTH, tiny_flux_pipeline
from .tiny_pipeline import make_adapter


def lora(seed, targets=("to_q", "to_v", "proj_mlp", "norm1.linear")):
    """A state dict as it comes in a file."""
    transformer = tiny_flux_pipeline(FluxPipeline).transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=list(targets)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return {f"transformer.{k}": v for k, v in get_peft_model_state_dict(transformer).items()}


class Pair:
    """A stock pipeline with the mask and one with FastFlux: whatever is done, is done to both."""

    def __init__(self, **options):
        self.stock, self.fast = (tiny_flux_pipeline(FluxPipeline) for _ in range(2))
        self.fast.transformer = FastFlux(self.fast.transformer, TREE, **options)
        torch.manual_seed(3)
        tokens, pooled = torch.randn(1, TREE.num_tokens, WIDTH), torch.randn(1, WIDTH)
        self.inputs = SemanticEmbedding(tokens, TREE, pooled).flux_inputs(32, 32)

    def __call__(self, name, *args, **kwargs):
        found = [getattr(pipe, name)(*args, **kwargs) for pipe in (self.stock, self.fast)]
        return found

    def pictures(self):
        paint = lambda pipe, **inputs: pipe(
            **inputs, num_inference_steps=1, generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images  # fmt: skip
        given = dict(self.inputs)
        want = paint(self.stock, **given)
        del given["joint_attention_kwargs"]
        return paint(self.fast, **given), want

    def assert_same(self):
        found, want = self.pictures()
        torch.testing.assert_close(found, want, **FLUX_TOLERANCE)
        return want


def test_every_step_of_a_pipelines_lora_management_is_taken():
    pair = Pair()
    plain = pair.assert_same()
    pair("load_lora_weights", lora(0), adapter_name="style")
    styled = pair.assert_same()
    assert (styled - plain).abs().max() > 1e-3
    assert pair("get_active_adapters") == [["style"], ["style"]]
    pair("set_adapters", ["style"], [0.3])
    assert (pair.assert_same() - styled).abs().max() > 1e-3
    pair("disable_lora")
    torch.testing.assert_close(pair.assert_same(), plain, **FLUX_TOLERANCE)
    pair("enable_lora")
    pair("load_lora_weights", lora(1), adapter_name="other")
    pair("set_adapters", ["style", "other"], [0.5, 0.8])
    pair.assert_same()
    pair("delete_adapters", "other")
    pair.assert_same()
    pair("fuse_lora")
    pair.assert_same()
    pair("unfuse_lora")
    pair.assert_same()
    pair("unload_lora_weights")
    torch.testing.assert_close(pair.assert_same(), plain, **FLUX_TOLERANCE)


def test_in_fp8_a_lora_that_was_fused_and_unloaded_stays():
    pair = Pair(precision="fp8")
    pair.pictures()
    pair("load_lora_weights", lora(0), adapter_name="style")
    pair("fuse_lora")
    pair("unload_lora_weights")
    found, want = pair.pictures()
    fresh = FastFlux(pair.fast.transformer.transformer, TREE, precision="fp8")
    pair.fast.transformer = fresh
    again, _ = pair.pictures()
    assert torch.equal(found, again)
    assert (found - want).abs().max() < 0.2


def test_the_pipeline_saves_the_transformer(tmp_path):
    pair = Pair()
    pair.fast.save_pretrained(tmp_path / "flux")
    absent = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    absent += ("feature_extractor", "image_encoder")
    again = FluxPipeline.from_pretrained(tmp_path / "flux", **dict.fromkeys(absent))
    assert type(again.transformer) is FluxTransformer2DModel
    for a, b in zip(
        again.transformer.state_dict().values(), pair.stock.transformer.state_dict().values(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(a, b)


def test_names_of_weights_are_the_transformers():
    transformer = make_transformer()
    quick = FastFlux(transformer, TREE)
    assert list(dict(quick.named_parameters())) == list(dict(transformer.named_parameters()))
    assert quick.state_dict().keys() == transformer.state_dict().keys()
    assert quick.training is transformer.training is False
    quick.load_state_dict({k: v * 0.5 for k, v in transformer.state_dict().items()})
    assert quick.get_submodule("proj_out") is transformer.proj_out


def test_it_is_not_taken_for_what_can_be_attached_or_wrapped():
    quick = FastFlux(make_transformer(), TREE)
    for wrap in (attach, FastFlux):
        with pytest.raises(TypeError, match=r"FluxTransformer2DModel.* got FastFlux"):
            wrap(quick, TREE)
    flux = tiny_flux_pipeline(FluxPipeline)
    flux.transformer = FastFlux(flux.transformer, TREE)
    with pytest.raises(ValueError, match="got FluxPipeline with FastFlux"):
        SemanticPipeline(flux, make_adapter())


def gradients(model, inputs, **joint):
    leaf = inputs["encoder_hidden_states"].detach().requires_grad_()
    out = run(model, inputs | {"encoder_hidden_states": leaf}, **joint)
    return torch.autograd.grad(out.square().sum(), leaf)[0]


@pytest.mark.parametrize("checkpoint", ["attention-out", "full"])
def test_lora_dropout_draws_the_same_when_it_is_recomputed(checkpoint):
    transformer = make_transformer().requires_grad_(False)
    targets = ["to_q", "proj_mlp"]
    transformer.add_adapter(LoraConfig(r=2, target_modules=targets, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    quick, inputs, found = FastFlux(transformer.train(), TREE), make_inputs(4, 4), []
    for policy in ("none", checkpoint):
        leaf = inputs["encoder_hidden_states"].clone().requires_grad_()
        emb = SemanticEmbedding(leaf, TREE, inputs["pooled_projections"])
        torch.manual_seed(0)
        args = inputs["hidden_states"], inputs["timestep"], emb
        quick.velocity(*args, checkpoint=policy).square().sum().backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].detach()


def test_biases_alone_can_learn():
    inputs, grads = make_inputs(), []
    mask = TREE.attention_mask(4, 6)[None, None]
    for quick in (False, True):
        transformer = make_transformer().requires_grad_(False)
        biases = {n: p for n, p in transformer.named_parameters() if n.endswith("bias")}
        for bias in biases.values():
            bias.requires_grad_()
        model = FastFlux(transformer, TREE) if quick else transformer
        run(model, inputs, **({} if quick else {"attention_mask": mask})).square().sum().backward()
        grads.append({name: bias.grad for name, bias in biases.items()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=2e-5, msg=name)


def test_the_transformers_own_checkpointing_is_honoured():
    transformer = make_transformer(num_layers=2, num_single_layers=2).requires_grad_(False)
    quick, inputs = FastFlux(transformer, TREE), make_inputs()
    want = gradients(quick, inputs)
    saved = []
    for on in (False, True):
        (transformer.enable_gradient_checkpointing if on else lambda: None)()
        sizes = []
        pack = lambda t, sizes=sizes: sizes.append(t.nbytes) or t
        leaf = inputs["encoder_hidden_states"].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(quick, inputs | {"encoder_hidden_states": leaf})
        saved.append(sum(sizes))
    assert saved[1] < saved[0] / 3
    torch.testing.assert_close(gradients(quick, inputs), want)
