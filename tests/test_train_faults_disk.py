import errno
import json
import os

import pytest
import torch

from tests.train_plants import (
    Forbidden,
    Limited,
    ReadOnly,
    SlowDisk,
    SmallDisk,
    Told,
    skip_if_refused,
)
from tests.train_processes import (
    Run,
    finished,
    run,
    steps_there,
    tensors_of,
    tree_of,
)
from train.signals import AGAIN

CHECKPOINT_BYTES = 6_400_000


@pytest.fixture
def begun(tmp_path):
    """A run that was told to end after its second step; its folder of checkpoints."""
    started, codes = run(tmp_path, "checkpoint_every=8", plants=(Told(2),))
    assert codes == [AGAIN], started.said()
    folder = started.run_folder / "checkpoints"
    (size,) = (file.stat().st_size for file in folder.glob("step-000002/*.safetensors"))
    assert 0.9 * CHECKPOINT_BYTES < size < CHECKPOINT_BYTES
    return folder


def words(number):
    return f"could not be written: {os.strerror(number)}"


@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoint_that_is_too_large_ends_a_run_and_leaves_the_old_one(world, begun, tmp_path):
    before = tree_of(begun)
    plants = (Limited(CHECKPOINT_BYTES // 2),)
    started, codes = run(tmp_path, "checkpoint_every=3", world=world, plants=plants)
    assert codes == [1] * world, started.said()
    assert f"{begun}/step-000003 {words(errno.EFBIG)}" in started.said(0)
    if world == 2:
        assert "another rank could not write a checkpoint, and says why" in started.said(1)
    assert tree_of(begun) == before
    assert [path.name for path in begun.iterdir()] == ["step-000002"]


def test_a_full_disk_ends_a_run_and_leaves_the_old_checkpoint(begun, tmp_path):
    before, found = tree_of(begun), tmp_path / "found.json"
    disk = SmallDisk(begun, CHECKPOINT_BYTES * 3 // 2, found)
    started, codes = run(tmp_path, "checkpoint_every=3", plants=(disk,))
    skip_if_refused(codes)
    assert codes == [1], started.said()
    assert f"{begun}/step-000003 {words(errno.ENOSPC)}" in started.said()
    assert json.loads(found.read_text()) == {"steps": [2], "tree": before}


@pytest.mark.parametrize(("fault", "number"), [(ReadOnly, errno.EROFS), (Forbidden, errno.EACCES)])
def test_a_folder_that_takes_nothing_ends_a_run_and_stays_as_it_was(fault, number, begun, tmp_path):
    before = tree_of(begun)
    started, codes = run(tmp_path, "checkpoint_every=3", plants=(fault(begun),))
    skip_if_refused(codes)
    assert codes == [1], started.said()
    assert f"{begun}/step-000003 {words(number)}" in started.said()
    assert tree_of(begun) == before


def test_a_run_folder_that_takes_nothing_is_refused_before_the_first_step(begun, tmp_path):
    before = tree_of(begun.parent)
    started, codes = run(tmp_path, plants=(ReadOnly(begun.parent),))
    skip_if_refused(codes)
    assert codes == [1], started.said()
    assert f"{begun.parent} {words(errno.EROFS)}" in started.said()
    assert tree_of(begun.parent) == before


def test_a_log_on_a_full_disk_ends_a_run_by_name(begun, tmp_path):
    before = tree_of(begun)
    log = begun.parent / "log.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    started, codes = run(tmp_path)
    assert codes == [1], started.said()
    assert f"{log} {words(errno.ENOSPC)}" in started.said()
    assert tree_of(begun) == before


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_touch_it(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    started = Run(tmp_path, "checkpoint_every=2", "keep=8", plants=(SlowDisk(tmp_path / "fifo"),))
    started.until_logged(4)
    folder = started.run_folder / "checkpoints"
    # two more steps are done, and the first checkpoint still is not
    assert steps_there(started.run_folder) == []
    assert (folder / ".part-step-000002").is_dir()
    (tmp_path / "fifo").write_text("go on")
    assert started.wait() == [0], started.said()
    other = finished(tmp_path / "other", "keep=8")
    for step in (2, 4, 6, 8):
        ours, theirs = (
            tensors_of(run_folder / f"checkpoints/step-{step:06d}")
            for run_folder in (started.run_folder, other)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
