"""Mixing embeddings: weights for each node of a tree, linear and spherical interpolation, means."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from sda_fast.hierarchy import Hierarchy

Weight = float | Sequence[float] | Mapping[str, float]
Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


def node_weights(tree: Hierarchy, weight: Weight, nodes: Iterable[str] | None) -> Tensor:
    """The weight of each node.

    Args:
        tree: the hierarchy.
        weight: a number; or a number for each level; or ``{path: number}``, which holds for the
            node and its descendants, the deepest path deciding, and is 0 elsewhere.
        nodes: paths of the nodes that keep their weight, with their descendants; the others get 0.
            None for all.

    Returns:
        [num_nodes] float64 on the CPU, in the order of ``tree.nodes()``.

    Raises:
        ValueError: a path is not of the tree, or a weight is no finite number.
    """
    nodes = None if nodes is None else _paths(tree, nodes)
    if isinstance(weight, Mapping):
        by_path = dict(weight)
    elif isinstance(weight, Sequence) and not isinstance(weight, str):
        if len(weight) != tree.num_levels:
            raise ValueError(
                f"weight must have a number for each of {tree.num_levels} levels, got {weight!r}"
            )
        by_path = {node.path: weight[node.level] for node in tree.nodes()}
    else:
        by_path = {"/": weight}
    for path, value in by_path.items():
        tree.node(path)
        if not is_finite(value):
            raise ValueError(f"weight must be made of finite numbers, got {value!r} for {path!r}")

    weights = []
    for node in tree.nodes():
        lineage = _lineage(node.path)
        inside = nodes is None or any(path in nodes for path in lineage)
        deciding = next((path for path in lineage if path in by_path), None)
        weights.append(by_path[deciding] if inside and deciding is not None else 0.0)
    return torch.tensor(weights, dtype=torch.float64, device="cpu")


def coverage(tree: Hierarchy, nodes: Iterable[str]) -> Tensor:
    """The share of each node's area that some nodes cover together.

    It is 1 for these and for what is below them, and 0 beside them; a node above them has what they
    make up of it: a quarter for each level that one of them lies below.

    Args:
        tree: the hierarchy.
        nodes: paths, at least one; a place that two of them cover counts once.

    Returns:
        [num_nodes] float64 on the CPU, exact, in the order of ``tree.nodes()``.

    Raises:
        ValueError: a path is not of the tree, or there is none.
    """
    nodes = _paths(tree, nodes)
    if not nodes:
        raise ValueError("nodes must name at least one node, got none")
    cells = 2 ** (tree.num_levels - 1)
    covered = torch.zeros(1, cells, cells, dtype=torch.float64, device="cpu")
    for path in nodes:
        y0, x0, y1, x1 = (int(edge * cells) for edge in tree.box(path))
        covered[:, y0:y1, x0:x1] = 1
    levels = [avg_pool2d(covered, cells >> level) for level in range(tree.num_levels)]
    return torch.cat([share.flatten() for share in levels])


def shares(weights: Sequence[float], count: int) -> list[float]:
    """Weights of a mean, divided by their sum.

    Raises:
        ValueError: they are not ``count`` finite numbers of at least 0, or all are 0.
    """
    given = isinstance(weights, Sequence) and not isinstance(weights, str)
    if not given or len(weights) != count:
        raise ValueError(f"weights must be a number for each of {count}, got {weights!r}")
    if not all(is_finite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(
            f"weights must be finite, none below 0 and one above it, got {list(weights)}"
        )
    most = max(weights)  # first, so that the sum cannot overflow
    parts = [weight / most for weight in weights]
    total = sum(parts)
    return [part / total for part in parts]


def mean(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum(share * tensor)`` in float32 or wider; one with the share 0 is not read.

    Args:
        tensors: [..., C] each, floating, broadcastable.
        shares: as many numbers, of the sum 1; a single 1 gives its tensor back bit for bit.

    Returns:
        [..., C] in the dtype of the first.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    first, *rest = (t.to(wide) * s for t, s in zip(tensors, shares, strict=True) if s)
    return sum(rest, first).to(tensors[0].dtype)


def spread(tree: Hierarchy, weight_of: Tensor) -> Tensor:
    """[num_nodes] in the order of ``tree.nodes()`` -> [N, 1], the same for a node's positions."""
    sizes = [node.stop - node.start for node in tree.nodes()]
    return weight_of.repeat_interleave(torch.tensor(sizes, device="cpu"))[:, None]


def is_finite(value: object) -> bool:
    """Whether it is a number, no bool, and neither NaN nor beyond what a float can say."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # of integers without end
        return False


def lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """``(1 - weight) * a + weight * b`` in float32 or wider; bit for bit a at 0 and b at 1.

    Args:
        a: [..., C] floating.
        b: the same, or broadcastable.
        weight: broadcastable to [..., 1], any dtype and device.

    Returns:
        [..., C] in the dtype of a.
    """
    return _exact_at_ends(a, b, weight, _lerp)


def slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Direction along the great circle, length linearly; arguments and ends as for ``lerp``.

    Shoemake's slerp (Animating Rotation with Quaternion Curves, 1985) of the unit vectors. Where
    they are parallel, opposite or zero it is undefined, and the answer is that of ``lerp``.
    """
    return _exact_at_ends(a, b, weight, _slerp)


def _paths(tree: Hierarchy, nodes: Iterable[str]) -> tuple[str, ...]:
    if isinstance(nodes, str):
        raise ValueError(f"nodes must be a sequence of paths, got the text {nodes!r}")
    nodes = tuple(nodes)  # a generator could be read only once
    for path in nodes:
        tree.node(path)
    return nodes


def _lineage(path: str) -> list[str]:
    """The path and its ancestors, deepest first."""
    children = path[1:].split("/") if path != "/" else []
    return ["/" + "/".join(children[:depth]) for depth in range(len(children), -1, -1)]


def _exact_at_ends(a: Tensor, b: Tensor, weight: Tensor, mix: Mix) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    weight = weight.to(device=a.device, dtype=wide)
    mixed = mix(a.to(wide), b.to(wide), weight).to(a.dtype)
    return torch.where(weight == 0, a, torch.where(weight == 1, b, mixed))


def _lerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return (1 - weight) * a + weight * b


def _slerp(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    len_a, len_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(a.dtype).tiny
    u, v = a / len_a.clamp_min(tiny), b / len_b.clamp_min(tiny)
    # right for small angles too, where the arc cosine of a dot product is not
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sine = torch.sin(angle)
    undefined = (sine.abs() < 1e-6) | (len_a == 0) | (len_b == 0)
    sine = torch.where(undefined, torch.ones_like(sine), sine)
    turned = (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / sine
    return torch.where(undefined, _lerp(a, b, weight), turned * _lerp(len_a, len_b, weight))
