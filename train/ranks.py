"""The processes of a run: torchrun's, or this one alone."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def open_ranks(timeout_s: float) -> Generator[Ranks, None, None]:
    """The ranks that torchrun started, with a process group; or this process alone.

    Args:
        timeout_s: how long one waits for the others before the run ends.
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
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()
