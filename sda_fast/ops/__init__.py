"""Operators: checks, schemas, shape rules, gradients. Needs torch only until one is called."""

from csrc_triton.tiles import IMPLEMENTATIONS
from sda_fast.ops.hierarchical_attention import hierarchical_attention, mask_bytes
from sda_fast.ops.rope3d_attention import rope3d_attention

__all__ = ["IMPLEMENTATIONS", "hierarchical_attention", "mask_bytes", "rope3d_attention"]
