"""A Flux folder whose weights are not those that its config asks for is never loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from sda_fast.flux_parts import check_loaded
from sda_fast.pipeline_folder import load_flux

from .tiny_flux import WIDTH, tiny_flux_pipeline
from .tiny_pipeline import make_pipe

FILE = "diffusion_pytorch_model.safetensors"


def make_text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


@pytest.fixture(scope="module")
def stock():
    flux = tiny_flux_pipeline(FluxPipeline)
    flux.register_modules(text_encoder=make_text_encoder())
    return flux


@pytest.fixture(scope="module")
def saved(stock, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock") / "flux"
    stock.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "flux"))


def load(folder, **options):
    return load_flux(folder, torch.float32, options)


def edit_weights(file, edit):
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same(flux, stock):
    for name in ("transformer", "vae", "text_encoder"):
        torch.testing.assert_close(
            getattr(flux, name).state_dict(), getattr(stock, name).state_dict(), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("part", "key"),
    [
        ("transformer", "context_embedder.bias"),
        ("vae", "decoder.conv_in.bias"),
        ("text_encoder", "final_layer_norm.bias"),
    ],
)
def test_missing_unexpected_and_misshapen(folder, part, key):
    file = folder / part / ("model.safetensors" if part == "text_encoder" else FILE)
    whole = file.read_bytes()
    match = rf"flux {part}: the weights in .*{part} do not fit its config: "
    edit_weights(file, lambda tensors: tensors.pop(key))
    with pytest.raises(ValueError, match=match + rf"missing {key}$"):
        load(folder)
    file.write_bytes(whole)
    edit_weights(file, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(ValueError, match=match + "unexpected stray$"):
        load(folder)
    file.write_bytes(whole)
    edit_weights(file, lambda tensors: tensors.update({key: torch.zeros(1)}))
    with pytest.raises(ValueError, match=match + rf"(of another shape|mismatched) .*{key}"):
        load(folder)
    # a part that the caller leaves out or brings along is not looked at
    own = getattr(load(folder, **{part: None}), part)
    assert own is None


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer", {"num_single_layers": 0}, "unexpected single_transformer_blocks.0.*more"),
        ("transformer", {"num_single_layers": 2}, "missing single_transformer_blocks.1"),
        ("transformer", {"num_layers": "x"}, "config.json makes no FluxTransformer2DModel"),
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "got 'SD3Transformer2DModel'"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "flux vae: .*got 'AutoencoderTiny'"),
        ("vae", {"layers_per_block": 2}, "flux vae: .*missing"),
        ("text_encoder", {"num_hidden_layers": 2}, "flux text_encoder: .*missing"),
        ("text_encoder", {"num_hidden_layers": 0}, "flux text_encoder: .*unexpected"),
    ],
)
def test_a_config_that_asks_for_others(folder, part, changes, message):
    edit_config(folder / part, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_the_file_of_another_model(folder):
    shutil.copy(folder / "vae" / FILE, folder / "transformer" / FILE)
    with pytest.raises(ValueError, match=r"flux transformer: .*missing .*unexpected decoder"):
        load(folder)


def test_shards_and_variants(stock, folder):
    """Both are read, and a shard that lacks a weight is noticed."""
    shutil.rmtree(folder)
    stock.save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    shards = sorted((folder / "transformer").glob("*.fp16-*.safetensors"))
    assert len(shards) > 1
    assert_same(load(folder, variant="fp16"), stock)
    edit_weights(shards[0], lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(ValueError, match=r"flux transformer: .*missing"):
        load(folder, variant="fp16")
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=shards[0].name):
        load(folder, variant="fp16")


def test_modules_of_the_caller(folder, stock):
    (folder / "transformer" / FILE).unlink()
    flux = load(folder, transformer=stock.transformer, text_encoder=None)
    assert flux.transformer is stock.transformer
    assert flux.text_encoder is None


def test_packed_weights_are_left_to_their_quantizer(folder, stock, monkeypatch):
    """Their names and shapes are others; what stays empty is refused after loading."""
    edit_config(folder / "transformer", quantization_config={"quant_method": "any"})
    edit_weights(folder / "transformer" / FILE, lambda tensors: tensors.update(scale=torch.ones(1)))

    def from_pretrained(path, **options):
        flux = tiny_flux_pipeline(FluxPipeline)
        flux.transformer.to("meta")
        return flux

    monkeypatch.setattr(FluxPipeline, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="flux transformer must be loaded whole"):
        load(folder)
    assert isinstance(load(folder, device_map="balanced"), DiffusionPipeline)  # placed on purpose
    check_loaded(stock.components)


def test_saving_an_adapter_that_is_not_fused(tmp_path):
    pipe = make_pipe()
    pipe.flux.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match=r"without adapters, got style: fuse_lora\(\)"):
        pipe.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    for parameter in pipe.flux.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.flux.fuse_lora()
    pipe.flux.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model" / "flux").transformer.state_dict()
    torch.testing.assert_close(loaded, pipe.flux.transformer.state_dict(), rtol=0, atol=0)


def test_saving_fused_projections(tmp_path):
    pipe = make_pipe()
    pipe.flux.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe.save_pretrained(tmp_path / "model")
    pipe.flux.transformer.unfuse_qkv_projections()
    pipe.save_pretrained(tmp_path / "model")
    load(tmp_path / "model" / "flux")
