"""The training loop, on one screen."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from train.checkpoint import Saver
from train.config import TrainConfig
from train.lineage import CHECKPOINTS, resume
from train.meter import Meter
from train.nonfinite import note_step
from train.optim import set_learning_rate
from train.progress import Progress, describe_state
from train.ranks import Ranks
from train.signals import Ended, Signals
from train.stage import Stage
from train.state import State
from train.step import take_step
from train.view import View


def evaluate(view: View, state: State, progress: Progress, meter: Meter) -> None:
    """Look at what was learned so far; the time for it is not training's."""
    with meter.paused():
        progress.judge(view.evaluate(progress.step, state))


def train(
    config: TrainConfig,
    stage: Stage,
    ranks: Ranks | None = None,
    parent: Path | None = None,
    report_to: Sequence[str] = (),
) -> None:
    """Run or resume config.steps optimizer steps, then write config.folder/export from the EMA.

    What a step sees depends on (config.seed, step) alone: a run that resumes, on as many ranks or
    others, sees what an unbroken one would have seen.

    Args:
        config: of the run.
        stage: made for it.
        ranks: that share the work, each of which calls this; None is this process alone.
        parent: a checkpoint of ``find_parent``, for a run without one of its own.
        report_to: see ``open_reporters``.

    Raises:
        Ended: SIGTERM or SIGUSR1 came; what was learned is saved.
        FloatingPointError: too many steps in a row were not finite; see train.nonfinite.
        OSError: something could not be written; earlier checkpoints are as they were.
        ValueError: see resume, and the stage's data.
    """
    ranks = ranks or Ranks()
    state = State(config, stage, ranks)
    with View(config, ranks, report_to) as view, Signals() as signals:
        progress = Progress.of(resume(config, state, parent, view.warn), stage)
        state.start()
        view.open(stage, progress.step)
        checkpoints = Saver(config.folder / CHECKPOINTS, config.keep, progress.step)
        with checkpoints as saver, closing(stage.batches(progress.step + 1)) as batches:
            meter = Meter(stage, ranks)
            if progress.owes(config):
                evaluate(view, state, progress, meter)
            for step in range(progress.step + 1, config.steps + 1):
                drawn = meter.next(batches)
                factor = set_learning_rate(state.optimizers, config, step)
                told = partial(progress.notices, signals, saver, drawn)
                outcome = take_step(state, step, drawn, told)
                progress.count(step, outcome)
                view.took(step)
                if not outcome.finite:
                    note_step(state, step, drawn, progress.in_row, describe_state(state, progress))
                if step % config.log_every == 0:
                    view.row(progress.row(outcome, factor), meter.row())
                last = step == config.steps
                if last or (progress.owes(config) and not outcome.ended):
                    evaluate(view, state, progress, meter)
                progress.check(state, outcome, saver)
                if last or outcome.ended or progress.save_due(config, saver):
                    view.saved(progress.save(state, saver, wait=outcome.ended))
                if outcome.ended and not last:
                    ranks.wait()
                    raise Ended(f"told to end after step {step}, which is saved")
        if ranks.first:
            with state.averaged():
                stage.save(config.folder / "export")
        ranks.wait()
