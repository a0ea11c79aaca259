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

STEPS = "steps=64"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that nothing happens to, and that saves at its end only."""
    folder = tmp_path_factory.mktemp("unbroken")
    return finished(folder, STEPS, "checkpoint_every=64", plants=(Loud(),))


def whole(run_folder):
    """The newest checkpoint's step, 0 if there is none; nothing else may bear such a name."""
    found = newest(run_folder, pytest.fail)
    return 0 if found is None else step_of(found)


def parts(run_folder):
    return list((run_folder / "checkpoints").glob(".part-*"))


def test_a_run_killed_at_twenty_moments_ends_like_an_unbroken_one(unbroken, tmp_path):
    folder, rng = tmp_path / "scenes-dino", random.Random(0)
    # as it starts, between saves or in one, and in a save for certain
    moments = ["start"] * 3 + ["any"] * 8 + ["save"] * 9
    rng.shuffle(moments)
    inside = 0
    for moment in moments:
        before = whole(folder)
        run = Run(tmp_path, STEPS, plants=(Loud(),))
        if moment == "start":
            time.sleep(rng.uniform(0.05, 0.5))
        else:
            run.until_saved(before + 1)
            if moment == "save":
                run.until(lambda: parts(folder))
            time.sleep(rng.uniform(0, 0.08 if moment == "save" else 0.2))
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
    assert steps_there(folder) == [63, 64]
