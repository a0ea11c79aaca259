"""What a run shows and writes down: display, log, evaluation, sample sheets, plot."""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType

from PIL import Image
from torch import Tensor

from sda_fast.files import write_whole
from train.checkpoint import writing
from train.config import FluxConfig, TrainConfig, describe
from train.display import Display
from train.plot import plot_run
from train.ranks import Ranks
from train.report import LOG, Reporters, open_reporters
from train.stage import Stage
from train.state import State

SHEET_ZOOM = 96
"""Pixels that a picture of a sheet is enlarged to, if it is smaller."""


class View:
    """Of the rank that writes; on others it does nothing but evaluate.

    Args:
        config: of the run.
        ranks: of the run.
        report_to: see ``open_reporters``.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, report_to: Sequence[str]) -> None:
        self.config, self.ranks, self.report_to = config, ranks, report_to
        self._reporters: Reporters | None = None
        self._display: Display | None = None
        self._stall: float | None = None

    def open(self, stage: Stage, done: int) -> None:
        """Begin to write, now that nothing is refused any more."""
        if not self.ranks.first:
            return
        folder = self.config.folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.json", describe(self.config))
        about = json.loads(describe(self.config))
        self._reporters = open_reporters(folder, self.report_to, about, done + 1, self.warn)
        self._display = Display(self.config.name, self.config.steps, done)

    def took(self, step: int) -> None:
        """A step is over."""
        if self._display is not None:
            self._display.update(step)

    def warn(self, text: str) -> None:
        """Tell a person something that does not end the run."""
        if self._display is not None:
            self._display.note(text)
        elif self.ranks.first:
            print(text, file=sys.stderr)

    def row(self, *parts: Mapping[str, float]) -> None:
        """Log a row and show it."""
        row = {name: value for part in parts for name, value in part.items()}
        if self._stall is not None:
            row["checkpoint_stall"], self._stall = self._stall, None
        if self._reporters is not None:
            with writing(self.config.folder / LOG):
                self._reporters.log(row)
        if self._display is not None:
            self._display.update(int(row["step"]), row)

    def saved(self, seconds: float | None) -> None:
        """A checkpoint has kept the run waiting for so long."""
        self._stall = seconds

    def evaluate(self, step: int, state: State) -> dict[str, float]:
        """Measure the averaged weights on what is never trained on, and draw a sheet."""
        config = self.config
        sharded = isinstance(config, FluxConfig) and config.shard_flux
        with state.averaged():
            found = state.stage.evaluate()
            # a sharded decoder needs all ranks
            sheet = state.stage.sheet() if self.ranks.first or sharded else None
        if self.ranks.first:
            row = {f"eval/{name}": v for name, v in found.items() if math.isfinite(v)}
            self.row({"step": step, **row})
            if sheet is not None:
                self._save_sheet(step, sheet)
            try:
                plot_run(config.folder)
            except (OSError, ImportError) as error:  # a drawing must not end a run
                self.warn(f"the run's page was not drawn: {error}")
        return found

    def _save_sheet(self, step: int, sheet: Tensor) -> None:
        target = self.config.folder / "sheets" / f"{step:06d}.png"
        target.parent.mkdir(exist_ok=True)
        pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(pixels)
        zoom = max(1, SHEET_ZOOM * 16 // image.width)
        size = zoom * image.width, zoom * image.height
        part = target.with_suffix(".part")
        image.resize(size, Image.Resampling.NEAREST).save(part, "PNG")
        os.replace(part, target)

    def __enter__(self) -> "View":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for part in (self._display, self._reporters):
            try:
                if part is not None:
                    part.close()
            except OSError:
                # what ended the run has more to say
                if kind is None:
                    raise
