"""A run that is told to end saves first: what it would have looked at then is looked at later."""

import os
import signal

from tests.train_processes import Run, assert_equal_runs, finished, newest
from train.checkpoint import step_of
from train.report import read_log
from train.signals import AGAIN


def test_an_evaluation_that_a_signal_left_out_is_made_up_for(tmp_path):
    words = ("steps=6", "checkpoint_every=6", "eval_every=1")
    unbroken = finished(tmp_path / "unbroken", *words)
    started = Run(tmp_path / "broken", *words)
    started.until_logged(2)
    os.kill(started.ranks[0].pid, signal.SIGTERM)
    assert started.wait() == [AGAIN], started.said()
    folder = started.run_folder
    step = step_of(newest(folder))
    assert "eval/loss" not in read_log(folder)[step]
    finished(tmp_path / "broken", *words)
    assert_equal_runs(folder, unbroken)
    a, b = (read_log(run) for run in (folder, unbroken))
    assert [a[s]["eval/loss"] for s in range(1, 7)] == [b[s]["eval/loss"] for s in range(1, 7)]
