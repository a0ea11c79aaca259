"""The hierarchy as a dense mask in diffusers' own attention, where the op cannot be used."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

from sda_fast.attachment import check_backend, check_processor, read_grids
from sda_fast.hierarchy import Hierarchy


@contextmanager
def dense_mask(
    transformer: FluxTransformer2DModel,
    tree: Hierarchy,
    rule: str = "overlap",
    *,
    isolate_level: int | None = None,
) -> Generator[None, None, None]:
    """While open, every forward of a FLUX transformer gets the mask of its own layout.

    As with ``attach`` the grids are read from ``img_ids``, those of a Kontext source included.

    Args:
        transformer: as in ``attach``; it may carry an IP-Adapter.
        tree: the hierarchy of the embeddings that come as ``encoder_hidden_states``.
        rule: "overlap", "local" or "isolated".
        isolate_level: for "isolated", the level whose nodes are kept apart; None is the deepest.

    Raises:
        ValueError: rule or isolate_level is unknown, or the attention backend, set on the
            transformer or by diffusers' ``attention_backend``, would drop a mask.
    """
    tree.attention_mask(1, 1, rule, isolate_level=isolate_level)
    remedy = "take one that masks, such as 'native'"
    processors: dict[str, Any] = transformer.attn_processors
    for processor in processors.values():
        check_processor(processor, remedy)
        if processor._attention_backend is None:
            check_backend(_AttentionBackendRegistry.get_active_backend()[0], remedy)
    masks: dict[tuple[Any, ...], Tensor] = {}  # of a few layouts: it is the same at every step

    @torch.compiler.disable
    def add_mask(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        prompt = kwargs["encoder_hidden_states"]
        extra_text = prompt.shape[1] - tree.num_tokens
        grid, *source = read_grids(kwargs["img_ids"])
        key = (grid, *source, extra_text, prompt.device)
        if key not in masks:
            of_source = source[0] if source else None
            mask = tree.attention_mask(*grid, rule, extra_text, isolate_level, of_source)
            masks[key] = mask[None, None].to(prompt.device)
        given = kwargs.get("joint_attention_kwargs") or {}
        return args, {**kwargs, "joint_attention_kwargs": {**given, "attention_mask": masks[key]}}

    handle = transformer.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
