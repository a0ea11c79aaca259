"""How far a run has come, and what ends it early."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from train.batch import Batch
from train.checkpoint import Saver
from train.config import TrainConfig, describe
from train.data.loader import BrokenCount
from train.signals import Signals
from train.stage import Stage
from train.state import State
from train.step import Notices, Outcome


@dataclass(slots=True)
class Progress:
    """Of a run; but for what this rank has drawn, on all ranks the same.

    Attributes:
        step: the last one that was finished; 0 at the beginning.
        skipped: steps that were not taken for want of finite numbers.
        in_row: of these, the last ones in a row.
        best: "step" and "loss" of the best evaluation.
        judged: the step of the last evaluation.
        pictures: what this rank has drawn since it started, and could not read.
    """

    step: int = 0
    skipped: int = 0
    in_row: int = 0
    best: dict[str, float] | None = None
    judged: int = 0
    pictures: BrokenCount = field(default_factory=lambda: BrokenCount(0))
    _better: bool = False

    @classmethod
    def of(cls, meta: Mapping[str, Any] | None, stage: Stage) -> "Progress":
        """As a checkpoint has it; the beginning, if there is none."""
        names = ("step", "skipped", "in_row", "best", "judged")
        had: dict[str, Any] = {name: meta[name] for name in names} if meta else {}
        return cls(**had, pictures=BrokenCount(stage.num_pictures))

    def notices(self, signals: Signals, saver: Saver, batches: list[Batch]) -> Notices:
        """What this rank tells the others with the next step."""
        for batch in batches:
            self.pictures.add(len(batch.ids), batch.broken)
        known = self.pictures.broken, self.pictures.drawn
        return Notices(signals.raised, saver.failed(), *known)

    def count(self, step: int, outcome: Outcome) -> None:
        """A step is over."""
        self.step, self._better = step, False
        self.skipped += not outcome.finite
        self.in_row = 0 if outcome.finite else self.in_row + 1

    def owes(self, config: TrainConfig) -> bool:
        """Whether an evaluation is due: one that a signal left out is made up for later."""
        return self.step > self.judged and self.step % config.eval_every == 0

    def judge(self, found: Mapping[str, float]) -> None:
        """Compare an evaluation with the best so far."""
        step, loss, self.judged = self.step, found["loss"], self.step
        if math.isfinite(loss) and (self.best is None or loss < self.best["loss"]):
            self.best, self._better = {"step": step, "loss": loss}, True

    def save_due(self, config: TrainConfig, saver: Saver) -> bool:
        """Whether a checkpoint is due; only the rank that writes knows of the minutes."""
        every = self.step % config.checkpoint_every == 0
        return every or self._better or saver.due(config.checkpoint_minutes)

    def save(self, state: State, saver: Saver, wait: bool) -> float | None:
        """Write a checkpoint, on the rank that writes; the seconds that training waited for it."""
        if not state.ranks.first:
            return None
        return saver.save(self.step, state.tensors(), describe_state(state, self), wait)

    def row(self, outcome: Outcome, factor: float) -> dict[str, float]:
        """Of the log; numbers that are not finite are left out."""
        row = {name: round(value, 6) for name, value in outcome.losses.items()}
        row |= {"grad_norm": round(outcome.grad_norm, 4), "lr": factor}
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        return {"step": self.step, **row, "skipped": self.skipped, "broken": outcome.broken}

    def check(self, state: State, outcome: Outcome, saver: Saver) -> None:
        """End a run that cannot go on, on all ranks at the same step.

        Raises:
            FloatingPointError: config.nonfinite_limit steps in a row were not finite.
            OSError: a checkpoint could not be written.
            ValueError: too many pictures cannot be read.
        """
        config = state.config
        if outcome.failed:
            saver.finish()
            raise OSError("another rank could not write a checkpoint, and says why")
        if self.in_row >= config.nonfinite_limit:
            raise FloatingPointError(
                f"{self.in_row} steps in a row of {config.name} were not finite, up to step "
                f"{self.step}; {config.folder / 'nonfinite'} holds what they were"
            )
        if self.pictures.over(outcome.broken, outcome.drawn):
            for reasons in state.ranks.gather(self.pictures.reasons):
                self.pictures.add(0, reasons)
            raise ValueError(self.pictures.message(outcome.broken, outcome.drawn))


def describe_state(state: State, progress: Progress) -> dict[str, Any]:
    """What a checkpoint of now says of itself."""
    config = state.config
    return {
        "recipe": config.name,
        "stage": config.stage,
        "config": json.loads(describe(config)),
        **state.stage.about,
        "step": progress.step,
        "skipped": progress.skipped,
        "in_row": progress.in_row,
        "best": progress.best,
        "judged": progress.judged,
        "inherited": state.inherited,
        "world_size": state.ranks.world,
    }
