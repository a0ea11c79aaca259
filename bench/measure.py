"""Time several variants of one computation fairly.

They take turns at every repetition, in an order that rotates, so clocks and neighbours weigh on
all alike; before each turn a buffer larger than L2 is written. On a GPU a variant is timed by
events, and, where it can be captured, as one replay of a CUDA graph: launches cost it nothing.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]
Step = Callable[[], Results]
"""One call of what is measured; it returns what it computed."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v -> out, all [B, S, H, D]."""

FLUSH_BYTES = 256 << 20
"""Written before each turn: five times the L2 of an H100."""
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment by which to stop.

    Attributes:
        end: in seconds of time.monotonic.
    """

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        """So many seconds from now on."""
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds until then, negative when it has passed."""
        return self.end - time.monotonic()


class Graph:
    """A step as a CUDA graph: calling it replays the captured launches.

    Args:
        step: captured once, after warm-ups.
        pool: memory that graphs share which never run at once, of torch.cuda.graph_pool_handle.

    Raises:
        Exception: whatever the step raises under capture.
    """

    def __init__(self, step: Step, pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._results = step()

    def __call__(self) -> Results:
        """Replay; the results are the same tensors every time."""
        self._graph.replay()
        return self._results

    def fresh(self) -> Results:
        """Replay into results full of NaN, so that what it does not write shows."""
        for result in self._results:
            result.fill_(float("nan"))
        return self()


def attention_step(attend: Attend, inputs: Sequence[Tensor], backward: bool) -> Step:
    """Forward to (out,), or forward and backward to (out, dq, dk, dv).

    Args:
        attend: what is measured.
        inputs: q, k, v and the gradient of out.
        backward: take the gradients too.
    """
    q, k, v, d_out = inputs

    def forward() -> Results:
        with torch.no_grad():
            return (attend(q, k, v),)

    def both() -> Results:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, d_out)

    return both if backward else forward


def take_turns(
    steps: Mapping[str, Callable[[], object]],
    device: torch.device,
    reps: int,
    deadline: Deadline | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of every repetition of each step, after warm-ups.

    Args:
        steps: what to time, by name.
        device: CUDA events are used on a GPU, the clock of the process elsewhere.
        reps: turns of each step.
        deadline: no repetition is begun after it, but for the first.
    """
    names = list(steps)
    if not names:
        return {}
    for name in names:
        for _ in range(WARM_UPS if device.type == "cuda" else 1):
            steps[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    turn = _gpu_turn(device) if device.type == "cuda" else _cpu_turn
    for rep in range(reps):
        if rep and deadline is not None and deadline.left() <= 0:
            break
        first = rep % len(names)
        order = names[first:] + names[:first]
        for name, ms in zip(order, turn([steps[name] for name in order]), strict=True):
            times[name].append(ms)
    return times


def _cpu_turn(steps: Sequence[Callable[[], object]]) -> list[float]:
    times = []
    for step in steps:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _gpu_turn(device: torch.device) -> Callable[[Sequence[Callable[[], object]]], list[float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def turn(steps: Sequence[Callable[[], object]]) -> list[float]:
        spans = []
        for step in steps:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # while it runs the host gets ahead, so the launch is not timed
            flush.zero_()
            begin.record()
            step()
            end.record()
            spans.append((begin, end))
        torch.cuda.synchronize(device)
        return [begin.elapsed_time(end) for begin, end in spans]

    return turn


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile, linear between neighbours.

    Raises:
        ValueError: there are no times.
    """
    if not times:
        raise ValueError("times must hold at least one, got none")
    values = torch.tensor(times, dtype=torch.float64, device="cpu")
    p20, p50, p80 = values.quantile(values.new_tensor([0.2, 0.5, 0.8])).tolist()
    return p20, p50, p80


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """The most memory one call holds above what was allocated before it; None off the GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
