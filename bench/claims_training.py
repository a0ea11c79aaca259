"""Adapters trained for the claims: ``python -m train scenes-adapter``, some at a time."""

import math
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from bench.measure import Deadline
from bench.training_trainer import ROOT, end_group
from sda_fast.encoders import ImageEncoder
from sda_fast.files import moved_in_when_whole

TRAINED: dict[str, dict[str, str]] = {
    "base": {},
    "positions_64": {"tokens_per_node": "16,4,2"},
    "positions_128": {"tokens_per_node": "32,8,4"},
    "grid_28": {"tokens_per_node": "0,7"},
    "grid_32": {"tokens_per_node": "0,0,2"},
    "no_rope": {"rope": "false"},
    "no_penalty": {"penalty": "0"},
    "clip_alone": {},
}
"""Of ``--set``, what a variant has other than the recipe scenes-adapter."""
BLIND = "clip_alone"
"""The variant whose DINOv2 is blind."""
FEWEST_SCENES = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is trained and measured.

    Attributes:
        steps: of each training.
        batch: pictures of a step.
        seeds: of each variant.
        scenes: unseen ones that an adapter is measured on.
        jobs: trainings at a time.
        denoise: steps of decoding.
    """

    steps: int
    batch: int
    seeds: int = 3
    scenes: int = 128
    jobs: int = 2
    denoise: int = 10

    def scaled(self, budget: float, seeds: int) -> "Plan":
        """Other steps, below 1 fewer scenes too, and so many seeds.

        Raises:
            ValueError: budget is not positive and finite, or seeds below 1.
        """
        if not 0 < budget < float("inf"):
            raise ValueError(f"budget must be positive and finite, got {budget}")
        if seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {seeds}")
        steps = max(1, round(budget * self.steps))
        scenes = max(FEWEST_SCENES, round(min(1.0, budget) * self.scenes))
        return replace(self, steps=steps, scenes=scenes, seeds=seeds)


PLANS = {"cpu": Plan(400, 16), "cuda": Plan(1000, 64, scenes=256, jobs=6)}
"""By the kind of device: for all claims an hour on two cores of a CPU (by the time of a step),
nine minutes on one H100 (by an estimate: none was there to time it on)."""


def blinded(encoder: ImageEncoder) -> ImageEncoder:
    """A copy whose DINOv2 has weights of zero: whatever it sees, its features are zero."""
    blind = deepcopy(encoder)
    for weight in blind.dino.parameters():
        torch.nn.init.zeros_(weight)
    return blind


def save_blind_dino(encoder: ImageEncoder, folder: Path) -> Path:
    """Write the DINOv2 of ``blinded``, unless it is there."""
    if not (folder / "config.json").is_file():
        with moved_in_when_whole(folder, "config.json", lambda name: True) as scratch:
            blinded(encoder).dino.save_pretrained(scratch)
    return folder


class Trainer:
    """Trainings as processes of their own; leaving the context ends those that still run.

    Each saves when it is ended and goes on from there when it is asked for again; one that came to
    its end is not trained again.

    Args:
        plan: of all.
        parts: folders of the frozen models, "flux", "clip" and "dino", and "blind" of the blind
            DINOv2.
        folder: of the runs.
        device: they see no GPU unless this is one.
        deadline: when they are ended.
    """

    def __init__(
        self,
        plan: Plan,
        parts: dict[str, Path],
        folder: Path,
        device: torch.device,
        deadline: Deadline,
    ) -> None:
        self.plan, self.parts, self.folder = plan, parts, folder
        self.device, self.deadline = device, deadline
        self._pool = ThreadPoolExecutor(plan.jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._closed = False

    def train(self, variant: str, seed: int) -> Future[Path]:
        """The folder of a variant's adapter, once it is trained.

        The future raises TimeoutError where the time did not suffice, RuntimeError with the
        trainer's last words where it failed.
        """
        return self._pool.submit(self._train, variant, seed)

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """Of ``--set``, by key."""
        plan = self.plan
        return {
            "name": f"{variant}-{seed}",
            "out_dir": self.folder,
            "seed": seed,
            "steps": plan.steps,
            "batch_size": plan.batch,
            "warmup_steps": min(50, plan.steps),
            # an average as long as the recipe's would be mostly of untrained weights
            "ema_decay": 0.99,
            # on a CPU Muon's products take longer than the step
            "muon_lr": 0,
            "precision": "fp32",
            "log_every": max(1, plan.steps // 20),
            "eval_every": plan.steps,
            "checkpoint_minutes": 3,
            "keep": 1,
            "flux": self.parts["flux"],
            "clip": self.parts["clip"],
            "dino": self.parts["blind" if variant == BLIND else "dino"],
            **TRAINED[variant],
        }

    def _train(self, variant: str, seed: int) -> Path:
        settings = self.settings(variant, seed)
        adapter = self.folder / settings["name"] / "export" / "adapter"
        if (adapter / "config.json").is_file():
            return adapter
        command = [sys.executable, "-m", "train", "scenes-adapter"]
        command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        process = self._start(command)
        try:
            left = self.deadline.left()
            said, _ = process.communicate(timeout=None if math.isinf(left) else max(0.0, left))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{settings['name']} was not trained: no time was left") from None
        finally:
            end_group(process)
            self._running.discard(process)
        if process.returncode:
            last = " ".join(said.split())[-300:]
            raise RuntimeError(f"{settings['name']} ended with {process.returncode}: {last}")
        return adapter

    def _start(self, command: list[str]) -> subprocess.Popen[str]:
        threads = max(1, (os.cpu_count() or 1) // self.plan.jobs)
        told = {"OMP_NUM_THREADS": str(threads)}
        told |= {} if self.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        with self._lock:
            if self._closed or self.deadline.left() <= 0:
                raise TimeoutError("no time was left to train")
            # a group of its own: Ctrl-C reaches it through this process, once
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | told, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self._running.add(process)
            return process

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            running = list(self._running)
        # all at once: each takes a while to save
        for process in running:
            _signal(process)
        self._pool.shutdown(cancel_futures=True)


def _signal(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return
