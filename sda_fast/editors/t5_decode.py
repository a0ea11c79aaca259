"""How a T5 editor writes an embedding: in one pass, a level at a time, or position after position.

What was written is kept as keys and values. Position after position they are of static size: every
pass is the same few launches, one CUDA graph that is replayed for each position.
"""

from collections import OrderedDict
from collections.abc import Callable
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from sda_fast.cuda_graphs import WARM_UPS, Addresses, GraphPool, Pool, Replay, kind_of
from sda_fast.editors.prediction import Prediction
from sda_fast.editors.t5_inputs import additive, spans

if TYPE_CHECKING:
    from sda_fast.editors.t5 import EmbeddingEditor

Given = tuple[Tensor, Tensor, Tensor]
"""source [B, N, C], text [B, T, F], mask bool [B, T]."""
LIMIT = 4
FEW = WARM_UPS + 1
"""Positions that are written without a graph: to capture one takes as many passes."""


def generate(editor: "EmbeddingEditor", given: Given, cache: bool, graph: bool) -> Prediction:
    """See ``EmbeddingEditor.generate``."""
    if graph and not cache:
        raise ValueError("cache must be True where graph is True, got False")
    if editor.mode == "autoregressive" and cache:
        return Prediction(editor.writers.write(editor, given, graph))
    passes = _at_once if editor.mode in ("prefilled", "delta") else _by_level
    if not cache and passes is _by_level:
        passes = _again
    if not graph:
        return passes(editor, given)

    def whole(*given: Tensor) -> Tensor:
        found = passes(editor, given)
        # a graph gives back one tensor
        gate = found.gate
        return found.tokens if gate is None else torch.cat([found.tokens, gate[..., None]], dim=2)

    found = editor.graphs.run(whole, given, [editor], about=editor.mode)
    return (
        Prediction(found[..., :-1], found[..., -1]) if editor.mode == "delta" else Prediction(found)
    )


def _at_once(editor: "EmbeddingEditor", given: Any) -> Prediction:
    return editor(*given)


def _by_level(editor: "EmbeddingEditor", given: Any) -> Prediction:
    """A pass over the positions of each level, which see all those above."""
    source, text, mask = given
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    memory, memory_mask = editor.memory(source, text), editor.memory_mask(mask)
    written = source[:, :0]
    for span in spans(editor.tree):
        inputs = editor.level_inputs(source, written, span)
        seen = inputs.new_zeros(1, 1, inputs.shape[1], span.stop)
        hidden = _pass(editor, inputs, seen, memory, memory_mask, cache)
        written = torch.cat([written, editor.read(hidden, source[:, span]).tokens], dim=1)
    return Prediction(written)


def _again(editor: "EmbeddingEditor", given: Any) -> Prediction:
    """Each pass goes over everything again, as in training; what is not yet written is zero."""
    source, text, mask = given
    written = torch.zeros_like(source)
    turns = spans(editor.tree)
    if editor.mode == "autoregressive":
        turns = tuple(slice(at, at + 1) for at in range(editor.tree.num_tokens))
    for span in turns:
        written[:, span] = editor(source, text, mask, written).tokens[:, span]
    return Prediction(written)


def _pass(
    editor: "EmbeddingEditor",
    inputs: Tensor,
    seen: Tensor,
    memory: Tensor,
    memory_mask: Tensor,
    cache: EncoderDecoderCache,
) -> Tensor:
    return editor.decoder(
        inputs_embeds=inputs,
        attention_mask=seen,
        encoder_hidden_states=memory,
        encoder_attention_mask=memory_mask,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


class Writer:
    """Writes embeddings of one shape position after position, in tensors that stay where they are.

    Args:
        editor: in mode autoregressive.
        given: what is written first; later ones have the same shapes.
    """

    def __init__(self, editor: "EmbeddingEditor", given: Given) -> None:
        n = editor.tree.num_tokens
        memory = editor.memory(*given[:2])
        self.memory, self.memory_mask = memory, editor.memory_mask(given[2])
        config = editor.decoder.config
        self.cache = EncoderDecoderCache(
            StaticCache(config=config, max_cache_len=n),
            StaticCache(config=config, max_cache_len=memory.shape[1]),
        )
        self.order = torch.arange(n, device=memory.device)
        self.place = torch.zeros(1, dtype=torch.int64, device=memory.device)
        self.inputs = memory.new_empty(len(memory), 1, memory.shape[2])
        self.written = torch.empty_like(given[0], dtype=memory.dtype)

    def begin(self, editor: "EmbeddingEditor", given: Given) -> None:
        """Set everything for another embedding, in place."""
        self.memory.copy_(editor.memory(*given[:2]))
        self.memory_mask.copy_(editor.memory_mask(given[2]))
        self.cache.reset()
        # the first pass makes the keys and values of the memory, the others read them
        self.cache.is_updated.clear()
        self.cache.is_updated.update(dict.fromkeys(range(len(editor.decoder.block)), False))
        self.place.zero_()
        self.inputs.copy_((editor.begin + editor.positions[0]).expand_as(self.inputs))

    def step(self, editor: "EmbeddingEditor") -> Tensor:
        """Write one position; returns all that is written."""
        seen = additive((self.order <= self.place)[None, None, None], self.inputs.dtype)
        memory = self.memory, self.memory_mask
        hidden = _pass(editor, self.inputs, seen, *memory, self.cache)
        found = editor.project(hidden)
        # autocast may have given another dtype
        self.written.index_copy_(1, self.place, found.to(self.written.dtype))
        self.place.add_(1)
        place = self.place.clamp_max(len(self.order) - 1)  # behind the last one is none
        self.inputs.copy_(editor.embed(found) + editor.positions.index_select(0, place))
        return self.written


class Writers:
    """Writers with their CUDA graphs, the least recently used given up; see ``GraphCache``.

    Calls from several threads take turns. A copy is an empty one.

    Args:
        make_pool: gives what captures on a device; None means a ``GraphPool``.
    """

    def __init__(self, make_pool: Callable[[torch.device], Pool] | None = None) -> None:
        self._make_pool = make_pool or GraphPool
        self._held: OrderedDict[Any, tuple[Writer, Replay, Addresses]] = OrderedDict()
        self._lock = RLock()

    def __reduce__(self) -> tuple:
        return Writers, ()

    def write(self, editor: "EmbeddingEditor", given: Given, graph: bool) -> Tensor:
        """[B, N, C], position after position.

        Args:
            editor: in mode autoregressive.
            given: what to write.
            graph: by a CUDA graph, replayed for all positions but the first.

        Raises:
            ValueError: a graph is wanted of weights that are not all on one CUDA device.
        """
        passes = editor.tree.num_tokens
        if graph and passes <= FEW:
            Addresses.of([editor]).device()  # refused all the same
        if not graph or passes <= FEW:
            writer = Writer(editor, given)
            writer.begin(editor, given)
            for _ in range(passes):
                writer.step(editor)
            return writer.written
        with self._lock:
            writer, replay = self._find(editor, given)
            replay.wait()
            writer.begin(editor, given)
            writer.step(editor)
            for _ in range(passes - 2):
                replay.repeat()
            return replay(())

    def clear(self) -> None:
        """Give all graphs and their memory up."""
        with self._lock:
            while self._held:
                self._drop_oldest()

    def _find(self, editor: "EmbeddingEditor", given: Given) -> tuple[Writer, Replay]:
        now = Addresses.of([editor])
        device = now.device()
        kind = kind_of(given)
        writer, replay, then = self._held.pop(kind, (None, None, None))
        if replay is not None and then != now:
            replay.release()
            writer = None
        if writer is None or replay is None:
            while len(self._held) >= LIMIT:
                self._drop_oldest()
            with torch.inference_mode(False), torch.no_grad():  # its tensors outlive the mode
                writer = Writer(editor, given)
                writer.begin(editor, given)
                writer.step(editor)  # makes what a capture may not make
                replay = self._make_pool(device).capture(lambda: writer.step(editor), ())
        self._held[kind] = writer, replay, now
        return writer, replay

    def _drop_oldest(self) -> None:
        _, (_, replay, _) = self._held.popitem(last=False)
        replay.release()
