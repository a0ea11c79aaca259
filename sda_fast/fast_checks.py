"""What FastFlux cannot run is refused by name, before anything runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxTransformer2DModel
from torch import Tensor, nn

from sda_fast.attachment import HOOK, HierarchicalFluxAttnProcessor
from sda_fast.flux_modulation import modulation_linears
from sda_fast.hierarchy import Hierarchy
from sda_fast.packed_linear import is_hooked

EPS = 1e-6  # of every norm of FLUX
PROCESSORS = (FluxAttnProcessor, HierarchicalFluxAttnProcessor)


def check_model(transformer: Any) -> None:
    """Refuse what is no FLUX, or carries something that FastFlux would pass by.

    Raises:
        TypeError: it is no FluxTransformer2DModel.
        ValueError: its blocks or norms are not FLUX's, it has dropout, or see ``check_now``.
    """
    # by type: FastFlux says that its class is this one
    if not issubclass(type(transformer), FluxTransformer2DModel):
        raise TypeError(
            "transformer must be a diffusers FluxTransformer2DModel (not compiled), got "
            f"{type(transformer).__name__}"
        )
    counts = len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)
    if not all(counts):
        raise ValueError(f"transformer must have double and single blocks, got {counts}")
    for name, module in transformer.named_modules():
        passed_by = ".to_out." in name or ".net." in name
        if isinstance(module, nn.Dropout) and module.p > 0 and passed_by and "lora" not in name:
            raise ValueError(f"transformer must have no dropout, got {module.p} in {name}")
        if isinstance(module, nn.RMSNorm | nn.LayerNorm) and module.eps != EPS:
            raise ValueError(f"{name} must be a norm with eps {EPS}, as FLUX's, got {module.eps}")
    away = {id(p) for linear in modulation_linears(transformer) for p in linear.parameters()}
    devices = {str(p.device) for p in transformer.parameters() if id(p) not in away}
    if len(devices) != 1 or "meta" in devices:
        raise ValueError(f"transformer must have its weights on one device, got {sorted(devices)}")
    check_now(transformer)


def check_now(transformer: Any) -> None:
    """Refuse what may be put on a transformer at any time and FastFlux would pass by.

    Raises:
        ValueError: hooks, a forward or an attention processor that it would not call, as those of
            offload, of a cache or of an IP-Adapter; float16.
    """
    if transformer.dtype == torch.float16:
        raise ValueError("transformer must not be float16, whose range FLUX leaves: use bfloat16")
    if getattr(transformer, "encoder_hid_proj", None) is not None:
        raise ValueError("transformer must carry no IP-Adapter: unload it, or use attach or a mask")
    if hasattr(transformer, "_hf_hook"):
        raise ValueError(
            "transformer must have its weights on one device: hooks of accelerate's offload are "
            "on it"
        )
    for module in _passed_by(transformer):
        registry = getattr(module, "_diffusers_hook", None)
        found = [] if registry is None else [name for name in registry.hooks if name != HOOK]
        if found:
            raise ValueError(f"transformer must carry no hooks of diffusers, got {found}")
        if registry is None and is_hooked(module):
            raise ValueError(
                f"{type(module).__name__} of transformer must carry no hook and no forward of its "
                "own: FastFlux does not call it"
            )
        processor = getattr(module, "processor", None)
        if processor is not None and type(processor) not in PROCESSORS:
            raise ValueError(
                "transformer must carry diffusers' own FluxAttnProcessor, got "
                f"{type(processor).__name__}: FastFlux does not call it"
            )


def _passed_by(transformer: Any) -> Iterator[nn.Module]:
    """The modules that a stock forward calls and FastFlux does not."""
    yield transformer
    yield transformer.norm_out
    for block in transformer.transformer_blocks:
        attn = block.attn
        yield from (block, block.norm1, block.norm1_context, attn, block.ff, block.ff_context)
        yield from (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
    for block in transformer.single_transformer_blocks:
        attn = block.attn
        yield from (block, block.norm, block.act_mlp, attn, attn.norm_q, attn.norm_k)


def check_call(
    transformer: Any,
    tree: Hierarchy,
    given: Mapping[str, Any],
    guidance: Tensor | None,
    joint: Mapping[str, Any] | None,
) -> None:
    """Refuse a forward that FastFlux cannot do.

    Args:
        transformer: that it stands in for.
        tree: of the positions.
        given: tensors that must be there, by name.
        guidance: of the call.
        joint: its joint_attention_kwargs.

    Raises:
        ValueError: names what is missing, does not fit or is not supported.
    """
    missing = [name for name, t in given.items() if t is None]
    if missing:
        raise ValueError(f"FastFlux: {', '.join(missing)} must be given, got None")
    left = sorted((joint or {}).keys())
    if "attention_mask" in left:
        raise ValueError(
            "joint_attention_kwargs must hold no attention_mask: FastFlux attends by its hierarchy"
        )
    if left:
        raise ValueError(f"joint_attention_kwargs must hold nothing but scale, got {left}")
    if transformer.config.guidance_embeds != (guidance is not None):
        wanted = "be given" if transformer.config.guidance_embeds else "be None"
        raise ValueError(f"guidance must {wanted} for this transformer, got {guidance}")
    latents, positions = given["hidden_states"], given["encoder_hidden_states"]
    if latents.ndim != 3 or positions.ndim != 3 or len(latents) != len(positions):
        raise ValueError(
            "hidden_states and encoder_hidden_states must be [B, S_img, C] and [B, S_txt, C], got "
            f"{list(latents.shape)} and {list(positions.shape)}"
        )
    for name, ids, x in (
        ("img_ids", given["img_ids"], latents),
        ("txt_ids", given["txt_ids"], positions),
    ):
        if ids.shape[-2:] != (x.shape[1], 3):
            raise ValueError(f"{name} must be [{x.shape[1]}, 3], got {list(ids.shape)}")
    of_sample = {name: given[name] for name in ("timestep", "pooled_projections")}
    for name, t in (of_sample | {"guidance": guidance}).items():
        if t is not None and (t.ndim == 0 or len(t) not in (1, len(latents))):
            raise ValueError(f"{name} must be of 1 or {len(latents)} samples, got {list(t.shape)}")
    if positions.shape[1] < tree.num_tokens:
        raise ValueError(
            f"encoder_hidden_states must hold the {tree.num_tokens} positions of {tree} first, got "
            f"{positions.shape[1]} text tokens"
        )


def refuse_controlnet(block_samples: Any, single_block_samples: Any) -> None:
    """Refuse residuals of a ControlNet.

    Raises:
        ValueError: there are some.
    """
    if block_samples is not None or single_block_samples is not None:
        raise ValueError(
            "controlnet_block_samples and controlnet_single_block_samples must be None: FastFlux "
            "runs no ControlNet; use attach, or the dense mask"
        )
