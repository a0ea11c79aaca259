"""Where the numbers of a run go: JSON lines always, dashboards where they are wanted."""

import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from sda_fast.files import write_whole

PROJECT = "sda-fast"
LOG, RUN_ID = "log.jsonl", "run-id"
DASHBOARDS = ("wandb", "trackio")
"""What --report-to takes: names of packages."""

Row = Mapping[str, float]
"""Numbers of a step by name, "step" among them; those of an evaluation begin with "eval/"."""
Warn = Callable[[str], object]


class Reporter(Protocol):
    """Takes the rows of a run."""

    def log(self, row: Row) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class JsonLines:
    """``folder/log.jsonl``, a row a line, appended and flushed.

    A number that is not finite is written as null, for which JSON has a word.

    Args:
        folder: of the run; made if it is not there.

    Raises:
        OSError: it cannot be written, here or at a row.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOG).open("ab+")
        if self._torn():
            self._file.write(b"\n")

    def _torn(self) -> bool:
        """Whether a killed run left a line without an end."""
        if self._file.seek(0, os.SEEK_END) == 0:
            return False
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) != b"\n"

    def log(self, row: Row) -> None:
        """Append a line."""
        known = {key: value if math.isfinite(value) else None for key, value in row.items()}
        self._file.write(f"{json.dumps(known)}\n".encode())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """``folder/tensorboard``; what an earlier try wrote of steps that are run again is hidden.

    Args:
        folder: of the run.
        first_step: that will be logged.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = first_step if first_step > 1 else None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=again, flush_secs=30)

    def log(self, row: Row) -> None:
        """A scalar for each number."""
        for name, value in _named(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases; started again, the same one goes on.

    Where it goes (its server, offline, nowhere) is wandb's own to be told.

    Args:
        folder: of the run; wandb's files go there too.
        config: of the run, JSON.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        wandb = import_module("wandb")
        about = {"id": run_id(folder), "resume": "allow", "dir": str(folder)}
        self._run = wandb.init(project=PROJECT, name=folder.name, config=dict(config), **about)
        # its own step must only grow; a run that resumes goes back a little
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Row) -> None:
        """Hand a row over."""
        self._run.log(_named(row) | {"step": int(row["step"])})

    def close(self) -> None:
        """Wait until it is sent."""
        self._run.finish()


class Trackio:
    """A run of Trackio; started again, the same one goes on.

    Args:
        folder: of the run.
        config: of the run, JSON.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        trackio = import_module("trackio")
        # its runs are told apart by name
        name = f"{folder.name}-{run_id(folder)}"
        self._run = trackio.init(project=PROJECT, name=name, config=dict(config), resume="allow")

    def log(self, row: Row) -> None:
        """Hand a row over."""
        self._run.log(_named(row), step=int(row["step"]))

    def close(self) -> None:
        """Wait until it is written."""
        self._run.finish()


class Reporters:
    """Several reporters as one: only the log of JSON lines may end a run.

    Args:
        lines: the log.
        dashboards: by name; one that raises is named by ``warn``, once, and gets no more rows.
        warn: is told.
    """

    def __init__(self, lines: JsonLines, dashboards: Mapping[str, Reporter], warn: Warn) -> None:
        self._lines, self._dashboards, self._warn = lines, dict(dashboards), warn

    def log(self, row: Row) -> None:
        """Hand a row to all.

        Raises:
            OSError: the log cannot be written.
        """
        self._lines.log(row)
        self._each(lambda dashboard: dashboard.log(row))

    def close(self) -> None:
        """Close all."""
        self._each(lambda dashboard: dashboard.close())
        self._lines.close()

    def __enter__(self) -> "Reporters":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _each(self, act: Callable[[Reporter], None]) -> None:
        for name, dashboard in list(self._dashboards.items()):
            try:
                act(dashboard)
            except Exception as error:  # of whatever kind: a dashboard is not worth a run
                del self._dashboards[name]
                self._warn(f"{name} gets no more rows of this run: {error!r}")


def check_report_to(report_to: Sequence[str]) -> None:
    """Refuse dashboards that are unknown or not installed.

    Raises:
        ValueError: one is; the message says what to install.
    """
    for name in report_to:
        if name not in DASHBOARDS:
            raise ValueError(f"report_to must be among {', '.join(DASHBOARDS)}, got {name!r}")
        if find_spec(name) is None:
            raise ValueError(
                f"report_to {name} needs the package {name}, which is not installed: "
                f"pip install {name}"
            )


def open_reporters(
    folder: Path,
    report_to: Sequence[str],
    config: Mapping[str, Any],
    first_step: int,
    warn: Warn = warnings.warn,
) -> Reporters:
    """The log of a run, TensorBoard where it is installed, and the dashboards asked for.

    Args:
        folder: of the run.
        report_to: names of DASHBOARDS.
        config: of the run; what JSON has no word for becomes text.
        first_step: that will be logged: 1, or where the run goes on.
        warn: is told of a dashboard that fails, which is then left out.

    Raises:
        ValueError: see ``check_report_to``.
        OSError: the log cannot be written.
    """
    check_report_to(report_to)
    told = json.loads(json.dumps(dict(config), default=str))
    makers: dict[str, Callable[[], Reporter]] = {}
    if find_spec("tensorboard") is not None:
        makers["tensorboard"] = lambda: TensorBoard(folder, first_step)
    if "wandb" in report_to:
        makers["wandb"] = lambda: Wandb(folder, told)
    if "trackio" in report_to:
        makers["trackio"] = lambda: Trackio(folder, told)
    lines, dashboards = JsonLines(folder), {}
    for name, make in makers.items():
        try:
            dashboards[name] = make()
        except Exception as error:  # no account, no network: the run itself needs neither
            warn(f"{name} gets no rows of this run: {error!r}")
    return Reporters(lines, dashboards, warn)


def read_log(folder: Path) -> dict[int, dict[str, float]]:
    """The rows of ``folder/log.jsonl`` by step, in order.

    Rows of one step are merged, the later number of a name wins: a resumed run writes steps again.
    Torn lines are passed over; what was not finite is NaN.

    Raises:
        FileNotFoundError: there is no log.
    """
    rows: dict[int, dict[str, float]] = {}
    for line in (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, TypeError, KeyError):
            continue
        known = {key: math.nan if value is None else value for key, value in row.items()}
        rows.setdefault(step, {}).update(known)
    return dict(sorted(rows.items()))


def run_id(folder: Path) -> str:
    """What dashboards know a run by: random, kept in ``folder/run-id``."""
    path = folder / RUN_ID
    if not path.is_file():
        write_whole(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _named(row: Row) -> dict[str, float]:
    """Numbers by group and name, as dashboards sort them."""
    return {
        name if "/" in name else f"train/{name}": value
        for name, value in row.items()
        if name != "step"
    }
