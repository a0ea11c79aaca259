import os
import signal

import pytest

from tests.train_processes import (
    Run,
    assert_equal_runs,
    finished,
    last_step,
    newest,
)
from train.checkpoint import step_of
from train.signals import AGAIN

# shorter than a run on a slow machine may pause for, longer than a test should take
TIMEOUT_S = 8


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of two ranks that nothing happens to."""
    return finished(tmp_path_factory.mktemp("two"), "steps=24", "checkpoint_every=24", world=2)


def test_a_rank_that_is_told_to_end_saves_for_all_and_the_same_command_goes_on(unbroken, tmp_path):
    told = ((signal.SIGTERM, 1), (signal.SIGUSR1, 0))
    for number, rank in told:
        started = Run(tmp_path, "steps=24", "checkpoint_every=24", world=2)
        before = newest(started.run_folder)
        started.until_logged(2 if before is None else step_of(before) + 2)
        os.kill(started.ranks[rank].pid, number)
        done = last_step(started.run_folder)
        assert started.wait() == [AGAIN, AGAIN], started.said()
        saved = newest(started.run_folder)
        # the step that was being computed, and one more if the ranks had met already
        assert done <= step_of(saved) <= done + 2
        assert last_step(started.run_folder) == step_of(saved)
        for each in (0, 1):
            assert f"told to end after step {step_of(saved)}" in started.said(each)
    folder = finished(tmp_path, "steps=24", "checkpoint_every=24", world=2)
    assert_equal_runs(folder, unbroken)


def test_a_rank_that_dies_or_hangs_ends_the_others_and_costs_no_checkpoint(unbroken, tmp_path):
    settings = ("steps=24", f"timeout_s={TIMEOUT_S}")
    faults = ((signal.SIGKILL, 0, "has ended"), (signal.SIGKILL, 1, "has ended"))
    faults += ((signal.SIGSTOP, 1, f"did not answer for timeout_s = {TIMEOUT_S} s"),)
    for number, rank, reason in faults:
        started = Run(tmp_path, *settings, world=2)
        before = newest(started.run_folder)
        started.until_saved(1 if before is None else step_of(before) + 1)
        os.kill(started.ranks[rank].pid, number)
        other = started.ranks[1 - rank]
        other.join(60)
        assert other.exitcode == 1, started.said()
        assert f"rank {1 - rank} of 2 has lost another, which {reason}" in started.said(1 - rank)
        started.kill()
        after = newest(started.run_folder, pytest.fail)
        assert last_step(started.run_folder) - step_of(after) <= 2
    folder = finished(tmp_path, *settings, "checkpoint_every=24", world=2)
    assert_equal_runs(folder, unbroken)
