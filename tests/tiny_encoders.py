"""Random vision encoders of a few thousand parameters, of every kind that the library takes."""

import torch
import transformers
from transformers import PreTrainedModel

SIZE = 32
DEPTH = 4


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
