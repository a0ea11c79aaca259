"""What models and collectives must at least compute, hold and send: pure functions."""

from collections.abc import Mapping
from typing import Any

BACKWARD = 2.5
"""FLOPs of an attention's backward over its forward's: five matrix products instead of two.
Source: the convention of FlashAttention-2, https://arxiv.org/abs/2307.08691, section 4.1."""
TIME_CHANNELS = 256
"""Of FLUX's sinusoidal embedding of a time."""


def flux_flops(config: Mapping[str, Any], txt: int, img: int, backward: bool = False) -> float:
    """FLOPs of a FLUX transformer for one picture: matrix products and attention over all pairs.

    A double block has 12 d * d weights for each token of a stream (q, k, v, out, and an MLP four
    times as wide), a single block as many for each of all; a token meets each of them once, 2 FLOPs
    a weight. Attention is 4 S * S * d a block; what a mask leaves out is counted, as the kernels
    that it is compared with do it. Source: diffusers' transformer_flux.py.

    Args:
        config: of a FluxTransformer2DModel.
        txt: text tokens.
        img: image tokens.
        backward: with the gradients of both inputs, none of weights: each product of a token once
            more, and attention by BACKWARD.
    """
    d = config["num_attention_heads"] * config["attention_head_dim"]
    blocks, seq = config["num_layers"] + config["num_single_layers"], txt + img
    embed = txt * config["joint_attention_dim"] + 2 * img * config["in_channels"]
    linear = 2 * d * (12 * d * seq * blocks + embed)
    attention = 4 * seq * seq * d * blocks
    modulation = 2 * modulation_weights(config)
    if backward:
        linear, attention = 2 * linear, (1 + BACKWARD) * attention
    return linear + attention + modulation


def modulation_weights(config: Mapping[str, Any]) -> int:
    """Weights that see one row a picture: of time, guidance and pooled text, and of all norms.

    Args:
        config: of a FluxTransformer2DModel.
    """
    d = config["num_attention_heads"] * config["attention_head_dim"]
    norms = 12 * config["num_layers"] + 3 * config["num_single_layers"] + 2
    times = 1 + bool(config["guidance_embeds"])
    embedders = times * (TIME_CHANNELS + d) + config["pooled_projection_dim"] + d
    return d * (norms * d + embedders)


def flux_parameters(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Numbers of a FLUX transformer, exactly: outside of blocks, of a double, of a single block.

    Args:
        config: of a FluxTransformer2DModel.
    """
    head = config["attention_head_dim"]
    d = config["num_attention_heads"] * head
    embedder = lambda features: _linear(features, d) + _linear(d, d)
    outside = (1 + bool(config["guidance_embeds"])) * embedder(TIME_CHANNELS)
    outside += embedder(config["pooled_projection_dim"])
    outside += _linear(config["in_channels"], d) + _linear(config["joint_attention_dim"], d)
    outside += _linear(d, 2 * d) + _linear(d, config["in_channels"])
    feed_forward = _linear(d, 4 * d) + _linear(4 * d, d)
    stream = _linear(d, 6 * d) + 4 * _linear(d, d) + feed_forward + 2 * head
    single = _linear(d, 3 * d) + 3 * _linear(d, d) + _linear(d, 4 * d) + _linear(5 * d, d)
    return outside, 2 * stream, single + 2 * head


def adapter_flops(config: Mapping[str, Any], patches: int, backward: bool = False) -> float:
    """FLOPs of a SemanticAdapter for one picture: matrix products and attention.

    Args:
        config: of a SemanticAdapter; see ``_adapter_sizes`` for what may be left out.
        patches: S, of a picture.
        backward: with the gradients of weights and features: each linear three times in all, and
            attention by BACKWARD.
    """
    queries, width, layers, reads = _adapter_sizes(config)
    of_patches = config["in_features"] * width + width * width + 2 * reads * width * width
    of_queries = (12 * layers + 2 * reads) * width * width + width * config["out_features"]
    linear = 2 * (patches * of_patches + queries * of_queries)
    attention = 4 * queries * width * (layers * queries + reads * patches)
    if backward:
        linear, attention = 3 * linear, (1 + BACKWARD) * attention
    return linear + attention


def adapter_parameters(config: Mapping[str, Any]) -> int:
    """Trained numbers of a SemanticAdapter, exactly.

    Args:
        config: of a SemanticAdapter; see ``_adapter_sizes`` for what may be left out.
    """
    queries, width, layers, reads = _adapter_sizes(config)
    features, out, head = (
        config["in_features"],
        config["out_features"],
        width // config["num_heads"],
    )
    into = features + _linear(features, width) + _linear(width, width)
    self_attention = _linear(width, 3 * width) + _linear(width, width) + 2 * head + 2 * width
    cross_attention = 2 * _linear(width, width) + 2 * head + 2 * width
    feed_forward = _linear(width, 4 * width) + _linear(4 * width, width) + 2 * width
    to_kv = _linear(width, 2 * reads * width) if reads else 0
    qformer = queries * width + 4 * width + to_kv  # the norms of patches and of the end
    qformer += layers * (self_attention + feed_forward) + reads * cross_attention
    return into + qformer + _linear(width, out) + out


def vision_flops(config: Any, patches: int) -> float:
    """FLOPs of the forward of a vision transformer for one picture.

    Args:
        config: of a CLIP, SigLIP, InternVL or DINOv2 vision model of transformers.
        patches: of a picture; class and register tokens come on top, as the kind has them.
    """
    width = config.hidden_size
    # SigLIP alone has no class token
    tokens = patches + (not config.model_type.startswith("siglip"))
    tokens += getattr(config, "num_register_tokens", 0)
    embed = 2 * patches * _patch_weights(config)
    linear = 2 * tokens * _layer_weights(config)
    attention = 4 * tokens * tokens * width
    return embed + config.num_hidden_layers * (linear + attention)


def vision_parameters(config: Any) -> int:
    """Numbers that a vision transformer holds: matrices and positions, without vectors (0.1 %).

    Args:
        config: as in ``vision_flops``, of square pictures.
    """
    side, patch = (_side(config, name) for name in ("image_size", "patch_size"))
    positions = (side // patch) ** 2 * config.hidden_size
    return positions + _patch_weights(config) + config.num_hidden_layers * _layer_weights(config)


def all_reduce_bytes(payload_bytes: int, ranks: int) -> float:
    """Bytes that one rank sends in a ring all-reduce: 2 (W - 1) / W of the payload.

    Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002: no all-reduce sends less.

    Args:
        payload_bytes: of what is reduced, the same on each rank.
        ranks: W.

    Raises:
        ValueError: payload_bytes is negative or ranks below 1.
    """
    if payload_bytes < 0 or ranks < 1:
        raise ValueError(
            f"payload_bytes must be at least 0 and ranks at least 1, got {payload_bytes} "
            f"and {ranks}"
        )
    return 2 * (ranks - 1) / ranks * payload_bytes


def all_reduce_seconds(
    payload_bytes: int, ranks: int, bytes_per_second: float, latency_s: float = 0.0
) -> float:
    """Time of a ring all-reduce: 2 (W - 1) messages after one another, and the bytes of all.

    Args:
        payload_bytes: of what is reduced.
        ranks: W.
        bytes_per_second: that a rank sends over its slowest link.
        latency_s: of a message, seconds.

    Raises:
        ValueError: bytes_per_second is not positive, latency_s is negative, or as
            ``all_reduce_bytes``.
    """
    if not bytes_per_second > 0 or not latency_s >= 0:
        raise ValueError(
            f"bytes_per_second must be positive and latency_s not negative, got "
            f"{bytes_per_second} and {latency_s}"
        )
    return 2 * (ranks - 1) * latency_s + all_reduce_bytes(payload_bytes, ranks) / bytes_per_second


def _adapter_sizes(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """(N, width, layers, layers that read the patches); every layer does, unless told otherwise."""
    layers, every = config["num_layers"], config.get("cross_attention_every", 1)
    queries = sum(count * 4**level for level, count in enumerate(config["tokens_per_node"]))
    return queries, config["width"], layers, -(-layers // every)


def _layer_weights(config: Any) -> int:
    """Of the matrices of one layer: q, k, v, out and an MLP."""
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or int(config.mlp_ratio * width)
    return 4 * width * width + 2 * width * inner


def _patch_weights(config: Any) -> int:
    return 3 * _side(config, "patch_size") ** 2 * config.hidden_size


def _side(config: Any, name: str) -> int:
    """Some kinds give both sides of a square."""
    side = getattr(config, name)
    return side if isinstance(side, int) else side[0]


def _linear(in_features: int, out_features: int) -> int:
    """Weights and biases."""
    return (in_features + 1) * out_features
