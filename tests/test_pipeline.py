import json
import os

import huggingface_hub.constants
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models.transformers import transformer_flux
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.encoders import ImageEncoder
from sda_fast.hierarchy import Hierarchy
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import MANIFEST, SETTINGS, DecodeDefaults
from sda_fast.scenes.vae import SpaceToDepthVAE

from .tiny_flux import PATCH, WIDTH, tiny_flux_pipeline

TREE = Hierarchy((3, 2, 1))
CLOSE = {"rtol": 0, "atol": 1e-5}
DEFAULTS = DecodeDefaults(2 * PATCH, 2 * PATCH, steps=2)
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 4,
}


def make_adapter(pooled_features=WIDTH, out_features=WIDTH) -> SemanticAdapter:
    torch.manual_seed(5)
    adapter = SemanticAdapter(
        tokens_per_node=TREE.tokens_per_node,
        in_features=32,
        width=16,
        num_layers=1,
        num_heads=1,
        out_features=out_features,
        pooled_features=pooled_features,
    )
    if pooled_features:
        adapter.pooled.normal_()
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
    dino = Dinov2Model(Dinov2Config(**VISION))
    adapter.set_encoder(ImageEncoder(clip, dino, size=16, clip_mean=(0.4, 0.5, 0.6)))
    return adapter.eval()


def make_pipe(cls=FluxPipeline, pooled_features=WIDTH, **overrides) -> SemanticPipeline:
    flux = tiny_flux_pipeline(cls, **overrides)
    return SemanticPipeline(flux, make_adapter(pooled_features), DEFAULTS)


def make_embedding(batch=2, pooled=True, width=WIDTH, seed=7) -> SemanticEmbedding:
    torch.manual_seed(seed)
    vector = torch.randn(batch, WIDTH) if pooled else None
    return SemanticEmbedding(torch.randn(batch, TREE.num_tokens, width), TREE, vector)


def make_picture(width=24, height=24, seed=0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


def is_restored(pipe) -> bool:
    kinds = {type(p) for p in pipe.flux.transformer.attn_processors.values()}
    return kinds == {transformer_flux.FluxAttnProcessor}


@pytest.mark.parametrize("rule", ["overlap", "local", "isolated"])
def test_decode_is_the_stock_pipeline_with_the_dense_mask(pipe, rule, monkeypatch):
    """... computed by the op alone."""
    emb, text = make_embedding(), torch.randn(1, 3, WIDTH)
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    want = pipe.flux(
        **emb.flux_inputs(48, 32, rule, text=text),
        num_inference_steps=3,
        guidance_scale=2.0,
        generator=generators,
        output_type="pt",
    ).images
    options = {"rule": rule, "text": text, "output": "pt"}
    dense = pipe.decode(emb, 48, 32, 3, 2.0, 4, attention="mask", **options)
    torch.testing.assert_close(dense, want, **CLOSE)

    def refuse(*args, **kwargs):
        raise AssertionError("diffusers' attention ran")

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", refuse)
    out = pipe.decode(emb, 48, 32, 3, 2.0, 4, **options)
    torch.testing.assert_close(out, want, **CLOSE)
    assert out.shape == (2, 3, 48, 32)
    assert is_restored(pipe)


def test_isolate_level(pipe):
    emb = make_embedding(1)
    by_level = [
        pipe.decode(emb, 64, 64, 1, rule="isolated", isolate_level=level, output="pt")
        for level in (None, 0, 2)
    ]
    assert torch.equal(by_level[0], by_level[2])
    assert not torch.equal(by_level[0], by_level[1])
    dense = pipe.decode(
        emb, 64, 64, 1, rule="isolated", isolate_level=0, output="pt", attention="mask"
    )
    torch.testing.assert_close(dense, by_level[1], **CLOSE)


def test_defaults_and_pictures(pipe):
    pictures = pipe.decode(make_embedding())
    assert [p.size for p in pictures] == [(DEFAULTS.width, DEFAULTS.height)] * 2
    same = pipe.decode(make_embedding(), DEFAULTS.height, DEFAULTS.width, DEFAULTS.steps, 3.5, 0)
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in same]
    assert SemanticPipeline(pipe.flux, pipe.adapter).defaults == DecodeDefaults(1024, 1024, 28, 3.5)


def test_seeds(pipe):
    emb = make_embedding(3)
    batch = pipe.decode(emb, seed=3, output="pt")
    assert torch.equal(pipe.decode(emb, seed=3, output="pt"), batch)
    alone = pipe.decode(emb.select(2), seed=3, output="pt")
    torch.testing.assert_close(alone, batch[2:], **CLOSE)
    several = pipe.decode(emb, seed=[1, 2, 3], output="pt")
    torch.testing.assert_close(several[2], batch[2], **CLOSE)
    assert (several[0] - batch[0]).abs().max() > 1e-3


def test_guidance(pipe):
    """It counts where the transformer was distilled for it, and is ignored elsewhere."""
    emb = make_embedding(1)
    weak, strong = (pipe.decode(emb, guidance=g, output="pt") for g in (1.0, 7.0))
    assert not torch.equal(weak, strong)
    without = make_pipe(guidance_embeds=False)
    weak, strong = (without.decode(emb, guidance=g, output="pt") for g in (1.0, 7.0))
    assert torch.equal(weak, strong)


def test_other_options_reach_flux(capsys):
    pipe = make_pipe(FluxImg2ImgPipeline)
    seen = []

    def watch(flux, step, time, tensors):
        seen.append(step)
        return {}

    pipe.flux.set_progress_bar_config(disable=False)
    picture = torch.rand(1, 3, 32, 32)
    options = {"image": picture, "strength": 0.5, "callback_on_step_end": watch, "output": "pt"}
    near = pipe.decode(make_embedding(1), steps=4, **options)
    assert seen == [0, 1]
    assert "2/2" in capsys.readouterr().err  # diffusers' own progress bar
    far = pipe.decode(make_embedding(1), steps=4, **{**options, "strength": 1.0})
    assert not torch.equal(near, far)


def test_dtype_of_the_decoder_counts():
    pipe = make_pipe().to(torch.bfloat16)
    emb = pipe.encode(make_picture())
    assert emb.tokens.dtype == torch.bfloat16
    out = pipe.decode(emb.to(torch.float32), output="pt")
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_pooled_vector_of_the_empty_prompt():
    pipe = make_pipe(pooled_features=None)
    emb = make_embedding(pooled=False)
    with pytest.raises(ValueError, match=r"pooled vector.*text_encoder"):
        pipe.decode(emb)
    words = {"<pad>": 0, "<start>": 1, "<end>": 2}
    pipe.flux.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>"
    )
    config = CLIPTextConfig(
        vocab_size=3, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    pipe.flux.text_encoder = CLIPTextModel(config).eval()
    ids = torch.zeros(1, pipe.flux.tokenizer_max_length, dtype=torch.long)
    vector = pipe.flux.text_encoder(ids).pooler_output.expand(2, -1).detach()
    want = pipe.decode(SemanticEmbedding(emb.tokens, TREE, vector), output="pt")
    torch.testing.assert_close(pipe.decode(emb, output="pt"), want, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 40}, "height must be a multiple of the 16 pixels"),
        ({"width": -16}, "width must be an integer >= 1"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"seed": [1]}, "seed must be one integer, or one for each of 2, got 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"rule": "global"}, "rule must be one of"),
        ({"output": "latent"}, "output must be one of pil, pt, got 'latent'"),
        ({"attention": "flash"}, "attention must be one of op, mask"),
        ({"text": torch.zeros(1, 2, 5)}, r"text must be \[1 or 2"),
        ({"emb": make_embedding(width=8)}, "tokens of the 32 channels that flux takes, got 8"),
    ],
)
def test_decode_refuses(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.decode(**{"emb": make_embedding(), **options})
    assert is_restored(pipe)


def test_parts_that_do_not_fit():
    flux = tiny_flux_pipeline(FluxPipeline)
    with pytest.raises(ValueError, match="positions of the 32 channels.*out_features=16"):
        SemanticPipeline(flux, make_adapter(out_features=16))
    with pytest.raises(ValueError, match="FluxTransformer2DModel, got Linear"):
        SemanticPipeline(torch.nn.Linear(1, 1), make_adapter())


def test_reconstruct_keeps_aspect_and_order(pipe):
    wide, tall = make_picture(48, 24, seed=1), make_picture(24, 96, seed=2)
    square = make_picture(30, 30, seed=3)
    pictures = pipe.reconstruct([wide, square, tall, wide], seed=[5, 6, 7, 8])
    assert [p.size for p in pictures] == [(48, 16), (32, 32), (16, 64), (48, 16)]
    for place, (picture, seed) in enumerate(zip([wide, square, tall, wide], range(5, 9))):
        size = pictures[place].height, pictures[place].width
        alone = pipe.decode(pipe.encode(picture), *size, seed=seed)[0]
        assert alone.size == pictures[place].size
        assert difference(alone, pictures[place]) <= 1
    assert difference(pictures[0], pictures[3]) > 1  # another seed
    out = pipe.reconstruct([wide, tall], 32, 48, output="pt")
    assert out.shape == (2, 3, 32, 48)


def difference(a: Image.Image, b: Image.Image) -> int:
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def test_reconstruct_takes_tensors_and_files(pipe, tmp_path):
    picture = make_picture()
    picture.save(tmp_path / "a.png")
    pixels = torch.tensor(list(picture.tobytes())).view(1, 24, 24, 3).permute(0, 3, 1, 2) / 255
    want = pipe.reconstruct(picture, output="pt")
    assert torch.equal(pipe.reconstruct(tmp_path / "a.png", output="pt"), want)
    torch.testing.assert_close(pipe.reconstruct(pixels, output="pt"), want, **CLOSE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 32}, "height and width must come together"),
        ({"output": "pt"}, "output must be 'pil' for pictures of different aspect"),
        ({"seed": [1, 2, 3]}, "seed must be one integer, or one for each of 2"),
        ({"images": []}, "at least one picture"),
    ],
)
def test_reconstruct_refuses(pipe, options, message):
    images = [make_picture(48, 24), make_picture(24, 48)]
    with pytest.raises(ValueError, match=message):
        pipe.reconstruct(**{"images": images, **options})


def test_interpolate(pipe):
    a, b = make_picture(seed=1), make_picture(seed=2)
    way = pipe.interpolate(a, b, 3, output="pt", denoise_steps=1)
    for place, picture in ((0, a), (2, b)):
        end = pipe.decode(pipe.encode(picture), steps=1, output="pt")
        torch.testing.assert_close(way[place : place + 1], end, **CLOSE)
    middle = pipe.encode(a).slerp(pipe.encode(b), 0.5)
    torch.testing.assert_close(way[1:2], pipe.decode(middle, steps=1, output="pt"), **CLOSE)
    # a quadrant alone, from embeddings
    ends = pipe.encode([a, b])
    way = pipe.interpolate(
        ends.select(0), ends.select(1), 2, method="lerp", nodes=["/1"], output="pt"
    )
    mixed = ends.select(0).transplant(ends.select(1), "/1")
    torch.testing.assert_close(way[1:], pipe.decode(mixed, output="pt"), **CLOSE)
    with pytest.raises(ValueError, match="b must be one picture, got 2"):
        pipe.interpolate(a, [a, b])
    with pytest.raises(ValueError, match="steps must be an integer >= 2"):
        pipe.interpolate(a, b, 1)
    with pytest.raises(ValueError, match="method must be one of slerp, lerp"):
        pipe.interpolate(a, b, method="mean")


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A folder of links to the saved model, for a test to break one of them."""
    for file in saved.rglob("*"):
        target = tmp_path / "copy" / file.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            os.link(file, target)
    return tmp_path / "copy"


def replace(file, data: bytes) -> None:
    file.unlink()  # the other name of the link keeps its bytes
    file.write_bytes(data)


def test_save_and_load(pipe, saved, tmp_path):
    names = {p.name for p in saved.iterdir()}
    assert names == {"flux", "adapter", "clip", "dino", SETTINGS, MANIFEST}
    loaded = SemanticPipeline.from_pretrained(saved)
    assert loaded.defaults == DEFAULTS
    assert loaded.adapter.encoder.clip_mean == pipe.adapter.encoder.clip_mean
    assert not any(p.requires_grad for p in loaded.flux.transformer.parameters())
    picture = make_picture(40, 24)
    want = pipe.reconstruct(picture, output="pt")
    assert torch.equal(loaded.reconstruct(picture, output="pt"), want)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / MANIFEST).read_bytes() == (saved / MANIFEST).read_bytes()


def test_saved_files_name_no_folder_of_this_machine(saved, tmp_path):
    SemanticPipeline.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(saved.parent) not in file.read_text()


def test_load_from_separate_folders(pipe, saved, tmp_path):
    """As on the hub: each part in a repository of its own."""
    parts = {name: saved / name for name in ("flux", "adapter", "clip", "dino")}
    settings = {"size": 16, "clip_mean": (0.4, 0.5, 0.6)}
    loaded = SemanticPipeline.from_pretrained(**parts, encoder=settings)
    assert loaded.defaults.height == 1024
    picture = make_picture()
    want = pipe.reconstruct(picture, 32, 32, steps=2, output="pt")
    assert torch.equal(loaded.reconstruct(picture, 32, 32, steps=2, output="pt"), want)
    blind = SemanticPipeline.from_pretrained(flux=parts["flux"], adapter=parts["adapter"])
    emb = make_embedding()
    out = blind.decode(emb, 32, 32, 2, output="pt")
    assert torch.equal(out, pipe.decode(emb, output="pt"))
    with pytest.raises(ValueError, match="no encoder"):
        blind.encode(picture)
    blind.save_pretrained(tmp_path / "blind")
    again = SemanticPipeline.from_pretrained(tmp_path / "blind")
    assert again.adapter.encoder is None
    # a part in place of the folder's own, another dtype
    mixed = SemanticPipeline.from_pretrained(saved, dino=parts["dino"], dtype=torch.bfloat16)
    assert mixed.flux.transformer.dtype == mixed.adapter.dtype == torch.bfloat16
    assert mixed.adapter.encoder.dino.dtype == torch.bfloat16


def test_class_and_vae_come_from_the_folder(tmp_path, recwarn, capfd):
    """Another Flux pipeline, and the space-to-depth VAE that diffusers does not know."""
    flux = tiny_flux_pipeline(FluxKontextPipeline, in_channels=48)
    components = {**flux.components, "vae": SpaceToDepthVAE()}
    flux = FluxKontextPipeline(**components)
    pipe = SemanticPipeline(flux, make_adapter(), DecodeDefaults(8, 8))
    assert pipe.patch == 4
    pipe.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "flux" / "model_index.json").read_text())
    assert index["vae"] == ["sda_fast.scenes.vae", "SpaceToDepthVAE"]
    capfd.readouterr()
    loaded = SemanticPipeline.from_pretrained(tmp_path / "model")
    assert "Expected types for vae" not in capfd.readouterr().err
    assert type(loaded.flux) is FluxKontextPipeline
    assert type(loaded.flux.vae) is SpaceToDepthVAE
    options = {"steps": 1, "max_area": 64, "_auto_resize": False, "output": "pt"}
    loaded.flux.set_progress_bar_config(disable=True)
    source = torch.rand(1, 3, 8, 8)
    out = loaded.decode(make_embedding(1), image=source, **options)
    assert torch.equal(out, pipe.decode(make_embedding(1), image=source, **options))
    assert out.shape == (1, 3, 8, 8)


def test_saving_over(pipe, saved, copy, tmp_path, monkeypatch):
    (copy / "adapter" / "stray.txt").write_text("old")
    pipe.save_pretrained(copy)  # one saved before is replaced, as a whole
    assert not (copy / "adapter" / "stray.txt").exists()
    assert (copy / MANIFEST).read_bytes() == (saved / MANIFEST).read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(pipe.adapter.encoder.dino, "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        pipe.save_pretrained(copy)
    SemanticPipeline.from_pretrained(copy)
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}  # no leavings


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_saving_over_something_else(pipe, tmp_path, kind):
    target = tmp_path / "thesis"
    if kind == "file":
        target.write_text("chapter 1")
    else:
        target.mkdir()
        (target / "chapter").write_text("1")
    with pytest.raises(ValueError, match="path must be new, empty or a saved pipeline.*thesis"):
        pipe.save_pretrained(target)
    assert (target if kind == "file" else target / "chapter").read_text() in ("chapter 1", "1")


def test_a_flipped_bit_is_noticed(copy):
    file = copy / "adapter" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    replace(file, bytes(data))
    with pytest.raises(
        ValueError, match=f"diffusion_pytorch_model.safetensors differs.*{MANIFEST}"
    ):
        SemanticPipeline.from_pretrained(copy)
    file.unlink()
    with pytest.raises(ValueError, match="is missing"):
        SemanticPipeline.from_pretrained(copy)


BREAKAGES = {
    "no settings": (SETTINGS, None, FileNotFoundError, f"without {SETTINGS}"),
    "foreign settings": (SETTINGS, b'{"a": 1}', ValueError, "settings of a SemanticPipeline"),
    "no model index": ("flux/model_index.json", None, FileNotFoundError, "flux must be a Flux"),
    "another pipeline": (
        "flux/model_index.json",
        b'{"_class_name": "FluxPipeline", "transformer": ["diffusers", "SD3Transformer2DModel"]}',
        ValueError,
        "FluxTransformer2DModel, got 'FluxPipeline' with .*SD3",
    ),
    "torn transformer": (
        "flux/transformer/diffusion_pytorch_model.safetensors",
        b"\x10\x00",
        ValueError,
        "truncated",
    ),
    "pickled transformer": (
        "flux/transformer/diffusion_pytorch_model.bin",
        b"pickle",
        ValueError,
        "pickled",
    ),
    "another adapter": ("adapter/config.json", b'{"_class_name": "T2IAdapter"}', ValueError, "T2I"),
    "no encoder": ("dino/config.json", None, FileNotFoundError, "dino must be a model folder"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_broken_folders(copy, breakage):
    name, data, error, message = BREAKAGES[breakage]
    (copy / MANIFEST).unlink()
    file = copy / name
    if name.endswith(".bin"):
        file.with_suffix(".safetensors").unlink()
    else:
        file.unlink()
    if data is not None:
        file.write_bytes(data)
    with pytest.raises(error, match=message):
        SemanticPipeline.from_pretrained(copy)


def test_wrong_arguments_to_from_pretrained(saved, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"clip together with dino.*got flux, adapter, clip"):
        SemanticPipeline.from_pretrained(
            flux=saved / "flux", adapter=saved / "adapter", clip=saved / "clip"
        )
    with pytest.raises(ValueError, match="flux and adapter.*got flux"):
        SemanticPipeline.from_pretrained(flux=saved / "flux")
    with pytest.raises(FileNotFoundError, match="path must be a folder.*nowhere"):
        SemanticPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="flux must be a folder.*nowhere"):
        SemanticPipeline.from_pretrained(saved, flux=tmp_path / "nowhere")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"flux must be a folder or a hub id, got 'some-one/flux'"):
        SemanticPipeline.from_pretrained(saved, flux="some-one/flux")
    with pytest.raises(OSError, match=r"path must be a folder or a hub id, got 'some-one/model'"):
        SemanticPipeline.from_pretrained("some-one/model")
