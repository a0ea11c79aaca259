"""Pictures that are held out: which they are, and that they are looked at a few at a time."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.pictures import write_pictures
from tests.tiny_training import build, tiny
from train.config import override
from train.data.order import assign_buckets, bucket_sizes
from train.data.source import open_source
from train.flux import hold_out, precompute_for
from train.loop import train
from train.ranks import Ranks
from train.state import State

WORDS = "steps=1", "micro_batch=4", "eval_every=9"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pictures of all kinds of shapes, in two folders."""
    folder = tmp_path_factory.mktemp("shapes")
    rng = np.random.default_rng(0)
    for number in range(60):
        sides = (rng.uniform(40, 80, 2)).astype(int).tolist()
        name = folder / "ab"[number % 2] / f"{number}.png"
        name.parent.mkdir(exist_ok=True)
        Image.new("RGB", sides, (number, 0, 0)).save(name)
    return folder


def unseen(source, resolution, most=12):
    buckets = bucket_sizes(resolution, 16)
    return hold_out(source, assign_buckets(source.sizes, buckets), buckets, most, Ranks())


def test_phases_of_all_resolutions_and_of_what_was_precomputed_hold_out_the_same(shapes, tmp_path):
    source = open_source(shapes)
    first, *later = (unseen(source, resolution) for resolution in (64, 128, 256))
    assert len(set(first.ids)) == 12
    assert len(set(first.sizes)) > 1
    for other in later:
        assert set(other.ids) == set(first.ids)
    assert set(unseen(source, 256, most=5).ids) < set(first.ids)
    for sample, size in zip(first.samples, first.sizes, strict=True):
        assert sample["pictures"].shape == (3, *size)
    for share in first.shares(3):
        assert 1 <= len(share) <= 3
        assert len({first.sizes[place] for place in share}) == 1
    assert [place for share in first.shares(3) for place in share] == list(range(12))

    config = tiny(tmp_path, shapes, "resolution=64")
    assert precompute_for(config, tmp_path / "shards", Ranks())
    again = unseen(open_source(tmp_path / "shards"), 64)
    assert {name.partition("/")[2] for name in again.ids} == set(first.ids)


def test_a_run_does_not_go_on_with_others_held_out(data, tmp_path):
    from shutil import copytree

    own = copytree(data, tmp_path / "own")
    config = tiny(tmp_path, own, *WORDS)
    stage = build(config)
    train(config, stage)
    torn = own / stage.unseen.ids[0]
    torn.write_bytes(torn.read_bytes()[:-300])
    longer = override(config, ["steps=2"])
    stage = build(longer)
    assert torn.name not in stage.unseen.ids
    with pytest.raises(ValueError, match=r"another config: .*unseen \(was"):
        train(longer, stage)


def test_an_evaluation_is_of_all_that_are_held_out_however_many_at_a_time(data, tmp_path):
    found = []
    for most in (4, 3, 1):
        config = tiny(tmp_path, data, f"batch_size={most}", f"micro_batch={most}", "resolution=64")
        with torch.no_grad():
            found.append(build(config).evaluate())
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


def test_a_sheet_is_drawn_a_micro_batch_at_a_time(data, tmp_path):
    sheets = []
    for most in (4, 1):
        stage = build(tiny(tmp_path, data, f"batch_size={most}", f"micro_batch={most}"))
        seen = []
        note = lambda module, args, seen=seen: seen.append(len(args[0]))
        for part in (stage.frozen.flux.vae.encoder, stage.frozen.flux.vae.decoder):
            part.register_forward_pre_hook(note)
        with torch.no_grad():
            sheets.append(stage.sheet())
        assert set(seen) == {most}
    assert sheets[0].shape == (3, 64, 4 * 32)
    torch.testing.assert_close(sheets[1], sheets[0], rtol=0, atol=2e-3)


def test_layers_that_are_opened_learn_without_dropout(data, tmp_path):
    config = tiny(tmp_path, data, "open_layers=1")
    stage = build(config)
    state = State(config, stage, Ranks())
    with state.averaged():
        pass
    assert stage.adapter.training
    assert not any(module.training for module in stage.frozen.encoder.modules())
