import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.train_plants import Elsewhere, Noted, Told, skip_if_refused
from tests.train_processes import (
    PATIENCE_S,
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
        end = time.monotonic() + PATIENCE_S
        try:
            while not last_step(folder) and process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            code = process.wait(PATIENCE_S)
        finally:
            process.kill()
        said.seek(0)
        text = said.read()
    saved = newest(folder)
    assert saved is not None, text
    assert last_step(folder) == step_of(saved) > 0
    assert text.count(f"told to end after step {step_of(saved)}, which is saved") == 2
    # what the ranks end with is for those who start them without torchrun
    assert code == 1
