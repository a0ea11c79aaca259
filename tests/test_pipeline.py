import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxKontextPipeline, FluxPipeline
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers import transformer_flux
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from sda_fast.embedding import SemanticEmbedding
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import DecodeDefaults

from .tiny_flux import WIDTH, tiny_flux_pipeline
from .tiny_pipeline import (
    CLOSE,
    DEFAULTS,
    TREE,
    make_adapter,
    make_embedding,
    make_picture,
    make_pipe,
)


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


def test_the_largest_seed(pipe):
    pipe.decode(make_embedding(1), steps=1, seed=2**64 - 1)


@pytest.mark.parametrize("where", ["transformer", "everywhere"])
def test_mask_under_a_backend_that_drops_it(pipe, monkeypatch, where):
    """flash_attn's varlen takes a mask and keeps only which keys are padding."""

    def varlen(q, k, v, **kwargs):
        return torch.zeros_like(q)

    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "flash_attn_varlen_func", varlen)
    monkeypatch.setattr(attention_dispatch, "_check_attention_backend_requirements", id)
    emb, backend = make_embedding(1), attention_dispatch.AttentionBackendName.FLASH_VARLEN
    want = pipe.decode(emb, output="pt")
    if where == "everywhere":
        with attention_backend(backend), pytest.raises(ValueError, match=r"varlen.*key padding"):
            pipe.decode(emb, attention="mask")
    else:
        for processor in pipe.flux.transformer.attn_processors.values():
            monkeypatch.setattr(processor, "_attention_backend", backend)
        with pytest.raises(ValueError, match=r"varlen.*key padding.*'native'"):
            pipe.decode(emb, attention="mask")
        pipe.flux.transformer.reset_attention_backend()
    dense = pipe.decode(emb, output="pt", attention="mask")
    torch.testing.assert_close(dense, want, **CLOSE)


@pytest.mark.parametrize("rule", ["overlap", "isolated"])
def test_kontext(rule):
    """It makes the size asked for and takes its picture, of another size, by the same rule."""
    pipe = make_pipe(FluxKontextPipeline)
    emb, source = make_embedding(), torch.rand(2, 3, 32, 64)
    inputs = emb.flux_inputs(48, 32, rule, source=(32, 64))
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    want = pipe.flux(**inputs, **options, image=source, generator=generators).images
    for attention in ("op", "mask"):
        out = pipe.decode(
            emb, 48, 32, 2, 2.0, 4, rule, image=source, attention=attention, output="pt"
        )
        assert out.shape == (2, 3, 48, 32)
        torch.testing.assert_close(out, want, **CLOSE)
    alone = pipe.decode(emb, 48, 32, 2, 2.0, 4, rule, output="pt")
    assert alone.shape == (2, 3, 48, 32)
    assert (alone - want).abs().max() > 1e-3
    with pytest.raises(ValueError, match="height and width in place of max_area"):
        pipe.decode(emb, max_area=64)


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
        ({"height": 0}, "height must be an integer >= 1"),
        ({"seed": None}, "seed must be an integer >= 0, got None"),
        ({"emb": torch.zeros(1, 27, 32)}, "emb must be a SemanticEmbedding, got Tensor"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 2**64}, r"seed must be at most 2\*\*64 - 1"),
        ({"guidance": float("nan")}, "guidance must be a finite number, got nan"),
        ({"guidance": "3"}, "guidance must be a finite number, got '3'"),
        ({"guidance": True}, "guidance must be a finite number, got True"),
        ({"generator": torch.Generator()}, "decode takes seed in place of generator"),
        ({"output_type": "np"}, "decode takes output in place of output_type"),
        ({"return_dict": False}, "decode takes output in place of return_dict"),
        ({"num_images_per_prompt": 2}, "a batch of embeddings in place of num_images_per_prompt"),
        (
            {"joint_attention_kwargs": {"attention_mask": None}},
            "rule and attention in place of an attention_mask",
        ),
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
    with pytest.raises(ValueError, match=r"positions of the 32 channels.*out_features=16"):
        SemanticPipeline(flux, make_adapter(out_features=16))
    with pytest.raises(ValueError, match="FluxTransformer2DModel, got Linear"):
        SemanticPipeline(torch.nn.Linear(1, 1), make_adapter())


def test_reconstruct_keeps_aspect_and_order(pipe):
    wide, tall = make_picture(48, 24, seed=1), make_picture(24, 96, seed=2)
    square = make_picture(30, 30, seed=3)
    pictures = pipe.reconstruct([wide, square, tall, wide], seed=[5, 6, 7, 8])
    assert [p.size for p in pictures] == [(48, 16), (32, 32), (16, 64), (48, 16)]
    for seed, picture, rebuilt in zip(
        (5, 6, 7, 8), (wide, square, tall, wide), pictures, strict=True
    ):
        alone = pipe.decode(pipe.encode(picture), rebuilt.height, rebuilt.width, seed=seed)[0]
        assert difference(alone, rebuilt) <= 1
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
        ends.select(0), ends.select(1), 2, mode="lerp", nodes=["/1"], output="pt"
    )
    mixed = ends.select(0).transplant(ends.select(1), "/1")
    torch.testing.assert_close(way[1:], pipe.decode(mixed, output="pt"), **CLOSE)
    with pytest.raises(ValueError, match="b must be one picture, got 2"):
        pipe.interpolate(a, [a, b])
    with pytest.raises(ValueError, match="steps must be an integer >= 2"):
        pipe.interpolate(a, b, 1)
    with pytest.raises(ValueError, match="mode must be one of slerp, lerp"):
        pipe.interpolate(a, b, mode="mean")
