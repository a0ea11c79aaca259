"""The semantic embedding of pictures: addressed by node, mixed, stored, handed to FLUX."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from sda_fast.coords import check_int
from sda_fast.decode_arguments import one_of
from sda_fast.embedding_file import read_tensors, write_tensors
from sda_fast.flux_inputs import append_text, check_finite, patch_grid, pooled_vector
from sda_fast.hierarchy import Hierarchy
from sda_fast.mixing import Mix, Weight, coverage, lerp, mean, node_weights, shares, slerp, spread

MODES = ("slerp", "lerp")


@dataclass(frozen=True, eq=False, repr=False)
class SemanticEmbedding:
    """Embedding vectors of a batch of pictures, one for each position of a tree.

    Immutable: every method returns a new embedding. What is only read shares memory.

    Attributes:
        tokens: [B, N, C] of a floating dtype, finite; B at least 1.
        tree: the hierarchy of the N positions.
        pooled: [B, P] or None: the vector that FLUX takes beside the txt stream; it belongs to the
            whole picture.

    Raises:
        ValueError: shapes that disagree, another dtype, a NaN or an infinity.
    """

    tokens: Tensor
    tree: Hierarchy
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.tree, Hierarchy):
            raise ValueError(f"tree must be a Hierarchy, got {type(self.tree).__name__}")
        if not isinstance(self.tokens, Tensor):
            raise ValueError(f"tokens must be a tensor, got {type(self.tokens).__name__}")
        shape = list(self.tokens.shape)
        if len(shape) != 3 or shape[1] != self.tree.num_tokens or 0 in shape:
            raise ValueError(
                f"tokens must be [B, {self.tree.num_tokens}, C] for the hierarchy "
                f"{self.tree.tokens_per_node}, got {shape}"
            )
        check_finite("tokens", self.tokens)
        if self.pooled is not None:
            if not isinstance(self.pooled, Tensor):
                raise ValueError(f"pooled must be a tensor, got {type(self.pooled).__name__}")
            if self.pooled.ndim != 2 or len(self.pooled) != shape[0] or not self.pooled.numel():
                raise ValueError(f"pooled must be [{shape[0]}, P], got {list(self.pooled.shape)}")
            check_finite("pooled", self.pooled)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        pooled = None if self.pooled is None else list(self.pooled.shape)
        return (
            f"SemanticEmbedding({list(self.tokens.shape)} {self.tokens.dtype} on "
            f"{self.tokens.device}, tokens_per_node={self.tree.tokens_per_node}, pooled={pooled})"
        )

    def __getitem__(self, path: str) -> Tensor:
        """[B, n, C] view of the positions of one node, without its descendants."""
        return self.tokens[:, self.tree.span(path)]

    def select(self, rows: int | slice) -> "SemanticEmbedding":
        """Some pictures of the batch; an integer gives a batch of one.

        Raises:
            IndexError: the batch has no such row.
            ValueError: the slice selects nothing.
        """
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"rows must be below the batch of {len(self)}, got {rows}")
            rows = slice(rows % len(self), rows % len(self) + 1)
        pooled = None if self.pooled is None else self.pooled[rows]
        return SemanticEmbedding(self.tokens[rows], self.tree, pooled)

    @classmethod
    def cat(cls, embeddings: Iterable["SemanticEmbedding"]) -> "SemanticEmbedding":
        """One batch out of several, in their order.

        Raises:
            ValueError: there are none, or their trees, widths, dtypes, devices or pooled differ.
        """
        embeddings = tuple(embeddings)
        first = _check_alike(embeddings)
        pooled = [e.pooled for e in embeddings if e.pooled is not None]
        tokens = torch.cat([e.tokens for e in embeddings])
        return cls(tokens, first.tree, torch.cat(pooled) if pooled else None)

    def lerp(
        self, other: "SemanticEmbedding", weight: Weight, nodes: Iterable[str] | None = None
    ) -> "SemanticEmbedding":
        """``(1 - weight) * self + weight * other``, position by position.

        Where the weight is 0 or 1 the positions come out bit for bit; outside [0, 1] it
        extrapolates. ``pooled`` is mixed with the weight of the root.

        Args:
            other: an embedding of the same tree, width, dtype and device; batch B or 1.
            weight: a number; or a number for each level; or ``{path: number}``, which holds for the
                node and its descendants, the deepest path deciding, and is 0 elsewhere.
            nodes: paths of the nodes to mix, with their descendants; None for all.

        Raises:
            ValueError: other, weight or nodes do not fit.
        """
        return self._mix(other, node_weights(self.tree, weight, nodes), lerp)

    def slerp(
        self, other: "SemanticEmbedding", weight: Weight, nodes: Iterable[str] | None = None
    ) -> "SemanticEmbedding":
        """As ``lerp``, but each vector turns along the great circle and its length goes linearly.

        The direction is Shoemake's slerp (Animating Rotation with Quaternion Curves, 1985) of the
        two unit vectors. Where they are parallel, opposite or zero it is undefined: lerp instead.
        """
        return self._mix(other, node_weights(self.tree, weight, nodes), slerp)

    def interpolate(
        self,
        other: "SemanticEmbedding",
        steps: int = 5,
        mode: str = "slerp",
        nodes: Iterable[str] | None = None,
    ) -> "SemanticEmbedding":
        """The way from one picture to another as a batch, both ends included.

        Args:
            other: as for ``lerp``; both must be one picture.
            steps: B of the answer, at least 2.
            mode: "slerp" or "lerp".
            nodes: as for ``lerp``.

        Raises:
            ValueError: an argument does not fit.
        """
        check_int("steps", steps, 2)
        one_of("mode", mode, MODES)
        if len(self) != 1:
            raise ValueError(f"self must be one picture, got {len(self)}")
        mix = lerp if mode == "lerp" else slerp
        whole = node_weights(self.tree, 1.0, nodes)
        return SemanticEmbedding.cat(
            self._mix(other, whole * (i / (steps - 1)), mix) for i in range(steps)
        )

    def transplant(
        self, other: "SemanticEmbedding", path: str, blend: bool = False
    ) -> "SemanticEmbedding":
        """A node and its descendants from other, the rest from self, bit for bit.

        ``/`` takes everything, ``pooled`` too.

        Args:
            other: as for ``lerp``.
            path: of the node.
            blend: whether the nodes above it, which speak of a larger place, go over to other's by
                the share of their area that the node covers (a quarter a level), and ``pooled`` as
                the root does. The place comes out nearer to other's, what is around it goes along.

        Raises:
            ValueError: other does not fit, or the tree has no such node.
        """
        if blend:
            return self._mix(other, coverage(self.tree, [path]), lerp)
        return self.lerp(other, {path: 1.0})

    @classmethod
    def mix(
        cls,
        embeddings: Iterable["SemanticEmbedding"],
        weights: Sequence[float],
        nodes: Iterable[str] | None = None,
    ) -> "SemanticEmbedding":
        """The weighted mean of several embeddings in some nodes, the first one elsewhere.

        Nodes above these go over to the mean by the share of their area that these cover, as in
        ``transplant`` with blend, and ``pooled`` as the root does. The rest is the first's, bit for
        bit, and so are the nodes another's that has all the weight.

        Args:
            embeddings: of one tree, width, dtype, device and kind of pooled; batches of B, that of
                the first, or 1.
            weights: one for each, at least 0; only their ratios count.
            nodes: paths, mixed with their descendants; None for all.

        Raises:
            ValueError: an embedding does not fit the first, a weight is negative or not finite or
                all are 0, or a node is not there.
        """
        embeddings = tuple(embeddings)
        first = _check_alike(embeddings)
        parts = shares(weights, len(embeddings))
        covered = coverage(first.tree, ("/",) if nodes is None else nodes)
        for number, other in enumerate(embeddings):
            first.check_mixable(f"embeddings[{number}]", other)
        vectors = [e.pooled for e in embeddings if e.pooled is not None]
        pooled = mean(vectors, parts) if vectors else None
        tokens = mean([e.tokens for e in embeddings], parts)
        return first._mix(cls(tokens, first.tree, pooled), covered, lerp)

    def truncate(self, levels: int) -> "SemanticEmbedding":
        """The first levels of the tree alone.

        Raises:
            ValueError: levels is not between 1 and the tree's, or they hold no position.
        """
        known = isinstance(levels, int) and not isinstance(levels, bool)
        if not known or not 1 <= levels <= self.tree.num_levels:
            raise ValueError(f"levels must be 1 to {self.tree.num_levels}, got {levels!r}")
        tree = Hierarchy(self.tree.tokens_per_node[:levels])
        return SemanticEmbedding(self.tokens[:, : tree.num_tokens], tree, self.pooled)

    def to(self, *args: Any, **kwargs: Any) -> "SemanticEmbedding":
        """The same on another device or in another floating dtype, as ``Tensor.to``."""
        pooled = None if self.pooled is None else self.pooled.to(*args, **kwargs)
        return SemanticEmbedding(self.tokens.to(*args, **kwargs), self.tree, pooled)

    def flux_inputs(
        self,
        height: int,
        width: int,
        rule: str = "overlap",
        *,
        source: tuple[int, int] | None = None,
        text: Tensor | None = None,
        pooled: Tensor | None = None,
        patch: int = 16,
        **rule_options: int | None,
    ) -> dict[str, Any]:
        """Keyword arguments for any stock diffusers Flux pipeline, which then decodes this.

        Cast the embedding to the transformer's dtype first (``to``).

        Args:
            height: of the picture to make, in pixels; a multiple of patch.
            width: likewise.
            rule: mask rule, one of ``sda_fast.hierarchy.RULES``.
            source: (height, width) in pixels of the picture that a Kontext pipeline edits. The
                answer then also holds ``max_area`` and ``_auto_resize``, which keep Kontext from
                choosing other sizes.
            text: [1 or B, T, C] embeddings of an ordinary prompt, put after the positions.
            pooled: [1 or B, P] in place of the embedding's own.
            patch: pixels along one image token: 16 for FLUX.
            rule_options: ``isolate_level`` of ``Hierarchy.attention_mask``.

        Returns:
            prompt_embeds [B, N + T, C], pooled_prompt_embeds [B, P], height, width, and
            joint_attention_kwargs with attention_mask, bool [1, 1, S, S] on the tokens' device.

        Raises:
            ValueError: a size, the rule, text or pooled does not fit; the tokens have become NaN
                or infinite.
        """
        check_finite("tokens", self.tokens)  # they may share memory that was written since
        h, w = patch_grid(height, width, patch)
        source_grid = None
        if source is not None:
            if not isinstance(source, (tuple, list)) or len(source) != 2:
                raise ValueError(f"source must be (height, width) in pixels, got {source!r}")
            source_grid = patch_grid(*source, patch, name="source ")
        prompt = append_text(self.tokens, text)
        vector = pooled_vector(self.tokens, self.pooled if pooled is None else pooled)
        mask = self.tree.attention_mask(
            h, w, rule, prompt.shape[1] - self.tree.num_tokens, source=source_grid, **rule_options
        )
        inputs: dict[str, Any] = {
            "prompt_embeds": prompt,
            "pooled_prompt_embeds": vector,
            "height": height,
            "width": width,
            "joint_attention_kwargs": {"attention_mask": mask[None, None].to(prompt.device)},
        }
        if source is not None:
            inputs |= {"max_area": height * width, "_auto_resize": False}
        return inputs

    def save(self, path: str | PathLike[str]) -> None:
        """Write one safetensors file that carries the tree; equal embeddings give equal bytes.

        The file appears whole or not at all.

        Raises:
            ValueError: the name does not end in ``.safetensors``, or the tensors were changed in
                place and hold a NaN or an infinity.
            FileNotFoundError: the folder is not there.
        """
        tensors = {"tokens": self.tokens}
        if self.pooled is not None:
            tensors["pooled"] = self.pooled
        write_tensors(path, tensors, self.tree)

    @classmethod
    def load(cls, path: str | PathLike[str], tree: Hierarchy | None = None) -> "SemanticEmbedding":
        """Read what ``save`` wrote, onto the CPU.

        Args:
            path: the file.
            tree: the hierarchy that the file must have; None takes any.

        Raises:
            FileNotFoundError: it is not there.
            ValueError: it is truncated, foreign, or of another hierarchy or shape.
        """
        if tree is not None and not isinstance(tree, Hierarchy):
            raise ValueError(f"tree must be a Hierarchy, got {type(tree).__name__}")
        tensors, found = read_tensors(path)
        if tree is not None and tree != found:
            raise ValueError(
                f"{path} must be of the hierarchy {tree.tokens_per_node}, "
                f"got {found.tokens_per_node}"
            )
        if not {"tokens"} <= set(tensors) <= {"tokens", "pooled"}:
            raise ValueError(f"{path} must hold tokens and perhaps pooled, got {sorted(tensors)}")
        try:
            return cls(tensors["tokens"], found, tensors.get("pooled"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def check_mixable(
        self, name: str, other: "SemanticEmbedding", with_pooled: bool = False
    ) -> None:
        """Refuse what cannot be mixed into this embedding.

        Args:
            name: of other, for the message.
            other: what was given.
            with_pooled: whether the root is mixed, and pooled with it.

        Raises:
            ValueError: other is no embedding, of another tree, width, dtype, device or kind of
                pooled, or its batch is neither 1 nor that of this one.
        """
        _check_twin(name, self, other)
        if len(other) not in (1, len(self)):
            legal = "1" if len(self) == 1 else f"1 or {len(self)}"
            raise ValueError(f"{name} must have a batch of {legal}, got {len(other)}")
        if with_pooled and _kind(self.pooled) != _kind(other.pooled):
            raise ValueError(
                f"{name} must have pooled {_kind(self.pooled)} where the root is mixed, "
                f"got {_kind(other.pooled)}"
            )

    def _mix(self, other: "SemanticEmbedding", weight_of: Tensor, mix: Mix) -> "SemanticEmbedding":
        """Mix other in by [num_nodes] weights; pooled goes with the root."""
        root = bool(weight_of[0] != 0)
        self.check_mixable("other", other, with_pooled=root)
        tokens = mix(self.tokens, other.tokens, spread(self.tree, weight_of))
        pooled = self.pooled
        if pooled is not None and other.pooled is not None and root:
            pooled = mix(pooled, other.pooled, weight_of[:1])
        return SemanticEmbedding(tokens, self.tree, pooled)


def _check_alike(embeddings: Sequence[SemanticEmbedding]) -> SemanticEmbedding:
    """The first of some embeddings that are alike but for their batches."""
    if not embeddings:
        raise ValueError("embeddings must hold at least one embedding, got none")
    first = embeddings[0]
    for number, other in enumerate(embeddings):
        _check_twin(f"embeddings[{number}]", first, other)
        if _kind(first.pooled) != _kind(other.pooled):
            raise ValueError(
                f"embeddings[{number}] must have pooled {_kind(first.pooled)} like the first, "
                f"got {_kind(other.pooled)}"
            )
    return first


def _check_twin(name: str, first: SemanticEmbedding, other: SemanticEmbedding) -> None:
    if not isinstance(other, SemanticEmbedding):
        raise ValueError(f"{name} must be a SemanticEmbedding, got {type(other).__name__}")
    mine, its = (
        (e.tree.tokens_per_node, e.tokens.shape[2], e.tokens.dtype, e.tokens.device)
        for e in (first, other)
    )
    if mine != its:
        raise ValueError(
            f"{name} must agree in hierarchy, channels, dtype and device: {mine}, got {its}"
        )


def _kind(pooled: Tensor | None) -> tuple[int, torch.dtype, torch.device] | None:
    return None if pooled is None else (pooled.shape[1], pooled.dtype, pooled.device)
