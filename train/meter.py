"""What a run's speed is made of: pictures, FLOPs, and the wait for data, between two rows."""

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch

from train.batch import Batch
from train.ranks import Ranks
from train.stage import Stage

ROOF_SIDE, ROOF_TURNS = 8192, 20


class Meter:
    """Measures between two rows of the log.

    Args:
        stage: that counts FLOPs.
        ranks: of the run; this one speaks for all.
    """

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self.stage, self.ranks = stage, ranks
        self.roof = measured_roof(ranks.device)
        self._zero()

    def next(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        """The next step's batches; how long they kept the run waiting counts."""
        start = time.perf_counter()
        found = next(batches)
        self._waited += time.perf_counter() - start
        self._steps += 1
        self._pictures += sum(len(batch.ids) for batch in found)
        self._flops += sum(map(self.stage.flops, found))
        return found

    def row(self) -> dict[str, float]:
        """Numbers since the last row; seconds are of a step."""
        took = time.perf_counter() - self._start
        row = {
            "seconds": took / self._steps,
            "pictures_per_s": self._pictures * self.ranks.world / took,
            "data_wait": self._waited / took,
        }
        if self._flops and self.roof is not None:
            row["mfu"] = self._flops / took / self.roof
        if self.ranks.device.type == "cuda":
            row["memory_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        self._zero()
        return row

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """While open, time is not counted: it is not spent on training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def _zero(self) -> None:
        self._start = time.perf_counter()
        self._waited = self._flops = 0.0
        self._steps = self._pictures = 0


def measured_roof(device: torch.device) -> float | None:
    """FLOP/s of a large bf16 product on this GPU, of random numbers; None on a CPU."""
    if device.type != "cuda":
        return None
    a, b = (torch.randn(ROOF_SIDE, ROOF_SIDE, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(ROOF_TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        times.append((start, end))
    torch.cuda.synchronize(device)
    # the first ones find the clocks still down
    took = sorted(start.elapsed_time(end) for start, end in times[ROOF_TURNS // 2 :])
    return 2 * ROOF_SIDE**3 / (took[len(took) // 2] * 1e-3)
