"""What a Flux pipeline takes in place of a prompt, from an embedding."""

from typing import Any

import torch
from torch import Tensor

from sda_fast.embedding import SemanticEmbedding
from sda_fast.flux_inputs import append_text, pooled_vector


def prompt_of(flux: Any, emb: SemanticEmbedding, text: Tensor | None) -> dict[str, Tensor]:
    """prompt_embeds and pooled_prompt_embeds, where and in the dtype FLUX wants them.

    Args:
        flux: a Flux pipeline.
        emb: B embeddings; without a pooled vector the empty prompt's stands in.
        text: [1 or B, T, C], an ordinary prompt's embeddings, or None.

    Raises:
        ValueError: emb is not as wide as the transformer's inputs, or has no pooled vector and flux
            has no CLIP text encoder.
    """
    config = flux.transformer.config
    to = flux._execution_device, flux.transformer.dtype
    pooled = None if emb.pooled is None else _moved(emb.pooled, *to)
    emb = SemanticEmbedding(_moved(emb.tokens, *to), emb.tree, pooled)
    pooled = empty_prompt(flux) if emb.pooled is None else emb.pooled
    for name, t, field in (
        ("tokens", emb.tokens, "joint_attention_dim"),
        ("pooled", pooled, "pooled_projection_dim"),
    ):
        if t.shape[-1] != config[field]:
            raise ValueError(
                f"emb must have {name} of the {config[field]} channels that flux takes, "
                f"got {t.shape[-1]}"
            )
    return {
        "prompt_embeds": append_text(emb.tokens, text),
        "pooled_prompt_embeds": pooled_vector(emb.tokens, pooled),
    }


def _moved(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Through pinned memory from the CPU to a GPU: so nothing waits for the copy."""
    if t.device.type == "cpu" and device.type == "cuda":
        t = t.pin_memory()
    return t.to(device, dtype, non_blocking=True)


def empty_prompt(flux: Any) -> Tensor:
    """[1, P]: the CLIP embedding of the empty prompt, which stands in for a pooled vector.

    Raises:
        ValueError: flux has no CLIP text encoder.
    """
    encoder, tokenizer = flux.text_encoder, flux.tokenizer
    if encoder is None or tokenizer is None:
        raise ValueError(
            "emb must have a pooled vector, as neither embedding nor adapter has one and flux "
            "has no CLIP text encoder to embed the empty prompt: give "
            "SemanticEmbedding(tokens, tree, pooled), or load flux with its text_encoder and "
            "tokenizer"
        )
    ids = tokenizer(
        "",
        padding="max_length",
        max_length=flux.tokenizer_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return encoder(ids.to(flux._execution_device)).pooler_output
