"""Check what is to be measured, then time what is right, in turns: for ``bench tune``."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from bench.measure import Deadline, Graph, Results, Step, quantiles, take_turns
from bench.nvml import card
from bench.records import Record, append_record
from bench.suite import DeviceLost
from bench.tune_table import line


@dataclass(slots=True)
class Attempt:
    """Something to check and time: on its way to a record.

    Attributes:
        make: sets up what is timed.
        faults: what is wrong with its results.
        about: fields of its record.
        status: of the record: "ok", "failed" (wrong or broken), "refused" (it cannot be built or
            launched) or "skipped" (no time was left).
        reason: why it is not "ok".
        step: what will be timed.
        graph: the step is a CUDA graph.
    """

    make: Callable[[], Step]
    faults: Callable[[Results], list[str]]
    about: Record
    status: str = "ok"
    reason: str | None = None
    step: Step | None = None
    graph: bool = False

    def give_up(self, status: str, reason: str) -> None:
        """It will not be timed."""
        self.status, self.reason, self.step = status, " ".join(reason.split())[:400], None

    def record(self, times: Sequence[float] = (), nvml: Record | None = None) -> Record:
        """What became of it, with its milliseconds and what the card said of itself."""
        p20, p50, p80 = quantiles(times) if times else (None, None, None)
        return {
            **self.about,
            "status": self.status,
            "reason": self.reason,
            "reps": len(times),
            "p20_ms": p20,
            "p50_ms": p50,
            "p80_ms": p80,
            "graph": self.graph,
            "nvml": nvml,
        }


@dataclass(frozen=True, slots=True)
class Turns:
    """How attempts are measured, and until when.

    Attributes:
        device: where.
        reps: turns of each.
        deadline: no more is begun after it.
        reserve_s: seconds before the deadline when nothing more is set up.
    """

    device: torch.device
    reps: int
    deadline: Deadline = field(default_factory=Deadline)
    reserve_s: float = 0.0

    def is_late(self) -> bool:
        """Whether nothing more may be set up."""
        return self.deadline.left() < self.reserve_s

    def time_all(self, attempts: Sequence[Attempt]) -> Iterator[Record]:
        """Set up one after the other, time those that are right in turns; a record for each.

        Raises:
            DeviceLost: an attempt took the device with it; the records have come first.
        """
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        lost = None
        for attempt in attempts:
            if lost or self.is_late():
                attempt.give_up("skipped", lost or "no time was left")
                continue
            self._set_up(attempt, pool)
            if attempt.status == "failed" and not self._alive():
                lost = f"the device was lost: {attempt.reason}"
        times, nvml = {}, None
        if not lost:
            try:
                before = card(self.device)
                steps = {str(i): a.step for i, a in enumerate(attempts) if a.step is not None}
                times = take_turns(steps, self.device, self.reps, self.deadline)
                nvml = before and {"before": before, "after": card(self.device)}
            except RuntimeError as error:
                lost = f"the device was lost while all were timed: {error}"
        for i, attempt in enumerate(attempts):
            if lost and attempt.step is not None:
                attempt.give_up("failed", lost)
            yield attempt.record(times.get(str(i), []), nvml)
        if lost:
            raise DeviceLost(lost)

    def two_rounds(
        self,
        attempt: Callable[[Any, int], Attempt],
        first: Sequence[Any],
        second: Callable[[Sequence[Record]], Sequence[Any]],
    ) -> Iterator[Record]:
        """Time what comes first, then what its records call for; a record for each.

        Args:
            attempt: what is to be tried, and the number of the round, as an attempt.
            first: what is tried in the first round.
            second: its records -> what is tried in the second one, which may be nothing.

        Raises:
            DeviceLost: see time_all.
        """
        records = []
        for record in self.time_all([attempt(trial, 1) for trial in first]):
            records.append(record)
            yield record
        more = second(records)
        if more:
            yield from self.time_all([attempt(trial, 2) for trial in more])

    def _set_up(self, attempt: Attempt, pool: object) -> None:
        """Bring an attempt to where it can be timed, or note why not."""
        try:
            step = attempt.make()
            results = step()  # compiles
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # a fault belongs to this one
                try:
                    step = Graph(step, pool)
                    attempt.graph, results = True, step.fresh()
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    attempt.reason = " ".join(f"timed without a graph: {error}".split())[:400]
            faults = attempt.faults(results)
            attempt.step = step
            if faults:
                attempt.give_up("failed", "wrong: " + "; ".join(faults))
        except (OutOfResources, CompilationError, PTXASError) as error:
            attempt.give_up("refused", str(error))
        except Exception as error:  # one tile's fault must not end the run
            attempt.give_up("failed", f"{type(error).__name__}: {error}")

    def _alive(self) -> bool:
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Tuning:
    """The suite for one operator: what is tried of it, and how that is measured.

    Attributes:
        turns: how attempts are measured, and until when.
        small: sweep a few tiles that an interpreter takes.
        about: fields that all records share.
    """

    op: ClassVar[str]
    """The operator's name in records."""

    turns: Turns
    small: bool = False
    about: Record = field(default_factory=dict)

    def measure(self, case: Any) -> Iterator[Record]:
        """The records of a case.

        Raises:
            DeviceLost: the device answers no more; what is known has come first.
        """
        raise NotImplementedError

    @staticmethod
    def report(records: Sequence[Record]) -> list[str]:
        """Lines for csrc_triton/tiles.py, from the operator's own records."""
        raise NotImplementedError


def run(
    turns: Turns, measure: Callable[[Any], Iterator[Record]], cases: Sequence[Any], out: Path
) -> list[Record]:
    """Measure case after case, each record written as soon as it is there; stop in time."""
    records: list[Record] = []
    for case in cases:
        if turns.is_late():
            print(f"no time left for {case.name}, D = {case.head_dim}")
            continue
        left = turns.deadline.left()
        print(
            f"{case.name}: S = {case.seq_len}, D = {case.head_dim}, {left:.0f} s left", flush=True
        )
        try:
            for record in measure(case):
                append_record(out, record)
                records.append(record)
                print(line(record), flush=True)
        except DeviceLost as error:
            print(f"{case.name}: {error}")
            break
        except torch.OutOfMemoryError as error:  # of the inputs or of the yardstick
            print(f"{case.name} does not fit: {error}")
    return records
