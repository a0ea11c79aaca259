import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.train_plants import Elsewhere, Noted, Told, skip_if_refused
from tests.train_processes import (
    Run,
    assert_equal_runs,
    finished,
    free_port,
    last_step,
    losses_of,
    newest,
    run,
    tensors_of,
    tree_of,
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
    folder = finished(tmp_path, *settings, world=2)
    assert_equal_runs(folder, unbroken)


def seen(*files):
    """(step, place) -> id of the picture."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {(line["step"], int(p)): name for line in lines for p, name in line["places"].items()}


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(first, second, tmp_path):
    files = [tmp_path / f"{name}.jsonl" for name in ("whole", "first", "second")]
    whole = finished(tmp_path / "whole", plants=(Noted(files[0]),))
    told = [(Noted(files[1]), *[Told(4)] * (rank == 0)) for rank in range(first)]
    started, codes = run(tmp_path, "checkpoint_every=8", world=first, plants=told)
    assert codes == [AGAIN] * first, started.said()
    assert step_of(newest(started.run_folder)) == 4
    folder = finished(tmp_path, "checkpoint_every=8", world=second, plants=(Noted(files[2]),))
    # each picture of each step once, on whichever rank
    assert seen(*files[1:]) == seen(files[0])
    assert len(seen(files[0])) == 8 * 4 == len(set(seen(files[0]).values()))
    assert {step for step, _ in seen(files[2])} == {5, 6, 7, 8}
    ours, theirs = tensors_of(newest(folder)), tensors_of(newest(whole))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)
    for step, losses in losses_of(whole).items():
        assert losses_of(folder)[step] == pytest.approx(losses, rel=1e-4, abs=1e-5)


def test_ranks_that_do_not_see_the_same_checkpoints_do_not_train(tmp_path):
    folder = finished(tmp_path, "steps=2", "warmup_steps=2")
    before = tree_of(folder)
    plants = [(), (Elsewhere(folder),)]
    started, codes = run(tmp_path, "steps=4", "warmup_steps=2", world=2, plants=plants)
    skip_if_refused(codes)
    assert codes == [1, 1], started.said()
    assert "rank 1 cannot read the step-000002 that the first goes on from" in started.said(1)
    assert "rank 0 of 2 has lost another" in started.said(0)
    assert tree_of(folder) == before


def test_torchrun_hands_its_sigterm_on_and_ends_with_1(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += [f"--master-port={free_port()}", "-m", "train", "scenes-dino"]
    settings = ("steps=5000", "batch_size=2", "precision=fp32", "muon_lr=0", "log_every=1")
    for setting in (*settings, f"out_dir={tmp_path}"):
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = tmp_path / "scenes-dino"
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        while not (folder / "log.jsonl").exists() or not last_step(folder):
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        # torchrun itself tells nobody that its ranks are to be started again
        assert process.wait(60) == 1
        said.seek(0)
        text = said.read()
    saved = step_of(newest(folder))
    assert text.count(f"told to end after step {saved}, which is saved") == 2
    assert last_step(folder) == saved > 0
