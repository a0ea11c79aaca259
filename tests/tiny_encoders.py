"""Random encoders and adapters of a few thousand parameters, of every kind there is."""

import torch
import transformers
from transformers import PreTrainedModel

from sda_fast.adapter import SemanticAdapter
from sda_fast.encoders import ImageEncoder

SIZE = 32
DEPTH = 4
FEATURES = 32 + 24


def tiny_vision_model(kind: str, patch: int = 8, seed: int = 0) -> PreTrainedModel:
    """kind is clip, siglip, internvl, dinov2 or dinov2_with_registers; 4 layers, 32 px native."""
    widths = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": DEPTH}
    if kind in ("clip", "siglip", "internvl"):
        widths |= {"hidden_size": 32, "intermediate_size": 48}
    else:
        widths |= {"mlp_ratio": 2}
    name = {
        "clip": "CLIPVision",
        "siglip": "SiglipVision",
        "internvl": "InternVLVision",
        "dinov2": "Dinov2",
        "dinov2_with_registers": "Dinov2WithRegisters",
    }[kind]
    square = kind == "internvl"
    config = getattr(transformers, f"{name}Config")(
        image_size=[SIZE, SIZE] if square else SIZE,
        patch_size=[patch, patch] if square else patch,
        **widths,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, name if name.endswith("Model") else f"{name}Model")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # tables and layer scales start at zero or one
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tiny_encoder(
    clip: str = "clip", dino: str = "dinov2", dino_patch: int = 8, **options
) -> ImageEncoder:
    """Both random models, fused; the same weights at every call."""
    clip_model = tiny_vision_model(clip)
    dino_model = tiny_vision_model(dino, dino_patch, seed=1)
    return ImageEncoder(clip_model, dino_model, size=SIZE, **options)


def tiny_adapter(**options) -> SemanticAdapter:
    """12 positions of 20 channels, for the features of tiny_encoder."""
    config = {"tokens_per_node": (4, 2), "in_features": FEATURES, "width": 32, "num_layers": 2}
    config |= {"num_heads": 2, "out_features": 20}
    return SemanticAdapter(**config | options)


def same_state(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether all weights are equal, bit for bit."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
