"""The processes of a run: torchrun's, or this one alone."""

import os
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all of a run.

    Attributes:
        rank: of this process.
        world: how many there are.
        device: that it computes on.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default=torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> list[float]:
        """Sums over all ranks of values [n] float64; all must call it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather(self, thing: Any) -> list[Any]:
        """What each rank gives, in order; all must call it."""
        if self.world == 1:
            return [thing]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, thing)
        return every

    def in_turn(self, act: Callable[[], T]) -> T:
        """What an act gives, which the first rank does alone and the others after it.

        So they find what it has left behind. All must call it; where one fails, all do.

        Raises:
            OSError: the act does.
            ValueError: likewise, or another rank's did.
        """
        made: list[T] = []
        fault: Exception | None = None
        for turn in ("first", "others"):
            if (turn == "first") == self.first:
                try:
                    made.append(act())
                except (OSError, ValueError) as error:
                    fault = error
            # no rank waits for one that has failed
            if any(self.gather(fault is not None)):
                raise fault or ValueError("data could not be read by another rank, which says why")
        return made[0]

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def open_ranks(timeout_s: float) -> Generator[Ranks, None, None]:
    """The ranks that torchrun started, with a process group; or this process alone.

    When something is raised in it by one of several ranks, the process should end by ``leave``.

    Args:
        timeout_s: how long one waits for the others before the run ends.

    Raises:
        RuntimeError: another rank has ended or does not answer.
    """
    on_gpu = torch.cuda.is_available()
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Ranks(device=torch.device("cuda" if on_gpu else "cpu"))
        return
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s)
    )
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), device)
    try:
        yield ranks
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, dist.DistError) and not re.search("gloo|NCCL", text):
            raise
        late = re.search("timed out|timeout", text, re.IGNORECASE)
        why = f"did not answer for timeout_s = {timeout_s:g} s" if late else "has ended: see there"
        raise RuntimeError(
            f"rank {ranks.rank} of {ranks.world} has lost another, which {why} "
            f"({text.partition('. This is')[0]})"
        ) from error
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process now, for others may wait for it.

    The destructors of a group that has lost a rank may wait without an end: they hold Python's
    lock and join threads that want it.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
