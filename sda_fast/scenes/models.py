"""The models of the scenes world: classes of the real system in sizes a CPU can train."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from sda_fast.scenes import edits
from sda_fast.scenes.captions import WORDS
from sda_fast.scenes.vae import SpaceToDepthVAE
from sda_fast.scenes.world import World

PATCH = 4
"""Pixels along one side of an image token, and of an encoder's patch."""
WIDTH = 96
"""Channels of the text encoder's output, hence of an embedding position."""
POOLED = 32
"""Channels of the pooled vector. It carries nothing here: it is always zero."""
MASK = "<mask>"
"""The token of instructions that stands for a word to be filled in."""


def build_tokenizer(
    world: World, words: tuple[str, ...] = WORDS, special: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Return a word-level tokenizer of the caption grammar; "g-12" is two tokens.

    Args:
        world: whose longest caption fits.
        words: that it knows.
        special: more tokens, after those for padding, end and unknown words.
    """
    pieces = ["<pad>", "</s>", "<unk>", *special, *words]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence(
        [WhitespaceSplit(), Split(Regex("-"), behavior="merged_with_previous")]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", pieces.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=world.text_tokens,
    )


def token_ids(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Return [B, T] int64, padded to the tokenizer's length as FluxPipeline pads a T5 prompt.

    Raises:
        ValueError: a caption is longer than that: nothing of it is cut off in silence.
    """
    ids = tokenizer(captions, padding="max_length", return_tensors=None).input_ids
    for text, row in zip(captions, ids, strict=True):
        if len(row) > tokenizer.model_max_length:
            raise ValueError(
                f"captions must fit {tokenizer.model_max_length} tokens, got {len(row)}: {text!r}"
            )
    return torch.tensor(ids)


def build_flux(world: World) -> FluxPipeline:
    """Return an untrained FluxPipeline for the world: decoder, text encoder, VAE, scheduler.

    There is no CLIP text encoder: the pooled vector is zero.
    """
    heads, layers, single_layers = (4, 2, 4) if world.size <= 32 else (8, 3, 5)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * PATCH * PATCH,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=32,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(8, 12, 12),
    )
    tokenizer = build_tokenizer(world)
    text_encoder = T5EncoderModel(_text_config(len(tokenizer)))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=SpaceToDepthVAE(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=text_encoder,
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def build_instruction_encoder(world: World) -> tuple[PreTrainedTokenizerFast, T5EncoderModel]:
    """Return the tokenizer and an untrained encoder of instructions, which may be captions too.

    It is to be trained by filling in masked words.
    """
    tokenizer = build_tokenizer(world, edits.WORDS, (MASK,))
    # people begin with a capital and end with a full stop
    plain = [normalizers.Lowercase(), normalizers.Replace(Regex("[.!?;:]"), "")]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(plain)
    return tokenizer, T5EncoderModel(_text_config(len(tokenizer)))


def _text_config(words: int) -> T5Config:
    return T5Config(
        vocab_size=words,
        d_model=WIDTH,
        d_kv=24,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
    )


def build_clip(world: World) -> CLIPVisionModel:
    """Return an untrained vision encoder, to be trained by contrast with captions."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=288,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=world.size,
            patch_size=PATCH,
        )
    )


def build_dino(world: World) -> Dinov2Model:
    """Return an untrained vision encoder, to be trained by filling in masked patches."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            mlp_ratio=3,
            image_size=world.size,
            patch_size=PATCH,
            use_mask_token=True,
        )
    )
