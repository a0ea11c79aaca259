"""Joint attention under the hierarchy against everything else that computes it, timed.

``python -m bench attention`` on one GPU: forward and forward with backward, time and peak memory of
our operator, of torch's and others' attention with the same mask, and of the best kernels without
one, the speed of light. ``--small`` goes through all of it on a CPU.
"""

from dataclasses import dataclass

from bench.cases import Case, select
from bench.check import yardstick
from bench.command import command
from bench.cost import attention_bytes, attention_flops
from bench.measure import Step, attention_step
from bench.records import Record
from bench.suite import Ruler, Suite, Work
from bench.variants import VARIANTS, Ready, Variant, dense_mask


@dataclass(frozen=True, slots=True)
class Attention(Suite):
    """Joint attention: variants with the mask and without."""

    def work(self, case: Case) -> Work:
        """q, k, v and the gradient of out; rulers by whether the mask is obeyed."""
        inputs = case.inputs(self.device)
        rulers: dict[bool, Ruler] = {True: yardstick(inputs, dense_mask(case, self.device)[0, 0])}
        if not all(variant.masked for variant in self.variants):
            rulers[False] = yardstick(inputs, None)
        return Work(inputs, rulers)

    def prepare(self, variant: Variant, case: Case, work: Work) -> Ready:
        """See Suite."""
        return variant.prepare(case, work.inputs[0])

    def step(self, ready: Ready, work: Work, backward: bool) -> Step:
        """See Suite."""
        return attention_step(ready.attend, work.inputs, backward)

    def ruler(self, variant: Variant, work: Work) -> Ruler:
        """See Suite."""
        return work.rulers[variant.masked]

    def facts(self, case: Case, variant: Variant, ready: Ready | None, backward: bool) -> Record:
        """What is computed and moved at least, and what the mask costs."""
        return {
            "suite": "attention",
            "op": "hierarchical_attention",
            "masked": variant.masked,
            "flops": attention_flops(case, variant.masked, backward),
            "bytes": attention_bytes(case, backward),
            "setup_ms": ready and ready.setup_ms,
            "mask_bytes": ready and ready.mask_bytes,
        }

    def rate(self, record: Record) -> str:
        """TFLOP/s."""
        return f"{record['flops'] / record['p50_ms'] / 1e9:8.1f} TFLOP/s"

    def done(self, case: Case) -> None:
        """The dense mask is large."""
        dense_mask.cache_clear()


main = command(
    "attention",
    "Time joint attention against its competitors; one record a case, pass and variant.",
    Attention,
    VARIANTS,
    select,
)
