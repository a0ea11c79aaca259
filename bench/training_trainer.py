"""The trainer's own run on random pictures: what it waits for data and for checkpoints.

``python -m train rehearse`` in a process of its own, with every part of the real loop: pictures
read from files, steps through frozen models of random weights, checkpoints, the log; the log is
all that is looked at.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.measure import Deadline
from bench.records import Record
from bench.training_cases import TrainingCase

ROOT = Path(__file__).parent.parent
LOG_EVERY, CHECKPOINT_EVERY, STEPS = 5, 10, 40
SMALL_LOG_EVERY, SMALL_CHECKPOINT_EVERY, SMALL_STEPS = 3, 6, 12
WARM_UP = 2
"""First rows of the log that do not count: caches fill, kernels are compiled."""
PICTURES, SIDE = 128, 1024
"""Files, all different, and pixels to their side: larger than is trained on, as photographs are."""
SMALL_PICTURES, SMALL_SIDE = 16, 96
GRAIN = 12.0
"""Of 255: what makes a JPEG take the bytes, and the time, of a photograph."""
END_S = 15.0
"""Seconds that a process gets to end by itself."""


def write_pictures(folder: Path, number: int, side: int) -> None:
    """Random square JPEGs: soft colours under a grain, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(number):
        soft = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        pixels = np.asarray(soft.resize((side, side), Image.Resampling.BICUBIC), np.float32)
        grain = rng.standard_normal((side, side, 1), np.float32)
        pixels = (pixels + GRAIN * grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)


def settings(case: TrainingCase, data: Path, out: Path) -> dict[str, Any]:
    """Of ``--set``, by key."""
    small = case.flux.model == "tiny"
    log, save, steps = LOG_EVERY, CHECKPOINT_EVERY, STEPS
    if small:
        log, save, steps = SMALL_LOG_EVERY, SMALL_CHECKPOINT_EVERY, SMALL_STEPS
    given = {
        "data": data,
        "out_dir": out,
        "steps": steps,
        "log_every": log,
        "checkpoint_every": save,
        "eval_every": steps,
        "batch_size": case.flux.batch,
        "micro_batch": case.flux.batch,
        "resolution": case.picture[0],
    }
    return given | ({"rehearsal": "small", "workers": 1} if small else {})


def rehearse(case: TrainingCase, device: torch.device, deadline: Deadline) -> Record:
    """The record of a run of the trainer; it says why where there is nothing to record."""
    small = case.flux.model == "tiny"
    record: Record = {
        "suite": "training", "op": "trainer", "kind": case.kind, "case": case.name,
        "variant": "ours-trainer", "label": "**the trainer itself**", "pass": "forward+backward",
        "batch": case.flux.batch, "resolution": case.picture[0], "graph": False,
        "peak_bytes": None, "held_bytes": None, "nvml": None, "error": None, "parts_ms": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch:
        data, out = Path(scratch) / "pictures", Path(scratch) / "runs"
        write_pictures(data, *((SMALL_PICTURES, SMALL_SIDE) if small else (PICTURES, SIDE)))
        given = settings(case, data, out)
        status, reason = run_trainer(given, device, deadline.left())
        rows = read_rows(out)
    found = summary(rows if status == "ok" else [])
    if status == "ok" and found["p50_ms"] is None:
        status = "failed"
        reason = f"its log has {len(rows)} rows, of which the first {WARM_UP} do not count"
    return record | found | {"status": status, "reason": reason}


def summary(rows: Sequence[Record]) -> Record:
    """What the rows of a log say of steps after the first; None for what they do not tell.

    Returns:
        p50_ms (of steps between which no checkpoint was begun, where there are any), reps,
        pictures_per_s, mfu and data_wait (medians), memory_gib (the most), checkpoint_stall_s (the
        longest) and checkpoint_stall_steps.
    """
    rows = list(rows)[WARM_UP:]
    free = [row for row in rows if row.get("checkpoint_stall") is None] or rows
    every = lambda key, some: [row[key] for row in some if row.get(key) is not None]
    middle = lambda key, some: median(found) if (found := every(key, some)) else None
    seconds, longest = middle("seconds", free), max(every("checkpoint_stall", rows), default=None)
    return {
        "reps": len(rows),
        "p50_ms": None if seconds is None else 1e3 * seconds,
        "p20_ms": None,
        "p80_ms": None,
        "pictures_per_s": middle("pictures_per_s", free),
        "mfu": middle("mfu", free),
        "memory_gib": max(every("memory_gib", rows), default=None),
        "data_wait": middle("data_wait", rows),
        "checkpoint_stall_s": longest,
        "checkpoint_stall_steps": None if longest is None or not seconds else longest / seconds,
    }


def read_rows(runs: Path) -> list[Record]:
    """The rows of steps in the logs below a folder of runs, in their order."""
    rows = []
    for log in sorted(runs.glob("*/log.jsonl")):
        for line in log.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows += [row] if "seconds" in row else []
    return rows


def run_trainer(
    given: dict[str, Any], device: torch.device, seconds: float
) -> tuple[str, str | None]:
    """Run the trainer to its end, or to that of the time; no process of it is left.

    Args:
        given: of ``--set``, by key.
        device: it sees no GPU unless this is one.
        seconds: that there are.

    Returns:
        "ok", "failed" or "skipped", as where there was no time, and why.
    """
    command = [sys.executable, "-m", "train", "rehearse"]
    command += [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    hidden = {} if device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    # a group of its own, so that its loader's processes end with it
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | hidden, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        return "skipped", f"it was ended after {seconds:.0f} s: no time was left"
    finally:
        end_group(process)
    last = " ".join(said.split())[-300:]
    if process.returncode:
        return "failed", f"it ended with {process.returncode}: {last}"
    return "ok", None


def end_group(process: subprocess.Popen[str]) -> None:
    """End the group that a process leads, gently first; nothing where it has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_S)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
