"""What each operator means, in plain torch. The oracle of the tests; never on a hot path."""

from sda_fast.reference.fp8_linear import fp8_linear
from sda_fast.reference.hierarchical_attention import hierarchical_attention
from sda_fast.reference.modulation import ada_norm, gated_ada_norm
from sda_fast.reference.norm_rope import norm_rope
from sda_fast.reference.rope3d_attention import rope3d, rope3d_attention

__all__ = [
    "ada_norm",
    "fp8_linear",
    "gated_ada_norm",
    "hierarchical_attention",
    "norm_rope",
    "rope3d",
    "rope3d_attention",
]
