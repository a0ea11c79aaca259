"""What a person sees of a run while it goes: one screen, or plain lines where there is none."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.report import Row

KNOWN = (
    "step", "grad_norm", "lr", "seconds", "pictures_per_s", "mfu", "memory_gib", "data_wait",
    "checkpoint_stall", "skipped", "broken",
)  # fmt: skip
"""Fields of a row that are no parts of the loss."""
REDRAW_S = 0.1
STEPS_TIMED = 200
"""The time left goes by the time that so many steps took last."""


class Display:
    """Progress of a run: on a terminal one screen that is drawn anew, else a line for each row.

    Nothing runs beside the caller: it is drawn when it is told something.

    Args:
        name: of the run.
        total: steps of it.
        done: steps that an earlier try has finished.
        console: where; None is stderr.
        clock: seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        done: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.step = name, total, done
        self._console = console or Console(stderr=True, highlight=False)
        self._clock, self._drawn = clock, -math.inf
        self._times = deque([(done, clock())], maxlen=STEPS_TIMED)
        self._last: dict[str, float] = {}
        self._evaluated: dict[str, float] = {}
        self._saved: dict[str, float] = {}
        # no thread of its own: loader processes are forked beside it
        self._live = Live(console=self._console, auto_refresh=False)
        self._draws = self._console.is_terminal and not self._console.is_dumb_terminal
        if self._draws:
            self._live.start()
            self._draw()

    def update(self, step: int, row: Row | None = None) -> None:
        """A step is finished.

        Args:
            step: which.
            row: of the log, if one is due; fields of evaluations begin with "eval/".
        """
        self.step = step
        self._times.append((step, self._clock()))
        if row is not None:
            self._take(row)
        if not self._draws:
            if row is not None:
                self._print(self._line(row))
        elif row is not None or self._clock() - self._drawn >= REDRAW_S:
            self._draw()

    def note(self, text: str) -> None:
        """Say something that stays, above what is drawn anew."""
        self._print(text)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seconds_left(self) -> float | None:
        """By the steps of late; None before there are any."""
        (first, start), (last, end) = self._times[0], self._times[-1]
        if last <= first:
            return None
        return (end - start) / (last - first) * max(0, self.total - last)

    def _take(self, row: Row) -> None:
        evaluated = {key: value for key, value in row.items() if key.startswith("eval/")}
        if evaluated:
            self._evaluated = {"step": row["step"], **evaluated}
        if len(evaluated) + 1 < len(row):
            self._last = {key: row[key] for key in row.keys() - evaluated.keys()}
        if "checkpoint_stall" in row:
            stall = row["checkpoint_stall"]
            self._saved = {"step": row["step"], "stall": stall, "at": self._clock()}

    def _print(self, text: str) -> None:
        # names of pictures come by here, and may hold whatever a file name can
        lines = ["".join(c if c.isprintable() else "?" for c in line) for line in text.split("\n")]
        self._console.print(Text("\n".join(lines)), soft_wrap=True)

    def _draw(self) -> None:
        self._drawn = self._clock()
        self._live.update(self._screen(), refresh=True)

    def _line(self, row: Row) -> str:
        if any(key.startswith("eval/") for key in row):
            parts = ["evaluation", *_evaluation(row)]
        else:
            parts = [*_losses(row), *_speed(row), *_trouble(row), f"{self._left()} left"]
        return f"{self.name} {self.step}/{self.total}  {'  '.join(parts)}"

    def _left(self) -> str:
        left = self.seconds_left()
        return "–" if left is None else duration(left)

    def _screen(self) -> RenderableType:
        head = Table.grid(expand=True, padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        share = self.step / self.total
        head.add_row(
            Text(self.name, "bold"),
            ProgressBar(self.total, self.step),
            f"{self.step:,} / {self.total:,}  {share:.0%}  {self._left()} left",
        )
        last = self._last
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column()
        body.add_row("loss", _joined(_losses(last)))
        body.add_row("optimizer", _joined(_optimizer(last)))
        body.add_row("speed", _joined(_speed(last)))
        body.add_row("checkpoint", _joined(self._checkpoint()))
        evaluated = self._evaluated
        at = [f"at {int(evaluated['step']):,}"] if evaluated else []
        body.add_row("evaluation", _joined([*at, *_evaluation(evaluated)]))
        trouble = _trouble(last)
        if trouble:
            body.add_row(Text("trouble", "yellow"), Text("   ".join(trouble), "yellow"))
        return Group(head, body)

    def _checkpoint(self) -> list[str]:
        if not self._saved:
            return []
        saved = self._saved
        ago = duration(self._clock() - saved["at"])
        return [f"by {int(saved['step']):,}", f"{ago} ago", f"waited {saved['stall']:.2f} s for it"]


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3 h 05 min, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} d {hours:02d} h"


def _joined(parts: Iterable[str]) -> Text:
    return Text("   ".join(parts) or "–")


def _losses(row: Row) -> list[str]:
    return [f"{key} {value:.4f}" for key, value in sorted(row.items(), key=_first) if _is_part(key)]


def _first(item: tuple[str, float]) -> tuple[bool, str]:
    """The loss ahead of its parts."""
    return item[0] != "loss", item[0]


def _is_part(key: str) -> bool:
    return key not in KNOWN and "/" not in key


def _optimizer(row: Row) -> list[str]:
    return [f"{words} {row[key]:.3g}" for key, words in WORDS.items() if key in row]


def _speed(row: Row) -> list[str]:
    known = {key: row[key] for key in SPEED if key in row}
    return [SPEED[key].format(value) for key, value in known.items()]


def _trouble(row: Row) -> list[str]:
    return [words.format(row[key]) for key, words in TROUBLE.items() if row.get(key)]


def _evaluation(row: Row) -> list[str]:
    return [
        f"{key.removeprefix('eval/').replace('_', ' ')} {value:.4g}"
        for key, value in row.items()
        if key.startswith("eval/")
    ]


WORDS = {"grad_norm": "gradient norm", "lr": "learning rate factor"}
SPEED = {
    "pictures_per_s": "{:.4g} pictures/s", "seconds": "{:.3g} s a step", "mfu": "MFU {:.1%}",
    "memory_gib": "memory {:.1f} GiB", "data_wait": "data wait {:.1%}",
}  # fmt: skip
TROUBLE = {"skipped": "{:.0f} steps not taken", "broken": "{:.0f} broken pictures"}
