"""A scheduler's wish to end the run, heard between two steps."""

import signal
from types import FrameType, TracebackType

ASK = (signal.SIGTERM, signal.SIGUSR1)
AGAIN = 75
"""Exit code of a run that saved because it was told to end (EX_TEMPFAIL of sysexits.h): the same
command line goes on with it."""


class Ended(Exception):
    """The run was told to end, and has saved."""


class Signals:
    """While open, SIGTERM and SIGUSR1 are noted instead of obeyed.

    Attributes:
        raised: whether one came.
    """

    def __init__(self) -> None:
        self.raised = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in ASK:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyrefly: ignore

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.raised = True
