"""What an attention must at least compute and move: pure functions. Models are in sda_fast.cost."""

from bench.cases import Case
from sda_fast.cost import BACKWARD
from sda_fast.cost import flux_flops as flux_flops
from sda_fast.cost import modulation_weights as modulation_weights


def allowed_pairs(case: Case) -> int:
    """Pairs (query, key) that the mask allows, of one head of one sample.

    Counted from rows and columns alone, nothing of the mask's size is built.
    """
    counts = list(case.tree.tokens_per_node)
    counts[0] += case.extra_text  # extra text behaves as the root
    img = case.h * case.w
    own = sum(
        count * _touches(case.h, 2**level) * _touches(case.w, 2**level)
        for level, count in enumerate(counts)
    )
    if case.rule == "overlap":
        return case.txt_len * case.seq_len + own + img * img
    # a node of the deeper level has one ancestor of the other
    txt = sum(
        4 ** max(i, j) * mine * other
        for i, mine in enumerate(counts)
        for j, other in enumerate(counts)
    )
    if case.rule == "isolated":
        cells = 2 ** (case.tree.num_levels - 1)
        return txt + 2 * own + _sharing(case.h, cells) * _sharing(case.w, cells)
    return txt + 2 * own + img * img


def attention_flops(case: Case, masked: bool, backward: bool) -> float:
    """4 D FLOPs a pair forward (q k and p v), 3.5 times that with the backward.

    Source: the convention of FlashAttention-2, https://arxiv.org/abs/2307.08691, section 4.1.

    Args:
        case: the attention.
        masked: count allowed pairs only, else all S * S.
        backward: forward and backward, else the forward alone.
    """
    pairs = allowed_pairs(case) if masked else case.seq_len**2
    forward = 4 * pairs * case.head_dim * case.heads * case.batch
    return forward * (1 + BACKWARD) if backward else forward


def attention_bytes(case: Case, backward: bool) -> int:
    """Of q, k, v and out, each moved once; with the backward of their gradients too."""
    one = case.batch * case.seq_len * case.heads * case.head_dim * case.dtype.itemsize
    return (8 if backward else 4) * one


def norm_rope_bytes(tokens: int, width: int, parts: int, itemsize: int) -> int:
    """Of q, k and, with three parts, v: each read once and written once.

    Args:
        tokens: of all pictures.
        width: H * D.
        parts: 2 or 3.
        itemsize: bytes of an element.
    """
    return 2 * parts * tokens * width * itemsize


def _ranges(side: int, cells: int) -> list[tuple[int, int]]:
    """First and last of ``cells`` node rows that each of ``side`` patch rows touches."""
    return [(y * cells // side, ((y + 1) * cells - 1) // side) for y in range(side)]


def _touches(side: int, cells: int) -> int:
    """Pairs of a patch row and a node row that touch."""
    return sum(last - first + 1 for first, last in _ranges(side, cells))


def _sharing(side: int, cells: int) -> int:
    """Pairs of patch rows that touch a common node row."""
    ranges = _ranges(side, cells)
    return sum(a <= d and c <= b for a, b in ranges for c, d in ranges)
