import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train.batch import micro_batches
from train.data.loader import ATTEMPTS, BrokenCount, Loader
from train.data.order import Order, assign_buckets
from train.data.source import open_source

SIZES = ((16, 16), (8, 16))
BATCH = 8


def make_folder(root):
    """30 squares and 15 wide pictures; two of each are cut off behind their headers."""
    rng = np.random.default_rng(0)
    for n in range(45):
        height, width = (20, 20) if n % 3 else (20, 40)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
            root / f"{n:02}.png"
        )
    for n in (3, 4, 21, 22):
        path = root / f"{n:02}.png"
        path.write_bytes(path.read_bytes()[:-200])
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(make_folder(tmp_path_factory.mktemp("pictures")))


def order_of(source, batch_size=BATCH):
    return Order(assign_buckets(source.sizes, SIZES), batch_size, seed=3)


def take(source, steps, workers=0, micro=2, rank=0, world=1):
    """The batches of these steps, a list each."""
    places = micro_batches(BATCH, micro, rank, world)
    batches = Loader(source, order_of(source), SIZES, places, workers).batches(steps[0])
    got = [next(batches) for _ in steps]
    batches.close()
    return got


def by_place(lists):
    """(step, place) -> (id, pixels), and every broken picture, of lists of micro-batches."""
    rows, broken = {}, {}
    for batch in (batch for step in lists for batch in step):
        pixels = batch.tensors["pictures"]
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (len(batch.places), 3, *batch.size)
        for row, place in enumerate(batch.places):
            rows[batch.step, place] = batch.ids[row], pixels[row].numpy().tobytes()
        broken |= batch.broken
    return rows, broken


@pytest.fixture(scope="module")
def plain(source):
    """Two epochs by one rank in its own process."""
    steps = range(1, 1 + 2 * order_of(source).steps_per_epoch)
    lists = take(source, steps)
    assert [[batch.step for batch in step] for step in lists] == [[step] * 4 for step in steps]
    return by_place(lists)


def test_broken_pictures_are_named_and_others_of_the_bucket_take_their_places(source, plain):
    rows, broken = plain
    assert broken.keys() == {"03.png", "04.png", "21.png", "22.png"}
    assert all("damaged or truncated" in reason for reason in broken.values())
    order, numbers = order_of(source), {source.ids(n): n for n in range(len(source))}
    buckets = assign_buckets(source.sizes, SIZES)
    seen = set()
    for (step, place), (name, pixels) in rows.items():
        draw = order.draw(step)
        wanted, number = draw.indices[place], numbers[name]
        assert number == wanted or source.ids(wanted) in broken
        assert buckets[number] == draw.bucket
        assert name not in broken
        sample = source.read(number, SIZES[draw.bucket])["pictures"]
        assert sample.numpy().tobytes() == pixels
        seen.add(name)
    assert len(seen) == 41


@pytest.mark.parametrize(
    ("workers", "micro", "world"),
    [(0, 4, 1), (0, 8, 1), (0, 1, 2), (0, 2, 4), (2, 2, 1), (2, 2, 2)],
)
def test_workers_ranks_and_micro_batches_change_nothing(source, plain, workers, micro, world):
    steps = range(1, 13)
    rows, broken = {}, {}
    for rank in range(world):
        lists = take(source, steps, workers, micro, rank, world)
        assert {len(batch.ids) for step in lists for batch in step} == {micro}
        own, unread = by_place(lists)
        assert not rows.keys() & own.keys()
        rows |= own
        broken |= unread
    assert rows == {key: row for key, row in plain[0].items() if key[0] in steps}
    assert broken.keys() <= plain[1].keys()


def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(source, plain):
    last = max(step for step, _ in plain[0])
    for first in (2, 6, 7, 11):
        steps = range(first, last + 1)
        rows, _ = by_place(take(source, steps, workers=2 if first == 6 else 0))
        assert rows == {key: row for key, row in plain[0].items() if key[0] in steps}


def test_the_generator_that_a_run_goes_on_with_is_left_alone(source):
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 2):
        take(source, range(1, 4), workers)
        assert torch.equal(torch.get_rng_state(), before)
        assert np.array_equal(np.random.get_state()[1], numbers)


def test_a_bucket_without_a_whole_picture_ends_with_the_list(tmp_path):
    make_folder(tmp_path)
    source = open_source(tmp_path)
    for n in range(0, 45, 3):
        path = tmp_path / f"{n:02}.png"
        path.write_bytes(path.read_bytes()[:-200])
    batches = Loader(source, order_of(source), SIZES, [range(BATCH)], 2).batches(1)
    message = f"data: step . has a place for which {ATTEMPTS} pictures in a row cannot be read"
    with pytest.raises(ValueError, match=message) as error:
        list(islice(batches, order_of(source).steps_per_epoch))
    assert "  03.png: the image is damaged or truncated" in str(error.value)
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_is_an_error_of_the_next_batch_and_no_hang(source):
    batches = Loader(source, order_of(source), SIZES, [range(BATCH)], 2).batches(1)
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()
    # not here, where a rank may be writing a checkpoint
    assert sum(range(10**6)) == 499999500000
    with pytest.raises(RuntimeError, match=r"has died .*DataLoader worker .*unexpectedly"):
        list(islice(batches, 1000))


def test_signals_for_the_rank_do_not_end_its_workers_and_closing_does(source):
    batches = Loader(source, order_of(source), SIZES, [range(BATCH)], 2).batches(1)
    next(batches)
    workers = multiprocessing.active_children()
    sender = [sys.executable, "-c", "import os, sys; os.kill(int(sys.argv[1]), int(sys.argv[2]))"]
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        subprocess.run([*sender, str(workers[0].pid), str(int(signum))], check=True)
    for _ in range(10):
        next(batches)
    assert all(worker.is_alive() for worker in workers)
    batches.close()
    assert not any(worker.is_alive() for worker in workers)
    # the process they work for may end one that does not answer
    batches = Loader(source, order_of(source), SIZES, [range(BATCH)], 1).batches(1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


RANK = """
import multiprocessing, sys, time
from pathlib import Path
from train.data.loader import Loader
from train.data.order import Order, assign_buckets
from train.data.source import open_source
source = open_source(Path(sys.argv[1]))
order = Order(assign_buckets(source.sizes, [(8, 8)]), 4, 0)
batches = Loader(source, order, [(8, 8)], [range(4)], 2).batches(1)
next(batches)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_workers_do_not_outlive_a_rank_that_is_killed(source):
    command = [sys.executable, "-c", RANK, str(source.root)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as rank:
        workers = [int(pid) for pid in rank.stdout.readline().split()]
        assert len(workers) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        rank.kill()
    for _ in range(200):
        # nobody may be there to reap them
        states = [path.read_text().split()[2] for pid in workers if (path := stat(pid)).exists()]
        if set(states) <= {"Z"}:
            return
        time.sleep(0.05)
    pytest.fail(f"workers are in states {states}")


def stat(pid):
    return Path(f"/proc/{pid}/stat")


def test_broken_pictures_are_too_many_above_one_in_a_hundred():
    count = BrokenCount(pictures=10_000)
    count.add(64, {f"{n}.png": "torn" for n in range(10)})
    count.add(64, {"0.png": "torn"})
    assert (count.broken, count.drawn) == (10, 128)
    assert not count.over()
    count.add(64, {"10.png": "torn"})
    assert count.over()
    assert not count.over(limit=0.02)
    assert not count.over(broken=20, drawn=2000)
    assert count.over(broken=21, drawn=2000)
    count.add(2000, {f"{n}.png": "torn" for n in range(11, 21)})
    assert not count.over()
    message = count.message(30, 2999)
    assert "got 30 in 2,999 drawn" in message
    assert "  19.png: torn\n  and 1 more" in message
    few = BrokenCount(pictures=50)
    few.add(8, {})
    assert not few.over()
    few.add(8, {"a.png": "torn"})
    assert few.over()


def test_what_cannot_be_is_named(source):
    order = order_of(source)
    for micro, workers, message in (
        ([], 0, r"micro must hold places 0 to 7, got \[\]"),
        ([range(0)], 0, "micro must hold places"),
        ([range(4, 9)], 0, "micro must hold places"),
        ([range(8)], -1, "workers must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            Loader(source, order, SIZES, micro, workers)
    with pytest.raises(ValueError, match="first_step must be at least 1, got 0"):
        Loader(source, order, SIZES, [range(8)], 0).batches(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_are_the_same(source, plain):
    batches = Loader(source, order_of(source), SIZES, [range(BATCH)], 2, pin=True).batches(1)
    lists = [next(batches) for _ in range(3)]
    batches.close()
    assert all(batch.tensors["pictures"].is_pinned() for step in lists for batch in step)
    rows, _ = by_place(lists)
    assert rows == {key: row for key, row in plain[0].items() if key[0] < 4}
    (first,) = lists[0]
    assert isinstance(first.places, tuple)
    assert isinstance(first.size, tuple)
