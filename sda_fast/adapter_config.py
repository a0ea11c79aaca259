"""Configurations of the semantic adapter: the named ones, and what each argument may be."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sda_fast.coords import check_int
from sda_fast.model_folder import check_sizes

SIZES = ("in_features", "width", "num_layers", "num_heads", "out_features", "cross_attention_every")


@dataclass(frozen=True)
class Preset:
    """A named configuration and the encoders it was made for.

    Attributes:
        config: arguments of ``SemanticAdapter``.
        clip: hub id of the contrastive encoder.
        dino: hub id of the self-supervised encoder.
        size: side in pixels of a square input to both.
        squash: whether pictures are squeezed into that square.
    """

    config: dict[str, Any] = field(hash=False)
    clip: str
    dino: str
    size: int
    squash: bool = False


PRESETS = {
    "reference": Preset(
        config={
            "tokens_per_node": (32, 8, 4),
            "in_features": 1280 + 1024,
            "width": 1024,
            "num_layers": 12,
            "num_heads": 16,
            "out_features": 4096,
            "pooled_features": None,  # the pipeline then embeds the empty prompt
        },
        clip="apple/DFN5B-CLIP-ViT-H-14-378",
        dino="facebook/dinov2-large",
        size=378,
    )
}


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse arguments of ``SemanticAdapter`` of a wrong type or size; other keys pass.

    Raises:
        ValueError: one cannot be; the message names it.
    """
    check_sizes(config, SIZES)
    for name, value in config.items():
        if name == "pooled_features" and value is not None:
            check_int("pooled_features, unless None,", value, least=1)
        elif name.endswith("_rope") and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
