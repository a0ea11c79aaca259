"""Configurations of the T5 editor: the named ones, and what each argument may be."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from transformers import T5Config

from sda_fast.model_folder import check_sizes
from sda_fast.weights import check_fingerprint

Mode = Literal["autoregressive", "prefilled", "level", "delta"]
MODES: tuple[Mode, ...] = get_args(Mode)
SIZES = (
    "channels", "text_features", "width", "num_layers", "num_heads", "head_dim", "ff_width",
)  # fmt: skip
PRESETS: dict[str, dict[str, int]] = {
    "t5-base": {"width": 768, "num_layers": 12, "num_heads": 12, "head_dim": 64, "ff_width": 2048},
    "t5-large": {
        "width": 1024, "num_layers": 24, "num_heads": 16, "head_dim": 64, "ff_width": 2816,
    },
    "t5-xxl": {
        "width": 4096, "num_layers": 24, "num_heads": 64, "head_dim": 64, "ff_width": 10240,
    },
}  # fmt: skip
"""The decoder halves of T5 v1.1 (https://huggingface.co/google/t5-v1_1-large and its sisters).
t5-xxl is as wide as a position of FLUX: it needs no projections."""


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse arguments of ``EmbeddingEditor`` of a wrong type or size; other keys pass.

    Raises:
        ValueError: one cannot be; the message names it.
    """
    check_sizes(config, SIZES)
    for name, value in config.items():
        if name == "mode" and value not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {value!r}")
        if name in ("adapter", "instructions"):
            check_fingerprint(name, value)


def decoder_config(config: Any) -> T5Config:
    """The decoder of T5 v1.1 in the sizes of an editor's config; no vocabulary is used."""
    return T5Config(
        vocab_size=1,
        d_model=config.width,
        d_kv=config.head_dim,
        d_ff=config.ff_width,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_decoder=True,
        eos_token_id=None,
        is_encoder_decoder=True,
        use_cache=False,
    )
