import json
import multiprocessing
import os
import signal
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.batch import micro_batches
from train.data.loader import Loader
from train.data.order import Order, assign_buckets
from train.data.source import open_source
from train.precompute import ShardLayout, precompute

SIZES = ((16, 16), (8, 16))
LAYOUT = ShardLayout(buckets=SIZES, about={"clip": "abc", "size": 378}, per_shard=6, batch_size=4)


def encode(pictures):
    """A stand-in whose result depends on every pixel, in the dtype of real ones."""
    x = pictures.double() / 255
    features = x.flatten(2).mT.cumsum(1)[:, ::16].to(torch.bfloat16)
    return {"features": features, "latents": x[:, :2, ::4, ::4].float()}


def make_folder(root, count=27):
    rng = np.random.default_rng(0)
    for n in range(count):
        height, width = (20, 20) if n % 3 else (20, 40)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            root / f"{n:03}.png"
        )
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(make_folder(tmp_path_factory.mktemp("pictures")))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "shards"
    assert precompute(source, out, encode, LAYOUT, progress=False)
    return out


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def copy(out, target):
    target.mkdir()
    for name, data in contents(out).items():
        (target / name).write_bytes(data)
    return target


def test_a_picture_that_another_took_the_place_of_is_no_longer_what_was_precomputed(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    make_folder(folder, count=5)
    assert precompute(open_source(folder), tmp_path / "out", encode, LAYOUT, progress=False)
    Image.new("RGB", (20, 20), "red").save(folder / "001.png")
    with pytest.raises(ValueError, match=r"was begun otherwise: source \(was "):
        precompute(open_source(folder), tmp_path / "out", encode, LAYOUT, progress=False)


def test_what_was_precomputed_is_read_back_bit_for_bit(source, whole):
    # 18 squares and 9 wide ones, 6 a shard
    assert len(list(whole.glob("shard-*.safetensors"))) == 3 + 2
    made = open_source(whole)
    assert (made.kind, made.about, made.buckets) == ("precomputed", LAYOUT.about, SIZES)
    assert len(made) == 27
    numbers = {source.ids(n): n for n in range(27)}
    assert {made.ids(n).partition("/")[2] for n in range(27)} == set(numbers)
    for n in range(27):
        size = tuple(made.sizes[n].tolist())
        number = numbers[made.ids(n).partition("/")[2]]
        assert size == SIZES[assign_buckets(source.sizes, SIZES)[number]]
        wanted = encode(source.read(number, size)["pictures"][None])
        sample = made.read(n, size)
        assert sample.keys() == wanted.keys()
        for name, tensor in sample.items():
            assert tensor.dtype == wanted[name].dtype
            assert torch.equal(tensor, wanted[name][0])
    with pytest.raises(ValueError, match=r"size must be \(16, 16\), as it was precomputed"):
        made.read(0, (8, 8))


def test_a_loader_takes_precomputed_samples(whole):
    made = open_source(whole)
    order = Order(assign_buckets(made.sizes, made.buckets), 4, seed=0)
    micro = micro_batches(4, 2, 0, 1)
    batches = Loader(made, order, made.buckets, micro, 2).batches(1)
    for _ in range(order.steps_per_epoch):
        for batch in next(batches):
            h, w = batch.size
            assert batch.tensors["features"].shape == (2, h * w // 16, 3)
            assert batch.tensors["features"].dtype == torch.bfloat16
            assert batch.tensors["latents"].shape == (2, 2, h // 4, w // 4)
            assert not batch.broken
    batches.close()
    with pytest.raises(ValueError, match="buckets must be those precomputed"):
        Loader(made, order, SIZES[:1], micro, 0)


@pytest.mark.parametrize("worlds", [[(1, 2), (0, 2)], [(2, 3), (1, 2), (0, 1)], [(4, 9), (0, 1)]])
def test_any_number_of_processes_writes_the_same_bytes(source, whole, tmp_path, worlds):
    done = [precompute(source, tmp_path, encode, LAYOUT, r, w, progress=False) for r, w in worlds]
    assert done == [False] * (len(worlds) - 1) + [True]
    assert contents(tmp_path) == contents(whole)
    # nothing is made twice
    assert precompute(source, tmp_path, None, LAYOUT, progress=False)
    assert contents(tmp_path) == contents(whole)


def test_processes_at_the_same_time_write_the_same_bytes(source, whole, tmp_path):
    """Two of two, and one more that does all that any of them does."""
    children = []
    for rank, world in ((0, 2), (1, 2), (0, 1)):
        children.append(os.fork())
        if children[-1] == 0:
            precompute(source, tmp_path, encode, LAYOUT, rank, world, progress=False)
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 3
    assert contents(tmp_path) == contents(whole)


def killed_at(point, source, out, layout=LAYOUT):
    """Run it in a process that kills itself before its fsync of that number; was it killed?"""
    child = os.fork()
    if child == 0:
        fsync, calls = os.fsync, iter(range(10**6))

        def fatal(file):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(file)

        os.fsync = fatal
        try:
            precompute(source, out, encode, layout, progress=False)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_write_loses_nothing(source, tmp_path):
    layout = replace(LAYOUT, per_shard=18)
    assert precompute(source, tmp_path / "whole", encode, layout, progress=False)
    whole, point = contents(tmp_path / "whole"), 0
    while killed_at(point, source, out := tmp_path / str(point), layout):
        assert precompute(source, out, encode, layout, progress=False)
        assert contents(out) == whole
        point += 1
    assert contents(out) == whole
    # two files for each of 2 shards and three more: each is synced, and its folder after it
    assert point == 2 * (2 * 2 + 3)


def test_killed_again_and_again_it_comes_to_the_end(source, whole, tmp_path):
    kills = 0
    while killed_at(5, source, tmp_path):
        kills += 1
        assert kills < 26
    assert contents(tmp_path) == contents(whole)
    assert kills > 3


def precompute_slowly(folder, out, encoded):
    def slow(pictures):
        encoded.release()
        signal.sigtimedwait([], 0.05)
        return encode(pictures)

    precompute(open_source(Path(folder)), Path(out), slow, LAYOUT, progress=False)


def test_a_process_killed_from_outside_is_gone_on_with(source, whole, tmp_path):
    context = multiprocessing.get_context("spawn")
    encoded = context.Semaphore(0)
    child = context.Process(target=precompute_slowly, args=(source.root, tmp_path, encoded))
    child.start()
    for _ in range(5):
        assert encoded.acquire(timeout=60)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with pytest.raises(ValueError, match="data must be precomputed to its end"):
        open_source(tmp_path)
    assert precompute(source, tmp_path, encode, LAYOUT, progress=False)
    assert contents(tmp_path) == contents(whole)


def why_not(made, n):
    """Why a sample cannot be read; None if it can."""
    try:
        made.read(n, tuple(made.sizes[n].tolist()))
    except ValueError as error:
        return str(error)
    return None


def test_a_flipped_bit_is_noticed_and_mended(source, whole, tmp_path):
    out = copy(whole, tmp_path / "out")
    path = out / "shard-000002.safetensors"
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [10, header - 4, *range(header + 5, len(data), 97), len(data) - 1]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        made = open_source(out)
        reasons = {n: reason for n in range(27) if (reason := why_not(made, n))}
        # one sample, or the shard's header and so any of it
        assert set(reasons) <= set(range(12, 18))
        assert len(reasons) == 1 or place < header
        assert all(str(path) in reason for reason in reasons.values())
    with pytest.warns(RuntimeWarning, match=r"shard-000002.safetensors differs from its sha256.*"):
        assert precompute(source, out, encode, LAYOUT, progress=False)
    assert contents(out) == contents(whole)


def test_a_torn_or_missing_part_is_named(source, whole, tmp_path):
    out = copy(whole, tmp_path / "out")
    shard, note = out / "shard-000001.safetensors", out / "shard-000003.json"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    with pytest.raises(ValueError, match=r"shard-000001.* must have .* bytes, has"):
        open_source(out)
    note.write_bytes(note.read_bytes()[:-9])
    with pytest.warns(RuntimeWarning) as warned:
        assert precompute(source, out, encode, LAYOUT, progress=False)
    assert ["shard-000001" in str(w.message) for w in warned] == [True, False]
    assert "shard-000003.json is damaged" in str(warned[1].message)
    assert contents(out) == contents(whole)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001"):
        open_source(out)
    shard.write_bytes(data)
    index = out / "index.safetensors"
    bent = bytearray(index.read_bytes())
    bent[-9] ^= 1
    index.write_bytes(bent)
    with pytest.raises(ValueError, match=r"index.safetensors is no whole index"):
        open_source(out)
    (out / "precomputed.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data: .*precomputed.json is damaged"):
        open_source(out)


def test_another_making_is_refused_with_the_differences(source, whole, tmp_path):
    other = ShardLayout(
        buckets=SIZES, about={"clip": "xyz", "size": 378}, per_shard=5, batch_size=4
    )
    before = contents(whole)
    with pytest.raises(ValueError, match=r"begun otherwise: about.clip .was abc, now xyz.; per_sh"):
        precompute(source, whole, encode, other, progress=False)
    fewer = open_source(make_folder(tmp_path, 26))
    with pytest.raises(ValueError, match=r"begun otherwise: source .was "):
        precompute(fewer, whole, encode, LAYOUT, progress=False)
    assert contents(whole) == before
    with pytest.raises(ValueError, match=r"out must be a new folder, got .* with 000.png, 001"):
        precompute(source, tmp_path, encode, LAYOUT, progress=False)
    with pytest.raises(ValueError, match="source must hold pictures, got 27 of kind precomputed"):
        precompute(open_source(whole), tmp_path / "x", encode, LAYOUT, progress=False)
    with pytest.raises(ValueError, match="rank must be 0 to 1, got 2"):
        precompute(source, tmp_path / "x", encode, LAYOUT, 2, 2, progress=False)
    with pytest.raises(ValueError, match="per_shard and batch_size must be at least 1, got 0 and"):
        ShardLayout(buckets=SIZES, about={}, per_shard=0)
    assert not (tmp_path / "x").exists()


def test_what_encode_returns_is_checked(source, tmp_path):
    for result, error, message in (
        (lambda p: {"features": encode(p)["features"]}, ValueError, "features and latents with 4"),
        (lambda p: encode(p[:2]), ValueError, r"with 4 rows, got .*\(2, 16, 3\)"),
        (lambda p: encode(p * float("nan")), FloatingPointError, "finite features.*001.png"),
    ):
        with pytest.raises(error, match=message):
            precompute(source, tmp_path, result, LAYOUT, progress=False)
    assert sorted(contents(tmp_path)) == ["begun.json"]


def test_broken_pictures_are_left_out_until_they_are_too_many_or_whole(tmp_path):
    root, out = tmp_path / "pictures", tmp_path / "out"
    root.mkdir()
    make_folder(root, 110)
    path = root / "002.png"
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    source = open_source(root)
    layout = ShardLayout(buckets=SIZES, about={}, per_shard=8)
    assert precompute(source, out, encode, layout, progress=False)
    made = open_source(out)
    assert len(made) == 109
    assert "damaged or truncated" in made.refused["002.png"]
    note = json.loads((out / "shard-000000.json").read_text())
    assert note["ids"] == [f"{n:03}.png" for n in (1, 4, 5, 7, 8, 10, 11)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert precompute(source, out, None, layout, progress=False)
    other = root / "109.png"
    good = other.read_bytes()
    other.write_bytes(good[:-200])
    with pytest.raises(ValueError, match=r"at most 1 % .*got 2 in 73 drawn; here:\n  002.png"):
        precompute(source, tmp_path / "more", encode, layout, progress=False)
    other.write_bytes(good)
    path.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="shard-000000.safetensors lacks 002.png, which can be"):
        assert precompute(source, out, encode, layout, progress=False)
    assert len(open_source(out)) == 110


def test_a_shard_without_a_whole_picture_is_no_obstacle(tmp_path):
    root, out = tmp_path / "pictures", tmp_path / "out"
    root.mkdir()
    make_folder(root, 109)
    path = root / "108.png"
    path.write_bytes(path.read_bytes()[:-200])
    layout = ShardLayout(buckets=((16, 16),), about={}, per_shard=12)
    assert precompute(open_source(root), out, encode, layout, progress=False)
    made = open_source(out)
    assert len(made) == 108
    assert len(made.index.files) == 10
    assert made.read(107, (16, 16)).keys() == {"features", "latents"}
