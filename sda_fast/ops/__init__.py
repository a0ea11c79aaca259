"""Operators: checks, schemas, shape rules, gradients. Needs torch only until one is called."""

from csrc_triton.tiles import IMPLEMENTATIONS
from sda_fast.ops.fp8_linear import Fp8Weight, fp8_linear
from sda_fast.ops.hierarchical_attention import hierarchical_attention, mask_bytes
from sda_fast.ops.modulation import ada_norm, gated_ada_norm
from sda_fast.ops.norm_rope import norm_rope
from sda_fast.ops.rope3d_attention import rope3d_attention

__all__ = [
    "IMPLEMENTATIONS",
    "Fp8Weight",
    "ada_norm",
    "fp8_linear",
    "gated_ada_norm",
    "hierarchical_attention",
    "mask_bytes",
    "norm_rope",
    "rope3d_attention",
]
