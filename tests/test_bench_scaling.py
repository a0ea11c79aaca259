"""``bench scaling``: what is counted, the model it is held to, groups of real processes."""

import socket
import time

import pytest
import torch

from bench import scaling
from bench.__main__ import main as bench
from bench.measure import Deadline
from bench.scaling import EXACT, exposed_ms, measure, read_ranks, slowest, summary
from bench.scaling_ranks import ADAPTER, Link, sent_on_loopback
from sda_fast.cost import adapter_parameters, all_reduce_bytes, all_reduce_seconds

from .test_bench_measure import bench_small


def test_ranks_are_numbers():
    assert read_ranks("1, 2,4,2") == [1, 2, 4]
    for text in ("", "0", "2,x", "-1", "65"):
        with pytest.raises(ValueError, match="ranks must be numbers from 1 to 64"):
            read_ranks(text)
    with pytest.raises(SystemExit) as stop:
        bench(["scaling", "--ranks", "none"])
    assert stop.value.code == 2


def test_what_the_backward_does_not_hide():
    assert exposed_ms([10, 20, 30], [5, 5, 5], 100) == 0
    assert exposed_ms([10, 20, 100], [5, 5, 5], 100) == 5  # the last bucket, always
    assert exposed_ms([10, 20, 30], [40, 40, 40], 100) == 30  # one after the other
    assert exposed_ms([90, 95, 100], [10, 10, 10], 100) == 20
    assert exposed_ms([100], [0], 100) == 0


def test_a_turn_is_as_long_as_its_slowest_rank():
    assert slowest([[1.0, 5.0, 2.0], [2.0, 1.0, 9.0]]) == 5


def rank(**changed):
    turns = {"alone": [100.0, 90.0, 110.0], "backward": [60.0] * 3, "step": [130.0] * 3}
    turns |= {"ready": [[20.0, 60.0]] * 3, "reduce": [60.0] * 3, "loopback": [4.0] * 3}
    return turns | changed


def test_times_and_bytes_stand_beside_the_model():
    buckets, speed = [1000, 2000], 50e3
    found = {"buckets": buckets, "sent": 6010.0, "error": 1e-7, "bytes_per_second": speed}
    slow = rank(alone=[95.0] * 3, ready=[[40.0, 50.0]] * 3)
    two = summary(2, found | {"times": [rank(), slow]})
    assert (two["alone_ms"], two["p50_ms"], two["reduce_ms"]) == (100, 130, 60)
    assert two["rank_alone_ms"] == [100, 95]
    assert two["ready_ms"] == [40, 60]  # when all have it
    assert two["sent_model"] == 2 * all_reduce_bytes(3000, 2) == 6000
    assert two["overlap"] == pytest.approx((100 + 60 - 130) / 60)
    # 1000 bytes take 20 ms from 40 on, 2000 take 40 from 60 on; the backward ends at 60
    assert two["overlap_model"] == pytest.approx(1 - 40 / 60)
    one = summary(1, found | {"times": [rank()], "sent": None})
    assert (one["overlap"], one["overlap_model"], one["link_bytes_per_s"]) == (None, None, None)
    assert (one["sent_bytes"], one["sent_model"]) == (None, 0)


def test_bytes_on_loopback_are_those_the_system_counts(tmp_path):
    counters = tmp_path / "dev"
    head = "Inter-|   Receive\n face |bytes    packets\n"
    numbers = " ".join(str(100 + i) for i in range(16))
    counters.write_text(f"{head}  eth0: {numbers.replace('1', '9')}\n    lo: {numbers}\n")
    assert sent_on_loopback(counters) == 108
    counters.write_text(f"{head}  eth0: {numbers}\n")
    assert sent_on_loopback(counters) is None
    assert sent_on_loopback(tmp_path / "none") is None


@pytest.mark.skipif(sent_on_loopback() is None, reason="the system does not count")
def test_what_goes_over_loopback_is_counted():
    size, payload = 1 << 20, bytes(1 << 16)
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as sender, server.accept()[0] as end:
            before, got = sent_on_loopback(), 0
            while got < size:
                sender.sendall(payload)
                part = 0
                while part < len(payload):
                    part += len(end.recv(len(payload)))
                got += part
        deadline = Deadline.after(10.0)
        while sent_on_loopback() - before < size and deadline.left() > 0:
            time.sleep(0.01)
    assert sent_on_loopback() - before >= size


def test_a_link_carries_in_order_and_passes_on_what_fails():
    link = Link(2, all_reduce_bytes(1000, 2) / 1e-3)
    assert all_reduce_seconds(1000, 2, link.bytes_per_second) == pytest.approx(1e-3)
    sources = [torch.futures.Future() for _ in range(3)]
    ends = [link.send(1000, source) for source in sources]
    sources[1].set_exception(RuntimeError("lost"))
    sources[2].set_result(torch.tensor(2))
    assert not any(end.done() for end in ends)  # the first is still on its way
    sources[0].set_result(torch.tensor(0))
    assert (ends[0].wait(), ends[2].wait()) == (0, 2)
    with pytest.raises(RuntimeError, match="lost"):
        ends[1].wait()
    link.close()


def test_a_group_that_does_not_end_in_time_is_ended(monkeypatch):
    monkeypatch.setattr(scaling, "PRELOAD", "json")
    record = measure(2, 1, Deadline.after(-1.0))
    assert (record["status"], record["p50_ms"]) == ("failed", None)
    assert record["reason"] == "2 ranks did not come to an end in time"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return bench_small("scaling", tmp_path_factory.mktemp("results") / "new")


def test_real_ranks_send_what_the_model_says(small):
    (one, two), said = small
    assert [one["status"], two["status"]] == ["ok", "ok"]
    assert [one["case"], two["case"]] == ["ranks-1", "ranks-2"]
    size = 4 * adapter_parameters(ADAPTER)
    for record in (one, two):
        assert record["gradient_bytes"] == sum(record["bucket_bytes"]) == size
        assert len(record["bucket_bytes"]) > 4
        assert record["error"] <= EXACT
        assert len(record["rank_step_ms"]) == record["ranks"]
        assert record["cores"] >= 1
        assert record["gpu"] is None
        assert record["ready_ms"] == sorted(record["ready_ms"])
    assert two["sent_model"] == 2 * size
    if two["sent_bytes"] is not None:  # others may use the interface, too
        assert two["sent_bytes"] > 0.9 * two["sent_model"]
    assert 0 <= two["overlap_model"] < 1
    assert "2 records in" in said
