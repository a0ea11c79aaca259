"""Runs of ``python -m train`` in processes of their own, forked from one that has all imported."""

import contextlib
import multiprocessing
import os
import re
import socket
import sys
import time
import traceback
from functools import cache
from hashlib import sha256
from multiprocessing import forkserver
from pathlib import Path

# what a run imports on its way, so that a fork finds it done
import torch
import torch.utils.tensorboard
import transformers.models.dinov2.modeling_dinov2  # noqa: F401

from train import lineage, loop, scenes_encoders, view  # noqa: F401
from train.__main__ import app
from train.checkpoint import newest_valid, read_meta, read_state, step_of
from train.report import read_log

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = [__name__, "tests.train_plants"]
PATIENCE_S = 120
"""After which a process that should have ended is given up."""


@cache
def serve():
    """Let the one fork server of this process be ours; what others preload is of no use here."""
    forkserver._forkserver._stop()
    CONTEXT.set_forkserver_preload(PRELOAD)


class Run:
    """``python -m train scenes-dino`` with some settings, on one rank or several.

    Args:
        folder: of the run is folder/scenes-dino; outputs go to folder.
        settings: key=value.
        world: number of ranks.
        plants: of tests.train_plants, for all ranks, or a list for each.
        arguments: of the command line instead, whole.
    """

    def __init__(self, folder, *settings, world=1, plants=(), arguments=None):
        serve()
        self.folder = Path(folder)
        self.run_folder = self.folder / "scenes-dino"
        if arguments is None:
            arguments = ["scenes-dino"]
            for setting in (*BASE, f"out_dir={folder}", *settings):
                arguments += ["--set", setting]
        plants = plants if isinstance(plants, list) else [plants] * world
        self.folder.mkdir(parents=True, exist_ok=True)
        port, number = free_port(), len(list(self.folder.glob("out-*-0.txt")))
        self.outputs = [self.folder / f"out-{number}-{rank}.txt" for rank in range(world)]
        self.ranks = []
        for rank in range(world):
            environment = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            about = environment if world > 1 else {}
            told = (list(map(str, arguments)), about, self.outputs[rank], plants[rank])
            self.ranks.append(CONTEXT.Process(target=_main, args=told, daemon=True))
            self.ranks[-1].start()

    def wait(self):
        """Until all ranks have ended: their exit codes."""
        for process in self.ranks:
            process.join(PATIENCE_S)
            if process.exitcode is None:
                self.kill()
                raise TimeoutError(f"a rank did not end:\n{self.said()}")
        return [process.exitcode for process in self.ranks]

    def kill(self):
        """End all ranks with SIGKILL."""
        for process in self.ranks:
            process.kill()
            process.join()

    def said(self, rank=None):
        """What a rank wrote, or all."""
        files = self.outputs if rank is None else [self.outputs[rank]]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def until(self, happened, pause=0.005):
        """Watch until happened() is true or a rank has ended; return what it returned."""
        end = time.monotonic() + PATIENCE_S
        while True:
            if found := happened():
                return found
            if any(process.exitcode is not None for process in self.ranks):
                return happened()
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"a run did not come so far:\n{self.said()}")
            time.sleep(pause)

    def until_saved(self, step, pause=0.005):
        """Watch until a checkpoint of that step or a later one is there."""
        self.until(lambda: max(steps_there(self.run_folder), default=0) >= step, pause)

    def until_logged(self, step):
        """Watch until the log has that step."""
        self.until(lambda: last_step(self.run_folder) >= step)


BASE = (
    "steps=8", "batch_size=4", "warmup_steps=1", "log_every=1", "checkpoint_every=1",
    "precision=fp32", "muon_lr=0", "keep=2", "eval_every=1000",
)  # fmt: skip


def run(folder, *settings, **options):
    """Run to the end: the Run, and the exit codes of its ranks."""
    started = Run(folder, *settings, **options)
    return started, started.wait()


def finished(folder, *settings, **options):
    """Run to an end that must be good; the run's folder."""
    started, codes = run(folder, *settings, **options)
    assert codes == [0] * len(codes), started.said()
    return Path(folder) / "scenes-dino"


def _main(arguments, environment, output, plants):
    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in environment.items()}
    if environment:
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    with output.open("wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    # it takes most of the time of so short a run, and has tests of its own
    view.plot_run = lambda folder: None
    try:
        with contextlib.ExitStack() as stack:
            for plant in plants:
                if opened := plant():
                    stack.enter_context(opened)
            app(arguments)
    except SystemExit as ended:
        sys.exit(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.exit(99)


def free_port():
    """A TCP port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def newest(run_folder, warn=lambda _: None):
    """The newest whole checkpoint of a run, or None."""
    return newest_valid(run_folder / "checkpoints", warn)


def tensors_of(checkpoint):
    """Weights, average and optimizer memory."""
    return read_state(checkpoint, "")


def losses_of(run_folder):
    """What the log says of each step, but for times."""
    kept = ("loss", "masked", "visible", "grad_norm", "lr", "skipped")
    return {
        step: {name: row[name] for name in kept if name in row}
        for step, row in read_log(run_folder).items()
    }


def last_step(run_folder):
    """The last step that the log has come to; 0 if there is none yet."""
    log = run_folder / "log.jsonl"
    lines = log.read_bytes() if log.exists() else b""
    return max(map(int, re.findall(rb'^{"step": (\d+),.*}$', lines, re.MULTILINE)), default=0)


def assert_equal_runs(run_folder, other):
    """Both end with the same bits: weights, average, optimizer memory; the same losses on the way.

    And the same best.
    """
    ours, theirs = newest(run_folder), newest(other)
    assert ours.name == theirs.name
    a, b = tensors_of(ours), tensors_of(theirs)
    assert a.keys() == b.keys()
    assert len(a) > 100
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
    assert losses_of(run_folder) == losses_of(other)
    kept = ("step", "skipped", "in_row", "best")
    metas = [{name: read_meta(path)[name] for name in kept} for path in (ours, theirs)]
    assert metas[0] == metas[1]


def tree_of(folder):
    """What lies below a folder: digests by name."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def steps_there(run_folder):
    """Steps of all that bears the name of a checkpoint, in order."""
    return sorted(map(step_of, (run_folder / "checkpoints").glob("step-*")))
