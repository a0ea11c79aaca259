"""Checkpoints: a new folder each, written beside the training, valid by a last rename.

``checkpoints/step-NNNNNN`` holds safetensors (which ``torch.distributed.checkpoint`` reads too),
``meta.json`` and ``SHA256SUMS``; until it is whole it is ``.part-step-NNNNNN``.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sda_fast.files import MANIFEST, check_manifest, sync, write_manifest, write_whole

META, BEST, STATE = "meta.json", "best.json", "state.safetensors"
PART, OLD = ".part-", ".old-"
"""Before the name of a checkpoint that is not whole yet, or about to be removed."""


class Saver:
    """Writes checkpoints in a thread; training waits only while tensors are copied.

    Args:
        folder: of the checkpoints; made at the first save.
        keep: how many stay, beside the best one.
        since: the step that the run goes on from; later ones that are there are not of its past.
    """

    def __init__(self, folder: Path, keep: int, since: int = 0) -> None:
        self.folder, self.keep, self.since = folder, keep, since
        self._own: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._staged: dict[str, Tensor] = {}
        self._last = time.monotonic()

    def due(self, minutes: float) -> bool:
        """Whether the last save began that long ago."""
        return time.monotonic() - self._last > 60 * minutes

    def save(
        self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], wait: bool = False
    ) -> float:
        """Copy the tensors, then write ``folder/step-NNNNNN`` and remove what need not stay.

        Args:
            step: that is finished.
            tensors: by name, on any device.
            meta: JSON; "best", if it is there, holds the "step" of a checkpoint that stays.
            wait: until it is written.

        Returns:
            Seconds that the caller waited.

        Raises:
            OSError: wait is set and this or an earlier one could not be written; what was there is
                as it was.
        """
        start = time.monotonic()
        if self._written is not None:
            futures.wait([self._written])
        if self.failed() and not wait:
            return time.monotonic() - start  # to be told to all ranks, see failed
        self.finish()
        self._stage(tensors)
        self._last = time.monotonic()
        about = {**meta, "step": step}
        self._written = self._thread.submit(self._write, about)
        if wait:
            self.finish()
        return time.monotonic() - start

    def failed(self) -> bool:
        """Whether the save in the background is known to have failed."""
        written = self._written
        return written is not None and written.done() and written.exception() is not None

    def finish(self) -> None:
        """Wait for what is being written.

        Raises:
            OSError: it could not be.
        """
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def __enter__(self) -> "Saver":
        for prefix in (PART, OLD):
            for torn in self.folder.glob(f"{prefix}*"):
                shutil.rmtree(torn, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown(wait=True)

    def _stage(self, tensors: Mapping[str, Tensor]) -> None:
        """A copy in host memory, pinned where that is faster; the room is used again."""
        for name, t in tensors.items():
            t = t.detach()
            room = self._staged.get(name)
            if room is None or room.shape != t.shape or room.dtype != t.dtype:
                room = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._staged[name] = room.copy_(t, non_blocking=True)
        for name in self._staged.keys() - tensors.keys():
            del self._staged[name]
        if any(t.is_cuda for t in tensors.values()):
            torch.cuda.synchronize()

    def _write(self, meta: Mapping[str, Any]) -> None:
        write_checkpoint(self.folder, self._staged, meta)
        step, best = meta["step"], meta.get("best")
        self._own.add(step)
        note_best(self.folder, meta)
        past = [path for path in checkpoints_of(self.folder) if step_of(path) <= step]
        # one that was passed over when the run went on is no longer of use, nor counts
        own = [p for p in past if step_of(p) <= self.since or step_of(p) in self._own]
        stay = {step_of(path) for path in own[-self.keep :]} | {best["step"] if best else step}
        for path in past:
            if step_of(path) not in stay:
                _remove(path)


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Path:
    """Write ``folder/step-NNNNNN`` whole; meta holds the step.

    Raises:
        OSError: it cannot be written.
    """
    target = folder / f"step-{meta['step']:06d}"
    part = folder / f"{PART}{target.name}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with writing(target):
            part.mkdir(parents=True)
            # torch.distributed.checkpoint would hold the interpreter while it serialises
            save_file(dict(tensors), part / STATE)
            (part / META).write_text(json.dumps(meta) + "\n", encoding="utf-8")
            write_manifest(part)
            for file in (*part.iterdir(), part):
                sync(file)
            # a checkpoint of the same step is this one, from before a resume
            if target.exists():
                _remove(target)
            os.replace(part, target)
            sync(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def note_best(folder: Path, meta: Mapping[str, Any]) -> None:
    """Let ``folder/best.json`` say what a checkpoint knows of the best one.

    Raises:
        OSError: it cannot be written.
    """
    path, best = folder / BEST, meta.get("best")
    text = json.dumps(best) + "\n"
    if best is not None and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        with writing(path):
            write_whole(path, text)


def checkpoints_of(folder: Path) -> list[Path]:
    """Whatever bears the name of a checkpoint below folder, which need not be there; by step."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def newest_valid(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint below folder, or None.

    Args:
        folder: of checkpoints; it need not be there.
        warn: is told of every newer one that is not whole, and of what only looks like one.
    """
    for path in sorted(folder.glob("step-*")):
        if step_of(path) < 0:
            warn(f"{path} is passed over: no checkpoint is named so")
    for path in reversed(checkpoints_of(folder)):
        try:
            check_checkpoint(path)
        except (OSError, ValueError) as error:
            warn(f"{path} is passed over: {error}")
        else:
            return path
    return None


def check_checkpoint(path: Path) -> None:
    """See that a checkpoint is whole, bit for bit.

    Raises:
        OSError: something is missing.
        ValueError: something differs from its manifest.
    """
    check_manifest(path)
    lines = (path / MANIFEST).read_text(encoding="utf-8").splitlines()
    listed = {line.partition("  ")[2] for line in lines}
    # a manifest may have lost its last lines
    there = {META, *(file.name for file in path.glob("*.safetensors"))}
    if len(there) < 2 or not there <= listed:
        missing = ", ".join(sorted(there - listed)) or "no state"
        raise ValueError(f"{path / MANIFEST} is torn: it should name {missing}")


def read_meta(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: "step", and what the run wrote."""
    return json.loads((path / META).read_text(encoding="utf-8"))


def read_state(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with prefix, without it, on the CPU."""
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dict
                if name.startswith(prefix):
                    found[name.removeprefix(prefix)] = tensors.get_tensor(name)
    return found


def step_of(path: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 if it is no such name."""
    digits = path.name.removeprefix("step-")
    step = int(digits) if digits.isdecimal() else -1
    return step if path.name == f"step-{step:06d}" else -1


@contextmanager
def writing(target: Path) -> Generator[None, None, None]:
    """While open, what cannot be written is an OSError that names target and the reason."""
    try:
        yield
    except SafetensorError as error:  # it names the system's error in words alone
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise OSError(f"{target} could not be written: {error}") from error
        number = int(found[1])
        reason = os.strerror(number)
        raise OSError(number, f"{target} could not be written: {reason}") from error
    except OSError as error:
        raise OSError(error.errno, f"{target} could not be written: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _remove(path: Path) -> None:
    # at once, so that nobody finds half of it
    gone = path.with_name(f"{OLD}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
