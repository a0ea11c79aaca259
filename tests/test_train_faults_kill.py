import random
import signal
import time

import pytest

from tests.train_plants import Loud
from tests.train_processes import (
    Run,
    assert_equal_runs,
    finished,
    last_step,
    newest,
    steps_there,
)
from train.checkpoint import step_of

STEPS = "steps=48"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happens to, and that saves at its end only."""
    folder = tmp_path_factory.mktemp("unbroken")
    return finished(folder, STEPS, "checkpoint_every=48", plants=(Loud(),))


def whole(run_folder):
    """The newest checkpoint's step, 0 if there is none; nothing else may bear such a name."""
    found = newest(run_folder, pytest.fail)
    return 0 if found is None else step_of(found)


def parts(run_folder, file=""):
    return list((run_folder / "checkpoints").glob(f".part-*/{file}".rstrip("/")))


# as a run starts; anywhere after its first save; as a save has come so far; right after one
MOMENTS = ["start"] * 3 + ["any"] * 5 + ["named"] * 4
MOMENTS += ["", "*.safetensors", "meta.json", "SHA256SUMS"] * 2


def wait_for(moment, run, before, rng):
    """Wait for the moment to kill a run at, which begins at the checkpoint of step before."""
    if moment == "start":
        time.sleep(rng.uniform(0.05, 0.5))
        return
    run.until_saved(before + 1)
    if moment == "any":
        time.sleep(rng.uniform(0, 0.2))
    elif moment == "named":
        run.until_saved(before + 2, pause=0)
    else:
        run.until(lambda: parts(run.run_folder, moment), pause=0)
        time.sleep(rng.uniform(0, 0.01))


def test_a_run_killed_at_twenty_moments_ends_like_an_unbroken_one(unbroken, tmp_path):
    folder, rng = tmp_path / "scenes-dino", random.Random(0)
    moments = rng.sample(MOMENTS, len(MOMENTS))
    inside = 0
    for moment in moments:
        before = whole(folder)
        run = Run(tmp_path, STEPS, plants=(Loud(),))
        wait_for(moment, run, before, rng)
        assert run.ranks[0].exitcode is None, f"it was over before it was killed:\n{run.said()}"
        run.kill()
        assert run.wait() == [-signal.SIGKILL]
        inside += bool(parts(folder))
        after = whole(folder)
        # every start gains something, and what is lost was never in a whole checkpoint: a step for
        # checkpoint_every, and one that was taken while the last one was being written
        assert after >= before + (moment != "start")
        assert last_step(folder) - after <= 2
    assert inside >= 5
    assert finished(tmp_path, STEPS, plants=(Loud(),)) == folder
    assert_equal_runs(folder, unbroken)
    assert not parts(folder)
    assert steps_there(folder) == [47, 48]
