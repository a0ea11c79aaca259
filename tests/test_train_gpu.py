"""A run on a GPU: what only a GPU has, as pinned copies, fused optimizers and the kernels."""

import pytest
import torch

from tests.pictures import write_pictures
from tests.tiny_training import tiny
from train.__main__ import build_stage
from train.checkpoint import newest_valid, read_state
from train.config import override
from train.loop import train
from train.ranks import Ranks
from train.report import read_log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def run(config):
    ranks = Ranks(device=torch.device("cuda"))
    train(config, build_stage(config, ranks), ranks)
    newest = newest_valid(config.folder / "checkpoints", pytest.fail)
    return read_state(newest, ""), read_log(config.folder)


@pytest.mark.parametrize("more", [[], ["open_layers=1"], ["flux_precision=fp8"]], ids=str)
def test_a_run_that_goes_on_ends_as_an_unbroken_one(more, data, tmp_path):
    words = ["precision=bf16", "workers=2", "steps=4", "warmup_steps=1", *more]
    whole, losses = run(tiny(tmp_path / "whole", data, *words))
    part = tiny(tmp_path / "part", data, *words)
    # the same schedule, left after two steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "train.signals.Signals.raised", property(lambda _: True, lambda *_: None), raising=False
        )
        for _ in range(2):
            with pytest.raises(Exception, match="told to end"):
                run(part)
    again, log = run(override(part, ["eval_every=3"]))
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], t) for name, t in whole.items())
    assert [log[s]["loss"] for s in log] == [losses[s]["loss"] for s in losses]
    assert losses[4]["memory_gib"] > 0
    assert losses[4]["mfu"] > 0
    assert losses[4]["checkpoint_stall"] >= 0


@pytest.mark.parametrize("recompute", ["none", "attention-out", "full"])
def test_the_ways_through_the_decoder_agree_in_half_precision(recompute, data, tmp_path):
    found = []
    for way in (["decoder=stock"], ["decoder=fast", f"recompute={recompute}"]):
        words = ["precision=bf16", "steps=2", "tokens_per_node=4,2,1", *way]
        found.append(run(tiny(tmp_path / way[0], data, *words))[1])
    stock, fast = found
    for step in stock:
        assert fast[step]["loss"] == pytest.approx(stock[step]["loss"], rel=2e-2)
