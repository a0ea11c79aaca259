"""Edits that are written out: a JSON list of operations on nodes, checked whole, then applied."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sda_fast.editors.result import EditResult, spread_instructions, unpack_source
from sda_fast.embedding import SemanticEmbedding
from sda_fast.flux_inputs import check_finite
from sda_fast.hierarchy import Node
from sda_fast.mixing import is_finite

Others = Mapping[str, SemanticEmbedding]
Step = Callable[[SemanticEmbedding, Others], SemanticEmbedding]
"""One operation, checked: a picture and the others beside it to what becomes of the picture."""


class ScriptEditor:
    """An editor whose instruction is a script, the JSON text of a list of operations.

    They are applied in their order, each to what those before it left; one that does not fit
    refuses the script, and nothing is changed. A node stands for itself and its descendants; for
    ``set`` alone it is the node's own positions::

        [
          {"op": "copy", "from": "/0", "to": "/3"},
          {"op": "swap", "nodes": ["/1", "/2"]},
          {"op": "zero", "node": "/2/0"},
          {"op": "set", "node": "/1", "vectors": [[0.5, -1.0], [0.0, 2.0]]},
          {"op": "lerp", "other": "b", "weight": 0.5, "node": "/"},
          {"op": "transplant", "other": "b", "node": "/3", "blend": true}
        ]

    ``copy`` and ``swap`` take nodes of one level. ``set`` takes a vector of C numbers for each
    position. ``lerp`` and ``transplant`` are those of ``SemanticEmbedding``, which take ``pooled``
    along where they change the root; ``blend`` may be left out and is then false.

    Args:
        others: the embeddings that a script can name; each of one picture, or of as many as are
            edited and then taken picture by picture.

    Raises:
        ValueError: a name is no text, or what it stands for no embedding.
    """

    def __init__(self, others: Others | None = None) -> None:
        self.others = dict(others or {})
        for name, other in self.others.items():
            if not isinstance(name, str) or not isinstance(other, SemanticEmbedding):
                raise ValueError(
                    "others must be SemanticEmbeddings by name, "
                    f"got {type(other).__name__} for {name!r}"
                )

    def edit(
        self, emb: SemanticEmbedding | EditResult, instruction: str | Sequence[str]
    ) -> EditResult:
        """Carry out a script; see ``Editor.edit``.

        Args:
            emb: B pictures of any hierarchy, width and floating dtype.
            instruction: one script for all, or one for each.

        Returns:
            What came out; ``edited`` are the positions whose bits changed.

        Raises:
            ValueError: emb or an operation does not fit; the message counts operations from 0.
        """
        source, parent = unpack_source(emb, None, None)
        check_finite("emb", source.tokens)  # it may share memory that was written since
        texts = spread_instructions(instruction, len(source))
        scripts: dict[str, list[tuple[str, Step]]] = {}
        for row, text in enumerate(texts):
            name = "instruction" if isinstance(instruction, str) else f"instruction[{row}]"
            if text not in scripts:
                scripts[text] = _read_script(name, text, source, self.others)
        edited = [self._carry_out(scripts[text], source, row) for row, text in enumerate(texts)]
        embedding = SemanticEmbedding.cat(edited)
        return EditResult(embedding, source, texts, _changed(source, embedding), parent)

    def _carry_out(
        self, steps: list[tuple[str, Step]], source: SemanticEmbedding, row: int
    ) -> SemanticEmbedding:
        emb = source.select(row)
        # one that is of another batch is named by no step
        others = {name: other.select(row % len(other)) for name, other in self.others.items()}
        for place, step in steps:
            try:
                emb = step(emb, others)
            except ValueError as error:  # of numbers that only overflow once they are mixed
                raise ValueError(f"{place}: {error}") from error
        return emb


class _Operation:
    """One operation as it was written: hands out its values, each checked and named."""

    def __init__(
        self, written: Mapping[str, Any], source: SemanticEmbedding, others: Others
    ) -> None:
        self.written = written
        self.source = source
        self.others = others
        self.known: list[str] = []

    def value(self, key: str, *default: Any) -> Any:
        """What a key says, or the default."""
        self.known.append(key)
        if key not in self.written and not default:
            raise ValueError(f"the key {key!r} must be there, got {sorted(self.written)}")
        return self.written.get(key, *default)

    def node(self, key: str) -> Node:
        """The node of a path."""
        return self._find(key, self.value(key))

    def pair(self, key: str) -> tuple[Node, Node]:
        """The nodes of two paths."""
        paths = self.value(key)
        if not isinstance(paths, list) or len(paths) != 2:
            raise ValueError(f"{key} must be a list of two paths, got {paths!r}")
        first, second = (self._find(key, path) for path in paths)
        return first, second

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.value(key)
        if not is_finite(value):
            raise ValueError(f"{key} must be a finite number, got {value!r}")
        return float(value)

    def switch(self, key: str) -> bool:
        """True or false; false where it is left out."""
        value = self.value(key, False)
        if not isinstance(value, bool):
            raise ValueError(f"{key} must be true or false, got {value!r}")
        return value

    def other(self, key: str, with_pooled: bool) -> str:
        """The name of an embedding that can be mixed in."""
        name = self.value(key)
        if not isinstance(name, str) or name not in self.others:
            raise ValueError(f"{key} must be one of {sorted(self.others)}, got {name!r}")
        self.source.check_mixable(f"{key} {name!r}", self.others[name], with_pooled)
        return name

    def vectors(self, key: str, node: Node) -> Tensor:
        """[n, C] for the node's own positions, in the dtype of the source."""
        tokens, count = self.source.tokens, node.stop - node.start
        rows, channels = self.value(key), self.source.tokens.shape[2]
        if count == 0:
            raise ValueError(f"node must hold positions, got {node.path!r} without any")
        lists = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
        if not lists or [len(row) for row in rows] != [channels] * count:
            raise ValueError(
                f"{key} must be {count} lists of {channels} numbers, one for each position of "
                f"{node.path}, got {str(rows)[:80]}"
            )
        strange = [value for row in rows for value in row if not is_finite(value)]
        if strange:
            raise ValueError(f"{key} must be made of finite numbers, got {strange[0]!r}")
        numbers = [[float(value) for value in row] for row in rows]
        vectors = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(tokens.dtype)
        check_finite(key, vectors)  # the dtype may be too narrow for them
        return vectors.to(tokens.device)

    def end(self) -> None:
        """Refuse keys that nobody read."""
        unread = sorted(set(self.written) - set(self.known))
        if unread:
            raise ValueError(f"keys must be among {sorted(self.known)}, got {unread} too")

    def _find(self, key: str, path: Any) -> Node:
        try:
            return self.source.tree.node(path)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


def _read_copy(op: _Operation) -> Step:
    start, goal = op.node("from"), op.node("to")
    _check_level("from and to", start, goal)
    return lambda emb, others: _rearranged(emb, {goal: start})


def _read_swap(op: _Operation) -> Step:
    first, second = op.pair("nodes")
    _check_level("nodes", first, second)
    return lambda emb, others: _rearranged(emb, {first: second, second: first})


def _read_zero(op: _Operation) -> Step:
    inside = op.source.tree.subtree(op.node("node").path)[:, None]

    def zero(emb: SemanticEmbedding, others: Others) -> SemanticEmbedding:
        tokens = emb.tokens.masked_fill(inside.to(emb.tokens.device), 0)
        return SemanticEmbedding(tokens, emb.tree, emb.pooled)

    return zero


def _read_set(op: _Operation) -> Step:
    node = op.node("node")
    vectors = op.vectors("vectors", node)

    def put(emb: SemanticEmbedding, others: Others) -> SemanticEmbedding:
        tokens = emb.tokens.clone()
        tokens[:, node.start : node.stop] = vectors
        return SemanticEmbedding(tokens, emb.tree, emb.pooled)

    return put


def _read_lerp(op: _Operation) -> Step:
    path, weight = op.node("node").path, op.number("weight")
    name = op.other("other", with_pooled=path == "/")
    return lambda emb, others: emb.lerp(others[name], weight, [path])


def _read_transplant(op: _Operation) -> Step:
    path, blend = op.node("node").path, op.switch("blend")
    name = op.other("other", with_pooled=blend or path == "/")
    return lambda emb, others: emb.transplant(others[name], path, blend)


_READERS: dict[str, Callable[[_Operation], Step]] = {
    "copy": _read_copy,
    "lerp": _read_lerp,
    "set": _read_set,
    "swap": _read_swap,
    "transplant": _read_transplant,
    "zero": _read_zero,
}


def _read_script(
    name: str, text: str, source: SemanticEmbedding, others: Others
) -> list[tuple[str, Step]]:
    """Each operation of a script with its place in words; nothing is applied yet."""
    try:
        script = json.loads(text, parse_constant=_refuse, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:  # nested too deep, digits without end
        raise ValueError(f"{name} must be JSON ({error}), got {text[:80]!r}") from error
    if not isinstance(script, list) or not script:
        raise ValueError(f"{name} must be a list of operations, got {text[:80]!r}")
    steps = []
    for number, written in enumerate(script):
        place = f"{name}, operation {number}"
        kind = written.get("op") if isinstance(written, dict) else None
        if not isinstance(kind, str) or kind not in _READERS:
            raise ValueError(
                f"{place} must be an object whose op is one of {', '.join(_READERS)}, "
                f"got {str(written)[:80]}"
            )
        place += f" ({kind})"
        op = _Operation(written, source, others)
        try:
            op.value("op")
            step = _READERS[kind](op)
            op.end()
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        steps.append((place, step))
    return steps


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, unless it names a key twice: one of the two would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key is there twice among {[key for key, _ in pairs]}")
    return found


def _check_level(keys: str, first: Node, second: Node) -> None:
    if first.level != second.level:
        raise ValueError(f"{keys} must be of one level, got {first.path!r} and {second.path!r}")


def _rearranged(emb: SemanticEmbedding, moves: Mapping[Node, Node]) -> SemanticEmbedding:
    """Each node gets what another one of its level holds, descendants included."""
    place = torch.arange(emb.tree.num_tokens, device="cpu")
    take = place.clone()
    for goal, start in moves.items():
        take[emb.tree.subtree(goal.path)] = place[emb.tree.subtree(start.path)]
    tokens = emb.tokens[:, take.to(emb.tokens.device)]
    return SemanticEmbedding(tokens, emb.tree, emb.pooled)


def _changed(before: SemanticEmbedding, after: SemanticEmbedding) -> Tensor:
    """bool [B, N]: positions of other bits; -0.0 is not 0.0."""
    old, new = (e.tokens.detach().contiguous().view(torch.uint8) for e in (before, after))
    return (old != new).any(-1)
