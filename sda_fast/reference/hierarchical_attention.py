"""What hierarchical_attention means: softmax attention under the tree's dense mask."""

from torch import Tensor

from sda_fast.hierarchy import Hierarchy
from sda_fast.reference.dense_attention import dense_attention


def hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tree: Hierarchy,
    h: int,
    w: int,
    rule: str = "overlap",
    scale: float | None = None,
    extra_text: int = 0,
    *,
    isolate_level: int | None = None,
    source: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Joint attention; see sda_fast.ops.hierarchical_attention for arguments and results.

    Any device and any float dtype; float64 inputs give the yardstick. Here lse has a gradient.
    """
    mask = tree.attention_mask(h, w, rule, extra_text, isolate_level, source)
    out, lse = dense_attention(q, k, v, mask.to(q.device), scale)
    return (out, lse) if return_lse else out
