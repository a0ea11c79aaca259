"""From an order and a source to the micro-batches of a rank, read ahead by worker processes."""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from threading import Thread, current_thread, main_thread
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from train.batch import Batch
from train.data.order import Order, Size
from train.data.source import MOST_REFUSED, Source, list_reasons

ATTEMPTS = 8
"""Samples that are tried for a place."""
AHEAD = 2  # micro-batches a worker has ready
FEW = 1000
"""Pictures below which a share of them says nothing."""
# a scheduler sends these to all processes of a rank; whether to stop is the rank's to say
OF_THE_RANK = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class _Task:
    """A micro-batch to read: for each place a sample, and those that may take its place."""

    step: int
    size: Size
    places: tuple[int, ...]
    samples: tuple[tuple[int, ...], ...]


class Loader:
    """The micro-batches of one rank, from any step on.

    A picture that cannot be read is named in ``Batch.broken``, and another sample of its bucket
    takes its place. What a step holds depends on source and order alone: not on the number of
    workers or ranks, nor on where a run was cut off.

    Args:
        source: of the samples.
        order: of their numbers.
        buckets: (height, width) of each bucket of the order.
        micro: places of the rank, a range for each micro-batch: ``train.batch.micro_batches``.
        workers: processes that read ahead; 0 reads when asked.
        pin: hand out tensors in pinned memory, for copies to a GPU.

    Raises:
        ValueError: no places, a place that the order has not, or other buckets than were
            precomputed.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        buckets: Sequence[Size],
        micro: Sequence[range],
        workers: int,
        pin: bool = False,
    ) -> None:
        places = [place for part in micro for place in part]
        if not places or not all(micro) or min(places) < 0 or max(places) >= order.batch_size:
            raise ValueError(f"micro must hold places 0 to {order.batch_size - 1}, got {micro}")
        if workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        made = getattr(source, "buckets", buckets)
        if tuple(made) != tuple(buckets):
            raise ValueError(f"buckets must be those precomputed, {made}, got {tuple(buckets)}")
        self.source, self.order, self.buckets = source, order, tuple(buckets)
        self.micro, self.workers, self.pin = tuple(micro), workers, pin

    def batches(self, first_step: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of step after step, without end; workers start at once.

        Closing the iterator ends them.

        Args:
            first_step: from 1.

        Raises:
            ValueError: first_step is below 1, or at some step no picture was found for a place in
                ``ATTEMPTS`` attempts; they are listed.
            RuntimeError: a worker died; seen within seconds.
        """
        if first_step < 1:
            raise ValueError(f"first_step must be at least 1, got {first_step}")
        loader = DataLoader(
            _Reader(self.source),
            batch_size=None,  # a task is a micro-batch already
            sampler=self._tasks(first_step),  # pyrefly: ignore
            collate_fn=_as_it_is,
            num_workers=self.workers,
            prefetch_factor=AHEAD if self.workers else None,
            pin_memory=self.pin,
            worker_init_fn=_settle,
            # workers share the index of the source instead of a copy each; they never touch a GPU
            multiprocessing_context="fork" if self.workers else None,
            # it draws a seed, which must not come from the generator that a run goes on with
            generator=torch.Generator(),
        )
        with _signals_as_they_were():
            results = iter(loader)
        return self._steps(results)

    def batches_of(self, step: int, places: Sequence[range]) -> list[Batch]:
        """Other micro-batches of one step, read at once; errors as ``batches``."""
        other = Loader(self.source, self.order, self.buckets, places, workers=0)
        return next(other.batches(step))

    def _steps(self, results: Iterator[Mapping[str, Any]]) -> Generator[list[Batch], None, None]:
        try:
            while True:
                batches = []
                for _ in self.micro:
                    try:
                        batch = _batch(**next(results))
                    except RuntimeError as error:
                        if "DataLoader worker" not in str(error):
                            raise
                        raise RuntimeError(
                            f"a process that reads data has died ({error}): memory or /dev/shm may "
                            f"be full, and fewer workers than {self.workers} take less of them"
                        ) from error
                    if not batch.tensors:
                        raise ValueError(
                            f"data: step {batch.step} has a place for which {ATTEMPTS} pictures in "
                            f"a row cannot be read:\n{list_reasons(batch.broken)}"
                        )
                    batches.append(batch)
                yield batches
        finally:
            del results  # or its workers live as long as somebody looks at the traceback

    def _tasks(self, first_step: int) -> Iterator[_Task]:
        for step in count(first_step):
            draw = self.order.draw(step)
            for places in self.micro:
                yield _Task(
                    step,
                    self.buckets[draw.bucket],
                    tuple(places),
                    tuple(
                        (
                            draw.indices[place],
                            *(self.order.substitute(step, place, a) for a in range(1, ATTEMPTS)),
                        )
                        for place in places
                    ),
                )


class BrokenCount:
    """Counts pictures that could not be read, and says when they are too many.

    Too many are more than 1 % of the pictures drawn so far, taken as 1000 at least, or as all there
    are. Several ranks add up their ``broken`` and ``drawn``.

    Args:
        pictures: that the source has.

    Attributes:
        drawn: pictures of all batches so far.
        reasons: why each could not be read, by id.
    """

    def __init__(self, pictures: float) -> None:
        self.pictures, self.drawn = pictures, 0
        self.reasons: dict[str, str] = {}

    @property
    def broken(self) -> int:
        """Different pictures that could not be read."""
        return len(self.reasons)

    def add(self, drawn: int, broken: Mapping[str, str]) -> None:
        """Count pictures that were drawn, and those among them that could not be read."""
        self.drawn += drawn
        self.reasons |= broken

    def over(
        self, broken: int | None = None, drawn: int | None = None, limit: float = MOST_REFUSED
    ) -> bool:
        """Whether they are too many.

        Args:
            broken: of all ranks; None for one's own.
            drawn: likewise.
            limit: share that may be broken.
        """
        broken = self.broken if broken is None else broken
        drawn = self.drawn if drawn is None else drawn
        return broken > limit * max(drawn, min(self.pictures, FEW))

    def message(self, broken: int | None = None, drawn: int | None = None) -> str:
        """What to say when they are too many; the first of one's own are listed."""
        broken = self.broken if broken is None else broken
        drawn = self.drawn if drawn is None else drawn
        return (
            f"data must have at most 1 % of pictures that cannot be read, got {broken:,} in "
            f"{drawn:,} drawn; here:\n{list_reasons(self.reasons)}"
        )


def _batch(places: Sequence[int], ids: Sequence[str], size: Sequence[int], **others: Any) -> Batch:
    """A Batch of what a reader returned; some versions of torch pin tuples as lists."""
    height, width = size
    return Batch(places=tuple(places), ids=tuple(ids), size=(height, width), **others)


class _Reader(Dataset):
    """Reads a task; what it returns has the fields of a Batch."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: _Task) -> dict[str, Any]:
        task, broken = index, dict[str, str]()
        read = [self._first_whole(samples, task.size, broken) for samples in task.samples]
        found = [pair for pair in read if pair is not None]
        whole = len(found) == len(read)
        names = found[0][1] if whole else ()
        return {
            "step": task.step,
            "places": task.places,
            "ids": tuple(name for name, _ in found),
            "tensors": {key: torch.stack([sample[key] for _, sample in found]) for key in names},
            "size": task.size,
            "broken": broken,
        }

    def _first_whole(
        self, samples: tuple[int, ...], size: Size, broken: dict[str, str]
    ) -> tuple[str, dict[str, torch.Tensor]] | None:
        for index in samples:
            name = self.source.ids(index)
            try:
                return name, self.source.read(index, size)
            except (OSError, ValueError) as error:
                broken[name] = str(error)
        return None


@contextmanager
def _signals_as_they_were() -> Generator[None, None, None]:
    """Without the handler by which torch raises at whatever line a rank is when a worker dies.

    It would cut a checkpoint in two. Waiting for the next batch, torch looks for the dead anyway.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    yield
    if handler is not None and current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, handler)


def _as_it_is(result: Any) -> Any:
    return result


def _settle(worker: int) -> None:
    """Let a worker outlive signals that are meant for its rank, and never the rank itself."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_RANK)
    Thread(target=_obey, args=(rank.pid,), daemon=True).start()
    Thread(target=_follow, args=(rank,), daemon=True).start()


def _obey(rank: int) -> None:
    while signal.sigwaitinfo(OF_THE_RANK).si_pid != rank:
        pass
    os._exit(0)


def _follow(rank: BaseProcess) -> None:
    rank.join()
    os._exit(1)
