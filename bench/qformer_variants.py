"""Who takes part in ``bench qformer``: our operator and adapter, and others' ways to the same.

Competitors turn q and k first: by the reference rotation, or by kept tables of cosines and sines,
which suits a compiler better.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from bench.check import Places
from bench.plain_adapter import Turns, plain_adapter, reference_turns, table_turns, turned_sdpa
from bench.qformer_cases import QFormerCase
from bench.suite import Work
from bench.variants import FLASH_MODULES, prepare_flash_attn, prepare_sdpa
from sda_fast import ops

Run = Callable[..., Tensor]
"""q, k, v -> out; for an adapter features -> embedding."""
MakeTurns = Callable[[Places, int], Turns]


@dataclass(frozen=True, slots=True)
class QFormerWork(Work):
    """Work, with what both passes of a case need besides.

    Attributes:
        places: of positions and patches.
        adapter: of an adapter's case.
    """

    places: Places = field(kw_only=True)
    adapter: Any = None


@dataclass(frozen=True, slots=True)
class QFormerVariant:
    """One way to compute a case.

    Attributes:
        name: in records and options.
        label: in tables.
        kind: of the cases it is for.
        prepare: sets it up for a case. Raises Unavailable.
        rotated: it turns q and k; the others do not, a bound on the speed.
        gpu: it needs one.
        runs: timed as a graph that the suite captures, "launched" anew at every call, or with
            graphs of its "own".
    """

    name: str
    label: str
    kind: Literal["op", "adapter"]
    prepare: Callable[[QFormerCase, QFormerWork], Run]
    rotated: bool = True
    gpu: bool = True
    runs: Literal["captured", "launched", "own"] = "captured"


def _ours(_case: QFormerCase, work: QFormerWork) -> Run:
    return lambda q, k, v: ops.rope3d_attention(q, k, v, *work.places)


def _turned(make_turns: MakeTurns, mode: str | None = None) -> Any:
    def prepare(case: QFormerCase, work: QFormerWork) -> Run:
        turns = make_turns(work.places, case.head_dim)
        attend = lambda q, k, v: turned_sdpa(q, k, v, turns)
        return attend if mode is None else _compiled(attend, mode)

    return prepare


def _compiled(function: Run, mode: str | None = None) -> Run:
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


def _after_turn(attend: Run, case: QFormerCase, work: QFormerWork) -> Run:
    """Attention after a compiled turn of q and k, one launch; no template of it takes that in."""
    turn_q, turn_k = table_turns(work.places, case.head_dim)
    turn: Any = torch.compile(lambda q, k: (turn_q(q), turn_k(k)), dynamic=False, fullgraph=True)
    return lambda q, k, v: attend(*turn(q, k), v)


def _flex(case: QFormerCase, work: QFormerWork) -> Run:
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    return _after_turn(attend, case, work)


def _unrotated(prepare: Callable[..., Any]) -> Any:
    return lambda case, work: prepare(case, work.inputs[0]).attend


def _flash_attn(module: str) -> Any:
    """flash-attn after a compiled turn of q and k."""

    def prepare(case: QFormerCase, work: QFormerWork) -> Run:
        attend: Any = _unrotated(prepare_flash_attn(module))(case, work)
        return _after_turn(attend, case, work)

    return prepare


def _our_adapter(case: QFormerCase, work: QFormerWork) -> Run:
    return lambda features: work.adapter(features, (case.side, case.side))


def _checkpointed_adapter(case: QFormerCase, work: QFormerWork) -> Run:
    # modules of its own, to switch checkpoints on in, and the weights that all variants share
    twin = copy.deepcopy(work.adapter, {id(p): p for p in work.adapter.parameters()})
    twin.enable_gradient_checkpointing(_checkpoint)
    return lambda features: twin(features, (case.side, case.side))


def _checkpoint(layer: nn.Module, *args: Tensor | None) -> Any:
    # a layer draws nothing: no random state to keep, which not every torch can do in a CUDA graph
    return checkpoint(layer, *args, use_reentrant=False, preserve_rng_state=False)


def _plain_adapter(make_turns: MakeTurns, compiled: bool = False) -> Any:
    def prepare(case: QFormerCase, work: QFormerWork) -> Run:
        turns = make_turns(work.places, case.head_dim)
        run = lambda features: plain_adapter(work.adapter, features, turns)
        if not compiled:
            return run
        fast = _compiled(run, "reduce-overhead")

        def step(features: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return fast(features)

        return step

    return prepare


def _every_variant() -> tuple[QFormerVariant, ...]:
    # without graphs of its own: the suite captures it, as all others
    tuned = "max-autotune-no-cudagraphs"
    op = lambda name, label, prepare, **rest: QFormerVariant(name, label, "op", prepare, **rest)
    free = {"rotated": False}
    flash = [
        op(f"flash-attn-{n}{end}", f"flash-attn {n}{label}", make(module), **options)
        for n, module in FLASH_MODULES.items()
        for end, label, make, options in (
            ("", ", compiled RoPE", _flash_attn, {}),
            ("-unrotated", " without RoPE", lambda m: _unrotated(prepare_flash_attn(m)), free),
        )
    ]
    backends = {"": None, "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    bounds = [
        op(
            f"sdpa-{key}".rstrip("-"), f"SDPA {key or 'as it comes'} without RoPE",
            _unrotated(prepare_sdpa(False, backend)), gpu=bool(key), **free,
        )
        for key, backend in backends.items()
    ]  # fmt: skip
    adapter = lambda name, label, prepare, **rest: QFormerVariant(
        f"{name}-adapter", label, "adapter", prepare, **rest
    )
    return (
        op("ours", "**ours**", _ours, gpu=False),
        op("eager", "eager RoPE + SDPA", _turned(reference_turns), gpu=False),
        op("eager-tables", "eager RoPE by tables + SDPA", _turned(table_turns), gpu=False),
        op("compiled", "compiled RoPE + SDPA", _turned(reference_turns, tuned)),
        op("compiled-tables", "compiled RoPE by tables + SDPA", _turned(table_turns, tuned)),
        op("flex", "compiled RoPE + FlexAttention", _flex),
        *bounds,
        *flash,
        adapter("ours", "**ours, in a CUDA graph**", _our_adapter, gpu=False),
        adapter("ours-launched", "ours, launched", _our_adapter, gpu=False, runs="launched"),
        adapter("ours-checkpointed", "**ours**, checkpointed", _checkpointed_adapter, gpu=False),
        adapter(
            "eager", "eager reference", _plain_adapter(reference_turns), gpu=False, runs="launched"
        ),
        adapter(
            "compiled", "torch.compile with CUDA graphs", _plain_adapter(table_turns, True),
            runs="own",
        ),
    )  # fmt: skip


VARIANTS = {variant.name: variant for variant in _every_variant()}
"""All, by name, in the order of the tables."""
