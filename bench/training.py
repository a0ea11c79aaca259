"""A whole training step at full size with random weights, beside what one would write today.

``python -m bench training`` on one GPU: pictures, encoders, latents, adapter, frozen FLUX forward
and backward, clipping, optimizer and average; then the trainer itself, for what it waits on data
and checkpoints. ``--small`` goes through it with tiny models on a CPU.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from bench.command import command
from bench.flux import COMPILE_S, free_memory
from bench.measure import Step
from bench.records import Record
from bench.suite import Suite, Unavailable, Work
from bench.training_cases import TrainingCase, select_training
from bench.training_check import Given, TrainingYardstick, training_yardstick
from bench.training_model import TrainingShelf
from bench.training_trainer import rehearse
from bench.training_variants import VARIANTS, Ready, TrainingVariant, TrainingWork
from sda_fast.cost import flux_flops

PART_RUNS = 3
"""Steps that are taken apart, after those that are timed whole."""


@dataclass(frozen=True, slots=True)
class Training(Suite):
    """Whole training steps, and the trainer's own run.

    Attributes:
        shelf: where models stay from case to case.
    """

    shelf: TrainingShelf = field(default_factory=TrainingShelf)

    def measure(self, case: TrainingCase) -> Iterator[Record]:
        """See Suite; a case has a number of turns of its own."""
        if case.kind == "trainer":
            self.shelf.clear()  # the trainer is a process of its own and wants the memory
            torch.compiler.reset()
            free_memory(self.device)
            kept = {"held_bytes": self._held()}
            yield rehearse(case, self.device, self.deadline) | kept | self.about
            return
        for record in Suite.measure(replace(self, reps=min(self.reps, case.flux.reps)), case):
            yield record | rates(record)

    def passes(self) -> Mapping[str, bool]:
        """All of a step together."""
        return {"forward+backward": True}

    def work(self, case: TrainingCase) -> TrainingWork:
        """Pictures, models; the ruler knows the loss and every gradient."""
        free_memory(self.device)
        models, pictures = self.shelf.get(case, self.device), case.pictures()
        if self.device.type == "cuda":
            pictures = pictures.pin_memory()
        given = Given.make(case, models, pictures)
        ruler = training_yardstick(models, given)
        free_memory(self.device)
        about = {"case": case, "models": models, "pictures": pictures, "given": given}
        return TrainingWork([], {True: ruler}, **about)

    def prepare(self, variant: TrainingVariant, case: TrainingCase, work: TrainingWork) -> Ready:
        """See Suite."""
        if variant.compiled and self.deadline.left() < 2 * COMPILE_S:
            raise Unavailable("no time was left to compile it")
        return variant.ready(work)

    def step(self, ready: Ready, work: Work, backward: bool) -> Step:
        """See Suite."""
        return ready.step

    def ruler(self, variant: TrainingVariant, work: Work) -> TrainingYardstick:
        """See Suite."""
        shared: Any = work.rulers[True]
        return shared.noting(work.ready[variant.name].notes)

    def captures(self, variant: TrainingVariant) -> bool:
        """A training step is launched."""
        return False

    def facts(
        self, case: TrainingCase, variant: TrainingVariant, ready: Ready | None, backward: bool
    ) -> Record:
        """FLOPs that count, how far off the results are, what each part takes."""
        flux, notes = case.flux, {} if ready is None else ready.notes
        each = flux_flops(flux.config, flux.num_txt, flux.num_img, backward=True)
        held, parts = self._held(), None
        if ready is not None and "error" in notes and self.deadline.left() > 0:
            parts = self._parts(ready)
        return {
            "suite": "training",
            "op": "training",
            "kind": case.kind,
            "batch": flux.batch,
            "resolution": round((case.picture[0] * case.picture[1]) ** 0.5),
            "num_txt": flux.num_txt,
            "recompute": variant.recompute,
            "flops": flux.batch * each,
            "error": notes.get("error"),
            "loss_error": notes.get("loss_error"),
            "parts_ms": parts,
            "held_bytes": held,
        }

    def _held(self) -> int | None:
        """Bytes of models and optimizer; None off the GPU."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.memory_allocated(self.device) if on_gpu else None

    def _parts(self, ready: Ready) -> dict[str, float] | None:
        """None where the step cannot be done again, as one that failed."""
        try:
            return ready.step.parts(min(PART_RUNS, self.reps))
        except RuntimeError:
            return None

    def rate(self, record: Record) -> str:
        """Pictures a second and the share of the matmul roof, or what the trainer waited for."""
        speed = f"{record['pictures_per_s']:8.2f} pictures/s"
        if record["kind"] == "trainer":
            return f"{speed}, data wait {record['data_wait']}, stall {record['checkpoint_stall_s']}"
        return f"{speed}{100 * record['mfu']:7.1f} % of roof"


def rates(record: Record) -> Record:
    """pictures_per_s, and mfu: FLOPs of FLUX a second over the matmul roof of the same run."""
    if record["p50_ms"] is None:
        return {"pictures_per_s": None, "mfu": None}
    seconds = record["p50_ms"] / 1e3
    roof = record["roofs"]["matmul"]
    return {
        "pictures_per_s": record["batch"] / seconds,
        "mfu": record["flops"] / seconds / roof,
    }


main = command(
    "training",
    "Time whole training steps against stock diffusers; then the trainer itself.",
    Training,
    VARIANTS,
    select_training,
)
