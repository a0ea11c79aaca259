"""Ranks on the CPU: bytes sent a step, and how much of the all-reduce hides behind the backward.

``python -m bench scaling`` starts 1, 2 and 4 processes that train a scenes-sized adapter by gloo,
and holds both against the model that ``python -m train plan`` goes by. No GPU is used.
"""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.multiprocessing
import typer
from torch.multiprocessing.spawn import ProcessException

from bench.circumstances import circumstances
from bench.command import results_folder
from bench.measure import Deadline
from bench.records import Record, append_record
from sda_fast.cost import all_reduce_bytes, all_reduce_seconds

RANKS, SMALL_RANKS = "1,2,4", "1,2"
SMALL_REPS = 3
MOST_RANKS = 64
EXACT = 1e-4
"""Largest error of DDP's gradient over its norm: sums in float32 in another order."""
PRELOAD = "bench.scaling_ranks"


@dataclass(frozen=True, slots=True)
class Job:
    """What the ranks of a group are to do.

    Attributes:
        ranks: W.
        folder: of the rendezvous, and of what rank 0 found.
        reps: turns of each kind of step.
        counts: of bytes; the least counts, as others may use the interface, too.
        pictures: of a rank's batch.
        layer_s: seconds by which the backward of each layer of the adapter is longer.
        link_s: seconds that the slow link takes for the gradient.
    """

    ranks: int
    folder: Path
    reps: int
    counts: int = 5
    pictures: int = 1
    layer_s: float = 0.1
    link_s: float = 0.4

    @property
    def found(self) -> Path:
        """The file that rank 0 writes."""
        return self.folder / "found.json"

    def link_speed(self, size: int) -> float:
        """Bytes a second that a rank sends on the slow link, for a gradient of so many bytes."""
        return all_reduce_bytes(size, max(2, self.ranks)) / self.link_s


def main(
    ranks: Annotated[str | None, typer.Option(help="Numbers of ranks, as 1,2,4.")] = None,
    reps: Annotated[int, typer.Option(min=1, help="Turns of each kind of step.")] = 20,
    limit_s: Annotated[float, typer.Option(help="Stop after so many seconds.")] = 540.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder; records are appended to scaling.jsonl in it.")
    ] = None,
    small: Annotated[bool, typer.Option(help="Few ranks and turns, to go through it.")] = False,
    commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
) -> None:
    """Run DDP over gloo on the CPU; one record a number of ranks."""
    deadline = Deadline.after(limit_s)
    try:
        numbers = read_ranks(ranks or (SMALL_RANKS if small else RANKS))
    except ValueError as error:
        print(f"bench scaling: {error}")
        raise typer.Exit(2) from error
    about = circumstances(torch.device("cpu")) | {"cores": os.cpu_count()}
    if commit and about["commit"] == "unknown":
        about["commit"] = commit
    file, failed = results_folder(out, small) / "scaling.jsonl", False
    for number in numbers:
        record = measure(number, reps, deadline, small) | about
        append_record(file, record)
        failed |= record["status"] != "ok"
        print(_line(record), flush=True)
    print(f"{len(numbers)} records in {file}")
    if failed:
        raise typer.Exit(1)


def read_ranks(text: str) -> list[int]:
    """Numbers of ranks of a list like ``1,2,4``, each once.

    Raises:
        ValueError: a part is no whole number from 1 to MOST_RANKS.
    """
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(1 <= number <= MOST_RANKS for number in found):
        raise ValueError(f"ranks must be numbers from 1 to {MOST_RANKS} as 1,2,4, got {text!r}")
    return list(dict.fromkeys(found))


def measure(ranks: int, reps: int, deadline: Deadline, small: bool = False) -> Record:
    """Run a group of ranks, small in short; its record says why where it came to no end."""
    record: Record = {
        "suite": "scaling", "op": "ddp", "case": f"ranks-{ranks}", "variant": "ddp",
        "label": "DDP, gloo, CPU", "pass": "forward+backward", "ranks": ranks,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        job = Job(ranks, Path(folder), reps)
        if small:
            short = {"layer_s": 0.01, "link_s": 0.04}
            job = replace(job, reps=min(reps, SMALL_REPS), counts=1, **short)
        try:
            found = _run(job, deadline)
        except (RuntimeError, OSError, ProcessException) as error:
            failed = {"status": "failed", "reason": " ".join(str(error).split())[-400:]}
            return record | failed | {"p50_ms": None}
    summed = summary(ranks, found)
    wrong = not summed["error"] <= EXACT  # NaN is
    reason = f"wrong: the gradient is off by {summed['error']:.1e} of its norm" if wrong else None
    about = {
        "reps": job.reps,
        "pictures": job.pictures,
        "layer_ms": 1e3 * job.layer_s,
        "link_ms": 1e3 * job.link_s,
        "reason": reason,
    }
    return record | about | summed | {"status": "failed" if wrong else "ok"}


def _run(job: Job, deadline: Deadline) -> dict[str, Any]:
    """What rank 0 wrote.

    Raises:
        TimeoutError: the deadline came first; no rank is left.
        ProcessException: a rank failed; no rank is left.
    """
    # imports are done once, ranks are forked from there
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOAD])
    group: Any = torch.multiprocessing.start_processes(
        start_rank, args=(job,), nprocs=job.ranks, join=False, start_method="forkserver"
    )
    try:
        while not group.join(timeout=1.0):
            if deadline.left() <= 0:
                raise TimeoutError(f"{job.ranks} ranks did not come to an end in time")
    finally:
        for process in group.processes:
            if process.is_alive():
                process.kill()
            process.join()
    return json.loads(job.found.read_text())


def start_rank(rank: int, job: Job) -> None:
    """What a process of a group does; what it imports, the one that starts it needs not."""
    from bench.scaling_ranks import rank_main

    rank_main(rank, job)


def summary(ranks: int, found: dict[str, Any]) -> Record:
    """What a group's times and bytes say, beside the model.

    Args:
        ranks: W.
        found: of rank 0: "times" of every rank, "buckets" in bytes, "sent", "error" and
            "bytes_per_second".

    Returns:
        Times in ms, medians of the slowest rank of each turn; "sent_bytes" of all ranks in a step,
        None where not counted; "overlap" is what part of the all-reduce a step hides.
    """
    times, buckets, speed = found["times"], found["buckets"], found["bytes_per_second"]
    alone, step, reduce, loopback, backward = (
        slowest([mine[name] for mine in times])
        for name in ("alone", "step", "reduce", "loopback", "backward")
    )
    of_buckets = zip(*([mine["ready"] for mine in times]), strict=True)
    turns = [[max(bucket) for bucket in zip(*turn, strict=True)] for turn in of_buckets]
    ready = [median(bucket) for bucket in zip(*turns, strict=True)]
    carried = [1e3 * all_reduce_seconds(size, ranks, speed) for size in buckets]
    exposed = exposed_ms(ready, carried, backward)
    several = ranks > 1
    return {
        "p50_ms": step,
        "alone_ms": alone,
        "backward_ms": backward,
        "reduce_ms": reduce,
        "loopback_ms": loopback,
        "rank_alone_ms": [median(mine["alone"]) for mine in times],
        "rank_step_ms": [median(mine["step"]) for mine in times],
        "ready_ms": ready,
        "bucket_bytes": buckets,
        "gradient_bytes": sum(buckets),
        "sent_bytes": found["sent"],
        "sent_model": ranks * all_reduce_bytes(sum(buckets), ranks),
        "link_bytes_per_s": speed if several else None,
        "overlap": (alone + reduce - step) / reduce if several else None,
        "overlap_model": 1 - exposed / sum(carried) if several else None,
        "error": found["error"],
    }


def slowest(of_ranks: Sequence[Sequence[float]]) -> float:
    """Median over turns of the slowest rank's time."""
    return median(max(turn) for turn in zip(*of_ranks, strict=True))


def exposed_ms(ready: Sequence[float], carried: Sequence[float], backward: float) -> float:
    """Time of an all-reduce that is left when the backward has ended, if nothing else slows either.

    Buckets go one after the other, each as soon as it is ready and the link is free.

    Args:
        ready: when each bucket is, after the backward began.
        carried: how long the link takes for each.
        backward: how long the backward takes.
    """
    free = 0.0
    for at, took in zip(ready, carried, strict=True):
        free = max(free, at) + took
    return max(0.0, free - backward)


def _line(record: Record) -> str:
    if record["p50_ms"] is None:
        return f"{record['case']}: {record['status']}: {record['reason']}"
    sent, model = record["sent_bytes"], record["sent_model"]
    told = "bytes not available" if sent is None else f"{sent / 1e6:.3f} MB sent"
    hidden = record["overlap"]
    part = "" if hidden is None else f", hidden {hidden:.2f} (model {record['overlap_model']:.2f})"
    return (
        f"{record['case']}: {record['p50_ms']:.1f} ms, alone {record['alone_ms']:.1f}, "
        f"{told} (model {model / 1e6:.3f}){part}"
    )
