"""Shapes of the models that this was made for, as their authors published them, and random weights.

With random weights memory and speed are those of the real models; pictures are noise.
"""

from typing import Any

import torch
from torch import nn

FLUX_DEV: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
"""Of a FluxTransformer2DModel. Source: transformer/config.json of black-forest-labs/FLUX.1-dev."""
FLUX_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
    "scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False,
    "use_post_quant_conv": False, "sample_size": 1024,
}  # fmt: skip
"""Of an AutoencoderKL. Source: vae/config.json of black-forest-labs/FLUX.1-dev."""
CLIP_VIT_H: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 16, "patch_size": 14, "image_size": 378, "hidden_act": "quick_gelu",
}  # fmt: skip
"""Of a CLIPVisionModel. Source: config.json of apple/DFN5B-CLIP-ViT-H-14-378."""
DINOV2_VIT_L: dict[str, Any] = {
    "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14,
    "image_size": 518, "mlp_ratio": 4,
}  # fmt: skip
"""Of a Dinov2Model. Source: config.json of facebook/dinov2-large."""


def random_weights(model: Any, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Any:
    """Fill a model where it is to be, and freeze it: no weight is zero, the same at every call.

    Products keep the size of what goes through them, at any depth; norms scale by about 1.

    Args:
        model: a module, on the meta device or any other.
        dtype: of its weights.
        device: where they are made.
        seed: of them.

    Returns:
        The model, in evaluation mode.
    """
    # diffusers warns at its own ``to`` of what a model has none of
    model = nn.Module.to(model, dtype)
    on_meta = any(p.is_meta for p in model.parameters())
    model = model.to_empty(device=device) if on_meta else nn.Module.to(model, device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5, generator=generator)
            elif name.endswith("bias"):
                p.normal_(0, 0.02, generator=generator)
            else:
                p.normal_(1, 0.1, generator=generator)
    return model.eval().requires_grad_(False)
