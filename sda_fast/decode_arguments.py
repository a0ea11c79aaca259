"""What ``SemanticPipeline`` takes, checked before anything runs."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from sda_fast.coords import check_int
from sda_fast.flux_inputs import patch_grid

MOST = 2**64 - 1  # the largest seed that torch takes

# arguments of Flux pipelines that ``decode`` fills by itself, and what to use in their place
FILLED = {
    "generator": "seed",
    "output_type": "output",
    "return_dict": "output",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "prompt": "text",
    "prompt_2": "text",
    "prompt_embeds": "emb and text",
    "pooled_prompt_embeds": "emb",
    "num_images_per_prompt": "a batch of embeddings",
    "max_area": "height and width",
}


def refuse_filled(options: Mapping[str, Any]) -> None:
    """Refuse options for the Flux pipeline that ``decode`` would have to overwrite.

    Raises:
        ValueError: one of them is among the options.
    """
    for name, instead in FILLED.items():
        if name in options:
            raise ValueError(f"decode takes {instead} in place of {name}, got {name}")
    joint = options.get("joint_attention_kwargs") or {}
    if "attention_mask" in joint:
        raise ValueError(
            "decode takes rule and attention in place of an attention_mask, got one in "
            "joint_attention_kwargs"
        )


def sampling(
    defaults: Any, patch: int, given: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    """What a Flux pipeline is told of sizes, steps, guidance and noise.

    Args:
        defaults: ``DecodeDefaults``, for what is given as None.
        patch: pixels along an image token.
        given: "height", "width", "steps" and "guidance" of the caller.
        seeds: of each picture's noise.

    Raises:
        ValueError: one cannot be; the message names it.
    """
    known = {name: getattr(defaults, name) if v is None else v for name, v in given.items()}
    patch_grid(known["height"], known["width"], patch)
    return {
        "height": known["height"],
        "width": known["width"],
        "num_inference_steps": check_int("steps", known["steps"], 1),
        "guidance_scale": check_guidance(known["guidance"]),
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
    }


def check_guidance(guidance: float) -> float:
    """The guidance, if it is a finite number.

    Raises:
        ValueError: it is not.
    """
    number = isinstance(guidance, Real) and not isinstance(guidance, bool)
    if not number or not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, got {guidance!r}")
    return guidance


def spread_seeds(seed: int | Sequence[int], count: int) -> list[int]:
    """One seed for each of count pictures.

    Raises:
        ValueError: their number is another, or one is no integer from 0 to 2**64 - 1.
    """
    seeds = seed if isinstance(seed, Sequence) else [seed] * count
    if len(seeds) != count:
        raise ValueError(f"seed must be one integer, or one for each of {count}, got {len(seeds)}")
    for value in seeds:
        if check_int("seed", value, 0) > MOST:
            raise ValueError(f"seed must be at most 2**64 - 1, got {value}")
    return list(seeds)


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """The value, if it is known.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return value
