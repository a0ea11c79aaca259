"""What a run learns does not depend on how many ranks share it, nor on where FLUX lies."""

import pytest
import torch

from tests.pictures import write_pictures
from tests.tiny_training import TINY
from tests.train_processes import Run
from train.checkpoint import newest_valid, read_state
from train.report import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone"), data, 1, "micro_batch=4")


def run(folder, data, world, *settings):
    """The run's folder, after it has ended well."""
    arguments = ["rehearse"]
    for word in (*TINY, "eval_every=2", f"data={data}", f"out_dir={folder}", *settings):
        arguments += ["--set", word]
    ran = Run(folder, world=world, arguments=arguments)
    assert ran.wait() == [0] * world, ran.said()
    return folder / "rehearse"


def assert_alike(run, other):
    a, b = read_log(run), read_log(other)
    assert a.keys() == b.keys()
    for step, row in a.items():
        for name in ("loss", "flow", "penalty", "grad_norm", "eval/loss"):
            if name in row:
                assert b[step][name] == pytest.approx(row[name], rel=2e-4), (step, name)
    for kind in ("model/", "ema/"):
        ours, theirs = (
            read_state(newest_valid(folder / "checkpoints", pytest.fail), kind)
            for folder in (run, other)
        )
        assert ours.keys() == theirs.keys()
        for name, t in ours.items():
            # Adam divides by a root: what was rounding of a gradient near zero is a step then
            torch.testing.assert_close(theirs[name], t, rtol=1e-3, atol=4e-4)


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, ["micro_batch=2"]),
        (2, ["micro_batch=none"]),
        (2, ["micro_batch=1"]),
        (2, ["micro_batch=2", "shard_flux=true"]),
        (2, ["micro_batch=2", "shard_flux=true", "recompute=full"]),
    ],
    ids=str,
)
def test_ranks_turns_and_shards_learn_the_same(world, settings, alone, data, tmp_path):
    assert_alike(alone, run(tmp_path, data, world, *settings))


def test_sharding_wants_ranks(data, tmp_path):
    arguments = ["rehearse"]
    for word in (*TINY, f"data={data}", f"out_dir={tmp_path}", "shard_flux=true"):
        arguments += ["--set", word]
    ran = Run(tmp_path, arguments=arguments)
    assert ran.wait() == [1]
    assert "shard_flux needs ranks" in ran.said()
    assert "torchrun" in ran.said()
