"""What a rank of ``bench scaling`` does: steps of DDP with its all-reduce on the wire, or without.

The adapter of the scenes recipes learns through a decoder of their size. Its gradient, 4.5 MB, goes
in buckets of half a megabyte, so that there are several.

Here ranks share cores, and loopback is faster than a step's time is steady. So what would be done
by devices and a network is paced by waiting: the backward of each layer of the adapter takes a
while longer, and on a slow link each bucket takes the time that the model gives it. What remains to
be measured is who waits for whom: DDP, its buckets and the order of gradients are the real ones.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from bench.scaling import Job
from sda_fast.adapter import SemanticAdapter
from sda_fast.cost import all_reduce_seconds
from sda_fast.embedding import SemanticEmbedding
from sda_fast.fast_flux import FastFlux
from sda_fast.losses import flow_matching_loss
from sda_fast.scenes.models import PATCH, POOLED, WIDTH, build_flux
from sda_fast.scenes.world import SMALL

BUCKET_MB = 0.5
ADAPTER = {
    "tokens_per_node": (4, 2, 1), "in_features": 2 * WIDTH, "width": 128, "num_layers": 4,
    "num_heads": 4, "out_features": WIDTH, "pooled_features": POOLED,
}  # fmt: skip
WARM_UPS = 3
"""After the first backward DDP makes its buckets anew, in the order gradients come."""
FEW, MANY = 0, 2
"""Steps whose bytes are counted: the difference is of steps alone, not of what surrounds them."""
TIMEOUT_S = 120.0
COUNTERS = Path("/proc/net/dev")


@dataclass(slots=True)
class Times:
    """Milliseconds of a rank, turn by turn.

    Attributes:
        alone: a step without all-reduce.
        backward: of it, the backward.
        ready: of it, when each bucket was, after the backward began.
        step: a step with it, over the slowed link.
        reduce: the all-reduce of all buckets over the slowed link, and nothing else.
        loopback: the same over loopback as it is.
    """

    alone: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    ready: list[list[float]] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    reduce: list[float] = field(default_factory=list)
    loopback: list[float] = field(default_factory=list)


class Paced(torch.autograd.Function):
    """The identity, whose backward takes a while longer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        """x [...], seconds."""
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradient as it came, later."""
        time.sleep(ctx.seconds)
        return grads[0], None


class Link:
    """Carries one bucket after the other, each for at least its time by the model.

    Args:
        ranks: W.
        bytes_per_second: that a rank sends.
    """

    def __init__(self, ranks: int, bytes_per_second: float) -> None:
        self.ranks, self.bytes_per_second = ranks, bytes_per_second
        self._waiting: queue.SimpleQueue[tuple[int, Any, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def send(self, size: int, reduced: Any) -> Any:
        """The future of an all-reduce of so many bytes, held back."""
        arrived: Any = torch.futures.Future()
        self._waiting.put((size, reduced, arrived))
        return arrived

    def close(self) -> None:
        """End the thread when everything was carried."""
        self._waiting.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (item := self._waiting.get()) is not None:
            size, reduced, arrived = item
            end = time.perf_counter() + all_reduce_seconds(size, self.ranks, self.bytes_per_second)
            try:
                value = reduced.wait()
                time.sleep(max(0.0, end - time.perf_counter()))
                arrived.set_result(value)
            except RuntimeError as error:
                arrived.set_exception(error)


class Rank:
    """The models and batch of a rank.

    Args:
        rank: of the process.
        job: of the group.
    """

    def __init__(self, rank: int, job: Job) -> None:
        torch.manual_seed(0)
        self.job = job
        self.adapter: Any = SemanticAdapter(**ADAPTER)
        for layer in self.adapter.qformer.layers:
            layer.register_forward_pre_hook(self._pace)
        transformer = build_flux(SMALL).transformer.requires_grad_(False)
        self.decoder = FastFlux(transformer, self.adapter.tree)
        generator = torch.Generator().manual_seed(rank)
        side, draw = SMALL.size // PATCH, {"generator": generator}
        shape = job.pictures, side * side
        self.grid = side, side
        self.features = torch.randn(*shape, ADAPTER["in_features"], **draw)  # pyrefly: ignore
        self.x0 = torch.randn(*shape, transformer.config.in_channels, **draw)  # pyrefly: ignore
        self.noise = torch.randn(self.x0.shape, generator=generator)
        self.t = torch.rand(job.pictures, generator=generator)
        self.ddp = DistributedDataParallel(
            self.adapter, bucket_cap_mb=BUCKET_MB, gradient_as_bucket_view=True
        )
        self.ddp.register_comm_hook(None, self._hook)
        self.send: Callable[[Any], Any] = _reduced
        self.buckets: list[int] = []
        self.ready: list[float] = []
        self.began = 0.0

    def _pace(self, _layer: Any, inputs: tuple) -> tuple:
        return Paced.apply(inputs[0], self.job.layer_s), *inputs[1:]

    def _hook(self, _state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self.ready.append(1e3 * (time.perf_counter() - self.began))
        self.buckets.append(bucket.buffer().nbytes)
        return self.send(bucket)

    def step(self, send: Callable[[Any], Any]) -> tuple[float, float]:
        """Milliseconds of a step whose buckets go by ``send``, and of its backward."""
        self.send, self.buckets, self.ready = send, [], []
        self.ddp.zero_grad()
        start = time.perf_counter()
        tokens = self.ddp(self.features, self.grid)
        loss = flow_matching_loss(
            lambda x_t, t: self.decoder.velocity(x_t, t, self._embedding(tokens), grid=self.grid),
            self.x0, self.t, self.noise,
        )  # fmt: skip
        self.began = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        return 1e3 * (end - start), 1e3 * (end - self.began)

    def _embedding(self, tokens: Tensor) -> SemanticEmbedding:
        pooled = self.adapter.pooled.expand(len(tokens), -1)
        return SemanticEmbedding(tokens, self.adapter.tree, pooled)

    def gradient(self) -> Tensor:
        """Of all parameters, in a row."""
        return torch.cat([p.grad.flatten() for p in self.adapter.parameters()])


def rank_main(rank: int, job: Job) -> None:
    """The life of a rank; rank 0 writes what all found."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{job.folder / 'rendezvous'}", rank=rank, world_size=job.ranks,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    try:
        mine = Rank(rank, job)
        for _ in range(WARM_UPS):
            mine.step(_reduced)
        off = error_of_mean(mine)
        link = Link(job.ranks, job.link_speed(sum(mine.buckets)))
        times = take_turns(mine, link)
        link.close()
        sent = bytes_a_step(mine)
        every: list[Any] = [None] * job.ranks
        dist.all_gather_object(every, asdict(times))
        if rank == 0:
            found = {"times": every, "buckets": mine.buckets, "sent": sent, "error": off}
            job.found.write_text(json.dumps(found | {"bytes_per_second": link.bytes_per_second}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def error_of_mean(mine: Rank) -> float:
    """How far DDP's gradient is from the mean of the ranks' own, over its norm."""
    mine.step(_kept)
    mean = mine.gradient().clone()
    dist.all_reduce(mean)
    mean /= mine.job.ranks
    mine.step(_reduced)
    return ((mine.gradient() - mean).norm() / mean.norm()).item()


def take_turns(mine: Rank, link: Link) -> Times:
    """Every kind of step in turn, all ranks at once."""
    times = Times()
    buffers = [torch.randn(size // 4) for size in mine.buckets]
    over_link = lambda bucket: link.send(bucket.buffer().nbytes, _reduced(bucket))
    for _ in range(mine.job.reps):
        dist.barrier()
        whole, backward = mine.step(_kept)
        times.alone.append(whole)
        times.backward.append(backward)
        times.ready.append(mine.ready)
        dist.barrier()
        times.step.append(mine.step(over_link)[0])
        dist.barrier()
        times.reduce.append(_reduce_all(buffers, lambda b: link.send(b.nbytes, _sum(b))))
        dist.barrier()
        times.loopback.append(_reduce_all(buffers, _sum))
    return times


def bytes_a_step(mine: Rank) -> float | None:
    """Bytes that all ranks together sent on loopback for one step; None where none are counted."""
    if sent_on_loopback() is None:
        return None
    few, many = (min(_count(mine, n) for _ in range(mine.job.counts)) for n in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def _count(mine: Rank, steps: int) -> int:
    dist.barrier()
    before = sent_on_loopback()
    dist.barrier()
    for _ in range(steps):
        mine.step(_reduced)
    dist.barrier()
    return (sent_on_loopback() or 0) - (before or 0)


def sent_on_loopback(counters: Path = COUNTERS) -> int | None:
    """Bytes sent on the interface "lo" since it is there; None where the system does not tell."""
    try:
        lines = counters.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == "lo":
            return int(numbers.split()[8])
    return None


def _reduce_all(buffers: list[Tensor], send: Callable[[Tensor], Any]) -> float:
    """Milliseconds until all buckets are back that set out together."""
    start = time.perf_counter()
    for arrived in [send(buffer) for buffer in buffers]:
        arrived.wait()
    return 1e3 * (time.perf_counter() - start)


def _sum(buffer: Tensor) -> Any:
    work: Any = dist.all_reduce(buffer, async_op=True)
    return work.get_future()


def _reduced(bucket: Any) -> Any:
    """As DDP does it by itself."""
    return allreduce_hook(dist.group.WORLD, bucket)  # pyrefly: ignore


def _kept(bucket: Any) -> Any:
    """Each rank keeps its own gradient."""
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
