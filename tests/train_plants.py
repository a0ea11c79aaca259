"""What is planted in a run's process before it begins: faults, real ones where they can be had.

Each is called in that process; what it returns, if anything, is open while the run goes.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import train.scenes_encoders
import train.stage
from sda_fast.weights import digest
from tests.train_processes import steps_there, tree_of
from train.scenes_encoders import DinoStage

REFUSED = 77
"""Exit code of a process that may not have mounts of its own."""
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18


@dataclass
class Told:
    """The process gets a signal while it computes a step."""

    step: int
    number: int = signal.SIGTERM

    def __call__(self):
        def tell(batch):
            if batch.step == self.step:
                os.kill(os.getpid(), self.number)

        _before_losses(tell)


@dataclass
class Noted:
    """A line in a file for each micro-batch that is computed: what it is, and what comes out."""

    file: Path

    def __call__(self):
        own = DinoStage.losses

        def losses(stage, batch):
            found = own(stage, batch)
            if batch.step:
                about = {
                    "step": batch.step,
                    "places": dict(zip(batch.places, batch.ids, strict=True)),
                    "pictures": sha256(batch.tensors["pictures"].numpy().tobytes()).hexdigest(),
                    "losses": {name: value.item() for name, value in found.items()},
                    "weights": digest(stage.trained),
                }
                with self.file.open("a") as lines:
                    lines.write(json.dumps(about) + "\n")
            return found

        DinoStage.losses = losses


@dataclass
class Poisoned:
    """One picture of some steps holds a NaN, whoever draws it."""

    steps: tuple
    place: int

    def __call__(self):
        own = train.stage.scene_batch

        def scene_batch(config, split, step, places):
            batches = own(config, split, step, places)
            for batch in batches:
                if step in self.steps and self.place in batch.places:
                    row = batch.places.index(self.place)
                    batch.tensors["pictures"][row, 0, 3, 5] = float("nan")
            return batches

        train.stage.scene_batch = train.scenes_encoders.scene_batch = scene_batch


@dataclass
class Steep:
    """The loss of one place of a step is finite, its gradient is not."""

    step: int
    place: int

    def __call__(self):
        own = DinoStage.losses

        def losses(stage, batch):
            found = own(stage, batch)
            if batch.step == self.step and self.place in batch.places:
                found["loss"] = found["loss"] + (0 * stage.head.bias.sum()).sqrt()
            return found

        DinoStage.losses = losses


@dataclass
class Loud:
    """Losses are multiplied by a number that torch's own generator draws, as dropout would be."""

    def __call__(self):
        own = DinoStage.losses

        def losses(stage, batch):
            found = own(stage, batch)
            found["loss"] = found["loss"] * (1 + torch.rand(()))
            return found

        DinoStage.losses = losses


@dataclass
class Limited:
    """No file may grow beyond some bytes."""

    size: int

    def __call__(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@dataclass
class SlowDisk:
    """Making the first checkpoint's folder takes until somebody writes to a FIFO."""

    fifo: Path

    def __call__(self):
        own, waited = os.mkdir, []

        def mkdir(path, *arguments, **options):
            own(path, *arguments, **options)
            if ".part-" in str(path) and not waited:
                waited.append(self.fifo.read_bytes())

        os.mkdir = mkdir


@dataclass
class SmallDisk:
    """A folder is on a disk of its own with little room; what is left there goes to a file."""

    folder: Path
    size: int
    found: Path

    @contextmanager
    def __call__(self):
        _own_mounts()
        aside = self.folder.with_name("aside")
        shutil.copytree(self.folder, aside)
        _mount("tmpfs", self.folder, "tmpfs", 0, f"size={self.size}")
        shutil.copytree(aside, self.folder, dirs_exist_ok=True)
        try:
            yield
        finally:
            about = {"steps": steps_there(self.folder.parent), "tree": tree_of(self.folder)}
            self.found.write_text(json.dumps(about))


@dataclass
class Elsewhere:
    """A folder is on a disk of its own, with nothing on it."""

    folder: Path

    def __call__(self):
        _own_mounts()
        _mount("tmpfs", self.folder, "tmpfs", 0, "size=1m")


@dataclass
class ReadOnly:
    """A folder is on a disk that is mounted read-only."""

    folder: Path

    def __call__(self):
        _own_mounts()
        _mount(self.folder, self.folder, None, BIND, None)
        _mount(self.folder, self.folder, None, REMOUNT | BIND | READ_ONLY, None)


@dataclass
class Forbidden:
    """A folder's permissions forbid writing to it, to this process too."""

    folder: Path

    def __call__(self):
        self.folder.chmod(0o555)
        if os.geteuid() == 0:
            # a superuser of nothing
            _checked(_libc().unshare(NEW_USER))


def skip_if_refused(codes):
    """Not every machine lets a process mount something, be it for itself alone."""
    if REFUSED in codes:
        pytest.skip("this machine lets no process have mounts or users of its own")


def _before_losses(act):
    own = DinoStage.losses

    def losses(stage, batch):
        act(batch)
        return own(stage, batch)

    DinoStage.losses = losses


def _own_mounts():
    """What this process mounts, nobody else sees; it ends with REFUSED where it must not."""
    user, group = os.geteuid(), os.getegid()
    _checked(_libc().unshare(NEW_MOUNTS | (NEW_USER if user else 0)))
    if user:
        for name, text in (
            ("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1"),
        ):  # fmt: skip
            Path(f"/proc/self/{name}").write_text(text)
    _mount("none", "/", None, RECURSIVE | PRIVATE, None)


def _mount(source, target, kind, flags, options):
    encoded = [None if part is None else str(part).encode() for part in (source, target, kind)]
    _checked(_libc().mount(*encoded, ctypes.c_ulong(flags), options and options.encode()))


def _libc():
    return ctypes.CDLL(None, use_errno=True)


def _checked(result):
    if result:
        sys.stderr.write(f"refused: {os.strerror(ctypes.get_errno())}\n")
        raise SystemExit(REFUSED)
