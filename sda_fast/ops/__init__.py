"""Operators: checks, schemas, shape rules, gradients. Needs torch only until one is called."""

from sda_fast.ops.hierarchical_attention import hierarchical_attention
from sda_fast.ops.rope3d_attention import rope3d_attention

__all__ = ["hierarchical_attention", "rope3d_attention"]
