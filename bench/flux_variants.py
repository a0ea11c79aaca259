"""Who takes part in ``bench flux``: FastFlux, and diffusers' transformer as fast as it is known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.flux_cases import GUIDANCE, STEPS, FluxCase
from bench.flux_check import CHECKED_STEPS, Results, euler
from bench.flux_levers import LEVERS, plain_norm_rope, pulled
from bench.flux_model import Frozen, compile_blocks, rank_backends, run_stock, use_backend
from bench.suite import Unavailable, Work
from sda_fast.fast_flux import FastFlux
from sda_fast.ops import norm_rope

T5_TEXT, REDUX_TEXT = 512, 1241
"""Text tokens of FLUX.1-dev, and with the 729 of FLUX.1-Redux beside them."""
LAUNCHES = 8
"""Of a kernel of microseconds in one step, on inputs that lie apart: more than L2 holds."""


@dataclass(frozen=True, slots=True)
class FluxWork(Work):
    """Work, with what all variants of a case need.

    Attributes:
        case: which.
        frozen: the transformer.
        mask: of the positions and image tokens, [1, 1, S, S] bool.
        ranks: times of unmasked attention by backend, and why others have none, by text tokens.
        layers: inputs of LAUNCHES kernels, for a case of one.
        inputs_by_txt: see given.
    """

    case: FluxCase = field(kw_only=True)
    frozen: Frozen = field(kw_only=True)
    mask: Tensor = field(kw_only=True)
    ranks: dict[int, tuple[dict[str, float], dict[str, str]]] = field(default_factory=dict)
    layers: list[dict[str, Any]] = field(default_factory=list)
    inputs_by_txt: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def given(self, num_txt: int | None = None) -> dict[str, Tensor]:
        """Inputs of the transformer's forward, for all variants the same tensors.

        FastFlux knows a layout again by its ids; to read new ones it waits for the device.
        """
        number = num_txt or self.case.num_txt
        if number not in self.inputs_by_txt:
            self.inputs_by_txt[number] = self.case.inputs(self.mask.device, number)
        return self.inputs_by_txt[number]

    def rank(self, num_txt: int) -> tuple[dict[str, float], dict[str, str]]:
        """See rank_backends; measured once for each number of text tokens."""
        if num_txt not in self.ranks:
            config, case = self.frozen.transformer.config, self.case
            heads = config.num_attention_heads, config.attention_head_dim
            shape = case.batch, num_txt + case.num_img, *heads
            self.ranks[num_txt] = rank_backends(shape, self.frozen.transformer.proj_out.weight)
        return self.ranks[num_txt]


@dataclass(frozen=True, slots=True)
class Ready:
    """A variant set up for a case.

    Attributes:
        run: what is timed.
        notes: fields of its record that come up on the way.
    """

    run: Callable[[], Results]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FluxVariant:
    """One way to do what a case is about.

    Attributes:
        name: in records and options.
        label: in tables.
        kinds: of the cases it is for.
        prepare: sets it up. Raises Unavailable.
        masked: it obeys the hierarchy; the others attend to everything.
        num_txt: text tokens, None for the positions.
        gpu: it needs one.
        captured: timed as a CUDA graph, else launched anew.
        compiled: that takes seconds.
        lossy: held to a looser bound.
        everywhere: it takes part in cases that are no goals, too.
        levers: those that are pulled, of FastFlux taken apart.
    """

    name: str
    label: str
    kinds: tuple[str, ...]
    prepare: Callable[[FluxWork], Ready]
    masked: bool = True
    num_txt: int | None = None
    gpu: bool = False
    captured: bool = False
    compiled: bool = False
    lossy: bool = False
    everywhere: bool = True
    levers: tuple[str, ...] | None = None


def _ours(work: FluxWork) -> Ready:
    given: Any = work.given()
    return Ready(lambda: work.frozen.fast(**given, return_dict=False))


def _ahead(fast: FastFlux, work: FluxWork) -> Callable[[], Results]:
    given = work.given()
    rows = fast.modulation(given["timestep"], given["pooled_projections"], given["guidance"])
    latents, positions = given["hidden_states"], given["encoder_hidden_states"]
    ids = given["img_ids"], given["txt_ids"]
    return lambda: (fast.denoise(latents, positions, rows, fast.layout_of_ids(*ids)),)


def _our_ahead(work: FluxWork) -> Ready:
    return Ready(_ahead(work.frozen.fast, work))


def _our_fp8(work: FluxWork) -> Ready:
    return Ready(_ahead(work.frozen.fp8(), work))


def _our_levers(levers: tuple[str, ...]) -> Callable[[FluxWork], Ready]:
    def prepare(work: FluxWork) -> Ready:
        plain = (_our_ahead if "ahead" in levers else _ours)(work)

        def run() -> Results:
            with pulled(levers):
                return plain.run()

        return Ready(run)

    return prepare


def _our_loop(work: FluxWork) -> Ready:
    """All steps of a picture, modulation and graphs included, as a pipeline would run them."""
    frozen, batch = work.frozen, work.case.batch
    on_gpu = work.mask.device.type == "cuda"
    fast = FastFlux(frozen.transformer, frozen.tree, graph=on_gpu)
    given, times = work.given(), [1 - i / STEPS for i in range(STEPS)]
    every = torch.tensor(times, device=work.mask.device).repeat_interleave(batch)
    pooled = given["pooled_projections"].repeat(STEPS, 1)
    guidance = torch.full_like(every, GUIDANCE)
    positions, ids = given["encoder_hidden_states"], (given["img_ids"], given["txt_ids"])

    def run() -> Results:
        rows = fast.modulation(every, pooled, guidance).unflatten(0, (STEPS, batch))
        step = lambda i, x: fast.denoise(x, positions, rows[i], fast.layout_of_ids(*ids))
        return euler(step, given["hidden_states"], STEPS, CHECKED_STEPS)

    return Ready(run)


def _stock(
    masked: bool = True, compiled: bool = False, fused: bool = False, num_txt: int | None = None
) -> Callable[[FluxWork], Ready]:
    """diffusers' forward, on a twin of the transformer that it may change."""

    def run_by(work: FluxWork, backend: str) -> Callable[[], Results]:
        twin, given = work.frozen.twin(), work.given(num_txt)
        use_backend(twin, backend)
        if fused:
            twin.fuse_qkv_projections()
        if compiled:
            compile_blocks(twin)
        mask = work.mask if masked else None
        return lambda: (run_stock(twin, given, mask),)

    def prepare(work: FluxWork) -> Ready:
        if masked:
            return Ready(run_by(work, "native"), {"backend": "native"})
        times, refused = work.rank(num_txt or work.case.num_txt)
        told = dict(refused)
        for backend in times:  # the fastest that the whole step takes
            run = run_by(work, backend)
            try:
                with torch.no_grad():
                    run()
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # any compiler's; the next backend may do
                told[backend] = f"{type(error).__name__}: {error}"[:200]
                continue
            return Ready(run, {"backend": backend, "backends_ms": times, "backends_refused": told})
        raise Unavailable(f"no backend does it: {told}")

    return prepare


def _attached(work: FluxWork) -> Ready:
    from sda_fast.attachment import attach

    twin, given = work.frozen.twin(), work.given()
    attach(twin, work.frozen.tree)
    return Ready(lambda: (run_stock(twin, given, None),))


def _norm_rope(function: Callable[..., Any], compiled: bool = False) -> Callable[..., Ready]:
    def prepare(work: FluxWork) -> Ready:
        compute: Any = function
        if compiled:
            compute = torch.compile(function, dynamic=False, fullgraph=True)

        def run() -> Results:
            found = [compute(**layer) for layer in work.layers]
            return tuple(t for three in found for t in three if t is not None)

        return Ready(run)

    return prepare


def _levers() -> list[FluxVariant]:
    every = tuple(LEVERS)
    sets = {"none": ()} | {f"only-{lever}": (lever,) for lever in every}
    sets |= {f"to-{lever}": every[: i + 1] for i, lever in enumerate(every) if i}
    return [
        FluxVariant(
            f"ours-{name}", name, ("levers",), _our_levers(levers),
            gpu="graph" in levers, captured="graph" in levers, levers=levers,
        )
        for name, levers in sets.items()
    ]  # fmt: skip


def _every_variant() -> tuple[FluxVariant, ...]:
    step, text, ropes = ("step",), ("text",), ("norm-rope", "norm-rope-single")
    graph: dict[str, Any] = {"gpu": True, "captured": True}
    some, compiled = {"everywhere": False}, {"gpu": True, "compiled": True}
    new = FluxVariant
    return (
        new("ours-fp8", "**FastFlux fp8**, graph, modulation ahead", step, _our_fp8,
            captured=True, lossy=True),
        new("ours-ahead", "**FastFlux bf16**, graph, modulation ahead", step, _our_ahead,
            captured=True),
        new("ours-graph", "**FastFlux bf16**, graph", step, _ours, **graph),
        new("ours", "**FastFlux bf16**, launched", step, _ours),
        new("ours-attached", "stock eager, `sda.attach`", step, _attached, **some),
        new("stock", "stock eager, dense mask", step, _stock()),
        new("recipe", "*compiled, fused QKV, best backend, CUDA graph, no mask*", step,
            _stock(False, True, True), masked=False, captured=True, **compiled),
        new("compiled", "*compiled, best backend, no mask*", step, _stock(False, True),
            masked=False, **compiled, **some),
        new("compiled-mask", "compiled, dense mask", step, _stock(True, True), **compiled, **some),
        *(
            new(f"compiled-text{n}", f"*compiled, best backend, {n} text tokens*", text,
                _stock(False, True, num_txt=n), masked=False, num_txt=n, **compiled)
            for n in (T5_TEXT, REDUX_TEXT)
        ),
        *(
            new(f"stock-text{n}", f"*stock eager, best backend, {n} text tokens*", text,
                _stock(False, num_txt=n), masked=False, num_txt=n)
            for n in (T5_TEXT, REDUX_TEXT)
        ),
        *_levers(),
        new("ours-loop", f"**FastFlux bf16**, {STEPS} steps", ("loop",), _our_loop),
        new("ours-norm-rope", "**ours**", ropes, _norm_rope(norm_rope), captured=True),
        new("eager-norm-rope", "eager, as diffusers does it", ropes, _norm_rope(plain_norm_rope),
            captured=True),
        new("compiled-norm-rope", "compiled", ropes, _norm_rope(plain_norm_rope, True),
            captured=True, **compiled),
    )  # fmt: skip


VARIANTS = {variant.name: variant for variant in _every_variant()}
"""All, by name, in the order of the tables."""
