import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from train.data.order import Order, assign_buckets, bucket_sizes, fold_rare, nearest_bucket

# 40 samples in three buckets of which one is smaller than a batch; 2 has none
BUCKETS = np.random.default_rng(0).permutation([0] * 23 + [1] * 14 + [3] * 3)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 16), (1024, 64), (768, 32), (32, 8)])
def test_buckets_are_of_one_area_whole_and_alike_both_ways(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert sizes[0] == (resolution, resolution)
    assert len(set(sizes)) == len(sizes) > 1
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % multiple == w % multiple == 0
        assert max(h, w) <= 2 * min(h, w)
        # the longer side is rounded to the nearest multiple
        assert abs(h * w - resolution**2) <= min(h, w) * multiple / 2
    assert bucket_sizes(resolution, multiple, 1.0) == sizes[:1]


def test_a_picture_goes_to_the_bucket_of_its_aspect():
    sizes = bucket_sizes(512, 16)
    assert sizes[nearest_bucket(700, 700, sizes)] == (512, 512)
    assert [nearest_bucket(7 * h, 7 * w, sizes) for h, w in sizes] == list(range(len(sizes)))
    assert sizes[nearest_bucket(1, 4000, sizes)] == min(sizes, key=lambda s: s[0] / s[1])
    pictures = np.random.default_rng(0).integers(1, 4000, (1000, 2))
    got = assign_buckets(pictures, sizes)
    away = [[abs(math.log(h / w) - math.log(a / b)) for a, b in sizes] for h, w in pictures]
    assert got.tolist() == [row.index(min(row)) for row in away]


def test_in_an_epoch_every_sample_comes_and_a_batch_is_of_one_bucket():
    order = Order(BUCKETS, 4, seed=1)
    assert order.steps_per_epoch == 6 + 4 + 1
    epochs = []
    for epoch in range(3):
        steps = range(1 + 11 * epoch, 12 + 11 * epoch)
        draws = [order.draw(step) for step in steps]
        assert {draw.epoch for draw in draws} == {epoch}
        for draw in draws:
            assert len(draw.indices) == 4
            assert all(BUCKETS[index] == draw.bucket for index in draw.indices)
        seen = Counter(index for draw in draws for index in draw.indices)
        assert set(seen) == set(range(40))
        # 44 places: 1 of bucket 0, 2 of bucket 1 and 1 of bucket 3 are filled up, none trebled
        assert sorted(seen.values()) == [1] * 36 + [2] * 4
        epochs.append(draws)
    orders = [[draw.bucket for draw in draws] for draws in epochs]
    assert orders[0] != orders[1] != orders[2]
    first = [next(draw.indices for draw in draws if draw.bucket == 3) for draws in epochs]
    assert all(indices[3] == indices[0] for indices in first)  # filled from its own beginning
    assert len(set(first)) > 1


def test_a_step_depends_on_nothing_but_seed_and_number():
    walked = Order(BUCKETS, 4, seed=1)
    draws = {step: walked.draw(step) for step in range(1, 60)}
    subs = {step: walked.substitute(step, 2, 3) for step in range(1, 60)}
    jumping = Order(BUCKETS.astype(np.int16), 4, seed=1)
    for step in np.random.default_rng(0).permutation(range(1, 60)).tolist():
        assert jumping.substitute(step, 2, 3) == subs[step]
        assert jumping.draw(step) == draws[step]
    other = Order(BUCKETS, 4, seed=2)
    assert [other.draw(step) for step in range(1, 12)] != [draws[step] for step in range(1, 12)]


def test_substitutes_are_of_the_bucket_and_all_different():
    order = Order(BUCKETS, 4, seed=0)
    for step in range(1, 30):
        draw = order.draw(step)
        members = set(np.flatnonzero(draw.bucket == BUCKETS).tolist())
        for place, index in enumerate(draw.indices):
            subs = [order.substitute(step, place, a) for a in range(1, len(members))]
            assert {index, *subs} == members
            assert len(subs) == len(members) - 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_bucket_of_few_samples_fills_a_batch(count):
    draw = Order([0] * count, 7, seed=0).draw(5)
    assert Counter(draw.indices).keys() == set(range(count))
    assert len(draw.indices) == 7


def test_an_order_holds_a_few_bytes_a_sample():
    buckets = np.random.default_rng(0).integers(0, 20, 2_000_000, dtype=np.int16)
    tracemalloc.start()
    try:
        order = Order(buckets, 1024, seed=0)
        first = order.draw(1)
        order.draw(1 + order.steps_per_epoch)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 8.5 * len(buckets)
    assert peak < 16 * len(buckets)
    assert set(buckets[list(first.indices)]) == {first.bucket}


def test_what_cannot_be_is_named():
    order = Order(BUCKETS, 4, seed=0)
    for call, message in (
        (lambda: bucket_sizes(500, 16), "resolution must be a multiple of 16.*got 500"),
        (lambda: bucket_sizes(0, 16), "resolution .*got 0"),
        (lambda: bucket_sizes(512, 16, 0.5), "most_aspect must be at least 1, got 0.5"),
        (lambda: nearest_bucket(1, 1, []), "buckets must hold at least one size"),
        (lambda: Order([], 4, 0), "buckets must be one for each sample"),
        (lambda: Order([0], 0, 0), "batch_size must be at least 1, got 0"),
        (lambda: Order([0], 1, -1), "seed and buckets must be at least 0, got -1"),
        (lambda: Order([0, -3], 1, 0), "got 0 and -3"),
        (lambda: order.draw(0), "step must be at least 1, got 0"),
        (lambda: order.substitute(-1, 0, 1), "step must be at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_rare_buckets_are_folded_into_the_nearest_common_one():
    buckets = bucket_sizes(512, 16)
    wide = buckets.index((432, 608))
    wider = buckets.index((416, 624))
    numbers = np.array([0] * 50 + [wide] * 20 + [wider] * 3 + [wider + 1] * 2, np.int16)
    assert buckets[wider + 1] == (624, 416)
    folded = fold_rare(numbers, buckets, 16)
    assert folded[50:73].tolist() == [wide] * 23
    assert folded[73:].tolist() == [0] * 2
    assert fold_rare(numbers, buckets, 1).tolist() == numbers.tolist()
    assert set(fold_rare(numbers, buckets, 1000)) == {0}
