"""FastFlux against diffusers' transformer, at the full size of FLUX.1-dev, with random weights.

``python -m bench flux`` on one GPU: a step, all steps of a picture, FastFlux lever by lever, and
the kernel that norms and rotates q and k. ``--small`` goes through it with a tiny one on a CPU.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.command import command
from bench.cost import norm_rope_bytes
from bench.flux_cases import STEPS, FluxCase, select_flux
from bench.flux_check import (
    FluxYardstick,
    Launches,
    Noted,
    first_steps,
    flux_yardstick,
    one_step,
    rope_yardstick,
)
from bench.flux_model import Frozen, Shelf
from bench.flux_variants import LAUNCHES, VARIANTS, FluxVariant, FluxWork, Ready
from bench.measure import Results, Step
from bench.records import Record
from bench.suite import Suite, Unavailable, Work
from sda_fast.cost import flux_flops

COMPILE_S = 40.0
"""Seconds that a compilation may take: none is begun when fewer are left."""


@dataclass(frozen=True, slots=True)
class Flux(Suite):
    """A FLUX transformer: variants with the hierarchy and without.

    Attributes:
        shelf: where the transformer stays from case to case.
    """

    shelf: Shelf = field(default_factory=Shelf)

    def measure(self, case: FluxCase) -> Iterator[Record]:
        """See Suite; a step takes long, so that a case has a number of turns of its own."""
        return Suite.measure(replace(self, reps=min(self.reps, case.reps)), case)

    def competitors(self, case: FluxCase) -> Sequence[FluxVariant]:
        """Those of the case's kind; a few of them where there is no goal."""
        kind = [variant for variant in self.variants if case.kind in variant.kinds]
        return [variant for variant in kind if variant.everywhere or case.goal]

    def passes(self) -> Mapping[str, bool]:
        """Forward alone."""
        return {"forward": False}

    def work(self, case: FluxCase) -> FluxWork:
        """The transformer and the mask; what is exact is worked out where it is asked for."""
        free_memory(self.device)
        frozen = self.shelf.get(case, self.device)
        mask = case.tree.attention_mask(*case.grid)[None, None].to(self.device)
        work = FluxWork([], {}, case=case, frozen=frozen, mask=mask)
        if case.kind.startswith("norm-rope"):
            work.layers.extend(rope_layers(case, frozen, self.device))
        return work

    def prepare(self, variant: FluxVariant, case: FluxCase, work: FluxWork) -> Ready:
        """See Suite."""
        if variant.compiled and self.deadline.left() < COMPILE_S:
            raise Unavailable("no time was left to compile it")
        return variant.prepare(work)

    def step(self, ready: Ready, work: Work, backward: bool) -> Step:
        """See Suite."""

        def forward() -> Results:
            with torch.no_grad():
                return ready.run()

        return forward

    def ruler(self, variant: FluxVariant, work: FluxWork) -> Noted:  # pyrefly: ignore
        """By what a variant attends to; a loop is held to it in its first steps."""
        key = variant.masked, variant.num_txt
        if key not in work.rulers:
            work.rulers[key] = self._yardstick(variant, work)
        loop = work.case.kind == "loop"
        notes = work.ready[variant.name].notes
        return Noted(work.rulers[key], notes, variant.lossy, int(loop))  # pyrefly: ignore

    def _yardstick(self, variant: FluxVariant, work: FluxWork) -> FluxYardstick | Launches:
        case = work.case
        if work.layers:
            return rope_yardstick(work.layers[0])
        mask = work.mask if variant.masked else None
        inputs = work.given(variant.num_txt)
        what, compute = "velocity", one_step(mask)
        if case.kind == "loop":
            what, compute = "latents", first_steps(mask, case.dtype)
        return flux_yardstick(work.frozen, case, inputs, [what], compute)

    def captures(self, variant: FluxVariant) -> bool:
        """See Suite."""
        return variant.captured

    def facts(
        self, case: FluxCase, variant: FluxVariant, ready: Ready | None, backward: bool
    ) -> Record:
        """FLOPs of a step or bytes of a kernel, and how far off the results are."""
        notes = {} if ready is None else ready.notes
        rope = case.kind.startswith("norm-rope")
        num_txt = variant.num_txt or case.num_txt
        steps = STEPS if case.kind == "loop" else 1
        flops = case.batch * steps * flux_flops(case.config, num_txt, case.num_img)
        return {
            "suite": "flux",
            "op": "norm_rope" if rope else "flux",
            "kind": case.kind,
            "batch": case.batch,
            "steps": None if rope else steps,
            "launches": LAUNCHES if rope else None,
            "masked": variant.masked,
            "num_txt": num_txt,
            "levers": None if variant.levers is None else list(variant.levers),
            "flops": None if rope else flops,
            "bytes": LAUNCHES * moved_bytes(case) if rope else None,
            "error": notes.get("error"),
            "backend": notes.get("backend"),
            "backends_ms": notes.get("backends_ms"),
            "backends_refused": notes.get("backends_refused"),
        }

    def rate(self, record: Record) -> str:
        """TFLOP/s, TB/s for a kernel; and the error."""
        off = "" if record["error"] is None else f" off by {record['error']:.1e}"
        if record["bytes"] is not None:
            return f"{record['bytes'] / record['p50_ms'] / 1e9:8.3f} TB/s{off}"
        return f"{record['flops'] / record['p50_ms'] / 1e9:8.1f} TFLOP/s{off}"


def free_memory(device: torch.device) -> None:
    """Give back what the case before held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def moved_bytes(case: FluxCase) -> int:
    """Of one launch of norm and rotation; a single block leaves v where it is."""
    config, parts = case.config, 2 if case.kind.endswith("single") else 3
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return norm_rope_bytes(case.batch * case.seq_len, width, parts, case.dtype.itemsize)


def rope_layers(case: FluxCase, frozen: Frozen, device: torch.device) -> list[dict[str, Any]]:
    """Arguments of ``sda_fast.ops.norm_rope`` for LAUNCHES of it: the same numbers in other memory.

    A double block has a projection of text and one of image; a single block has one of both, beside
    the MLP's four times as wide.
    """
    model: Any = frozen.transformer
    single = case.kind.endswith("single")
    attn = (model.single_transformer_blocks if single else model.transformer_blocks)[0].attn
    norms = [(attn.norm_q.weight, attn.norm_k.weight)]
    lengths, width = [case.seq_len], 7 * attn.inner_dim
    if not single:
        norms.insert(0, (attn.norm_added_q.weight, attn.norm_added_k.weight))
        lengths, width = [case.num_txt, case.num_img], 3 * attn.inner_dim
    generator = torch.Generator(device).manual_seed(0)
    draw = {"generator": generator, "dtype": case.dtype, "device": device}
    streams = [torch.randn((case.batch, length, width), **draw) for length in lengths]
    given = case.inputs(device)
    cos, sin = model.pos_embed(torch.cat([given["txt_ids"], given["img_ids"]]))
    rest = {"norms": norms, "rotary": (cos, sin), "heads": attn.heads, "values": not single}
    return [{"streams": _copies(streams), **rest} for _ in range(LAUNCHES)]


def _copies(streams: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in streams]


main = command(
    "flux",
    "Time FLUX steps against diffusers' own; one record a case and variant.",
    Flux,
    VARIANTS,
    select_flux,
)
