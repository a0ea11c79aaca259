"""The adapter's rotated attention, and the adapter, against everything else that computes them.

``python -m bench qformer`` on one GPU: forward and forward with backward, time and peak memory of
our operator and of attention after an eager or compiled rotation, and of attention without one, the
speed of light; then features to embedding through the whole adapter. ``--small`` goes through it on
a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.check import yardstick
from bench.command import command
from bench.measure import Results, Step, attention_step
from bench.plain_adapter import adapter_yardstick
from bench.qformer_cases import QFormerCase, moved_bytes, select_qformer
from bench.qformer_variants import VARIANTS, QFormerVariant, QFormerWork, Run
from bench.records import Record
from bench.suite import Ruler, Suite, Work


@dataclass(frozen=True, slots=True)
class QFormer(Suite):
    """Rotated attention and the whole adapter."""

    def competitors(self, case: QFormerCase) -> Sequence[QFormerVariant]:
        """Those of the case's kind."""
        return [variant for variant in self.variants if variant.kind == case.kind]

    def work(self, case: QFormerCase) -> QFormerWork:
        """Inputs, coordinates, the adapter if there is one; rulers by whether q and k turn."""
        places = case.places(self.device)
        if case.kind == "adapter":
            adapter = case.adapter(self.device)
            inputs = case.inputs(self.device, _channels(adapter))
            whole: dict[bool, Ruler] = {True: adapter_yardstick(adapter, *inputs, places=places)}
            return QFormerWork(inputs, whole, places=places, adapter=adapter)
        inputs = case.inputs(self.device)
        wanted = {variant.rotated for variant in self.competitors(case)}
        rulers: dict[bool, Ruler] = {
            rotated: yardstick(inputs, None, places if rotated else None) for rotated in wanted
        }
        return QFormerWork(inputs, rulers, places=places)

    def prepare(self, variant: QFormerVariant, case: QFormerCase, work: QFormerWork) -> Run:
        """See Suite."""
        return variant.prepare(case, work)

    def step(self, ready: Run, work: QFormerWork, backward: bool) -> Step:
        """See Suite; an adapter's backward gives the gradients of all its parameters."""
        if work.adapter is None:
            return attention_step(ready, work.inputs, backward)
        features, d_out = work.inputs
        parameters = [p for p in work.adapter.parameters() if p.requires_grad]

        def forward() -> Results:
            with torch.no_grad():
                return (ready(features),)

        def both() -> Results:
            out = ready(features)
            return out.detach(), *torch.autograd.grad(out, parameters, d_out)

        return both if backward else forward

    def ruler(self, variant: QFormerVariant, work: Work) -> Ruler:
        """See Suite."""
        return work.rulers[variant.rotated]

    def captures(self, variant: QFormerVariant) -> bool:
        """See Suite."""
        return variant.runs == "captured"

    def facts(
        self, case: QFormerCase, variant: QFormerVariant, ready: Run | None, backward: bool
    ) -> Record:
        """What is moved at least, for attention alone; graphs of its own hide a variant's peak."""
        own = {"graph": True, "peak_bytes": None} if variant.runs == "own" else {}
        return own | {
            "suite": "qformer",
            "op": "rope3d_attention" if case.kind == "op" else "adapter",
            "rotated": variant.rotated,
            "bytes": moved_bytes(case, backward) if case.kind == "op" else None,
        }

    def rate(self, record: Record) -> str:
        """TB/s, for attention alone."""
        moved = record["bytes"]
        return "" if moved is None else f"{moved / record['p50_ms'] / 1e9:8.3f} TB/s"


def _channels(adapter: torch.nn.Module) -> tuple[int, int]:
    return adapter.config.in_features, adapter.config.out_features  # pyrefly: ignore


main = command(
    "qformer",
    "Time rotated attention and the adapter against others; one record a case, pass and variant.",
    QFormer,
    VARIANTS,
    select_qformer,
)
