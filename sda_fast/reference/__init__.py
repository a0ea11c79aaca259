"""What each operator means, in plain torch. The oracle of the tests; never on a hot path."""

from sda_fast.reference.hierarchical_attention import hierarchical_attention
from sda_fast.reference.rope3d_attention import rope3d, rope3d_attention

__all__ = ["hierarchical_attention", "rope3d", "rope3d_attention"]
