import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench.circumstances import circumstances
from bench.measure import Deadline, Graph, attention_step, peak_bytes, quantiles, take_turns
from bench.nvml import THROTTLE, card
from bench.records import read_records, versions
from bench.roofs import measure_roofs

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_variants_take_turns_in_an_order_that_rotates():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "abc"}
    times = take_turns(steps, CPU, reps=4)
    assert "".join(called) == "abc" + "abc" + "bca" + "cab" + "abc"  # warm-ups first
    assert {name: len(ms) for name, ms in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert all(ms >= 0 for of_one in times.values() for ms in of_one)
    assert take_turns({}, CPU, reps=4) == {}


def test_each_turn_is_booked_on_who_had_it(monkeypatch):
    """A clock that the variants themselves move, by 1 and by 100 ms."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr("bench.measure.time.perf_counter", lambda: clock.now)

    def tick(seconds):
        clock.now += seconds

    times = take_turns({"short": lambda: tick(0.001), "long": lambda: tick(0.1)}, CPU, reps=5)
    assert times["short"] == pytest.approx([1] * 5)
    assert times["long"] == pytest.approx([100] * 5)


def test_a_deadline_ends_the_turns_after_a_whole_round():
    passed, open_ended = Deadline.after(-1), Deadline()
    assert passed.left() < 0
    assert open_ended.left() == math.inf
    assert 0 < Deadline.after(1000).left() <= 1000
    steps = {"a": lambda: None, "b": lambda: None}
    assert take_turns(steps, CPU, 50, passed).keys() == {"a", "b"}
    assert [len(ms) for ms in take_turns(steps, CPU, 50, passed).values()] == [1, 1]
    assert [len(ms) for ms in take_turns(steps, CPU, 7, open_ended).values()] == [7, 7]


def test_quantiles_do_not_depend_on_the_order():
    assert quantiles([3.0, 1, 2, 5, 4, 0]) == (1, 2.5, 4)
    assert quantiles([7.0]) == (7, 7, 7)
    with pytest.raises(ValueError, match="at least one"):
        quantiles([])


def test_a_step_returns_what_the_pass_computes():
    inputs = [torch.randn(1, 3, 2, 4) for _ in range(4)]
    attend = lambda q, k, v: q * k + 2 * v
    (out,) = attention_step(attend, inputs, backward=False)()
    assert out.equal(inputs[0] * inputs[1] + 2 * inputs[2])
    assert not out.requires_grad
    again, dq, dk, dv = attention_step(attend, inputs, backward=True)()
    assert again.equal(out)
    assert dq.equal(inputs[1] * inputs[3])
    assert dk.equal(inputs[0] * inputs[3])
    assert dv.equal(2 * inputs[3])
    assert all(t.grad is None and not t.requires_grad for t in inputs)


def test_off_the_gpu_there_is_no_peak_and_no_card():
    assert peak_bytes(lambda: torch.zeros(10), CPU) is None
    assert card(CPU) is None


def test_roofs_are_rates_of_what_was_moved(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("bench.roofs.take_turns", lambda steps, *_: {name: [2.0] for name in steps})
        roofs = measure_roofs(CPU)
    assert roofs == {"copy": 2 * (16 << 20) / 2e-3, "matmul": 2 * 512**3 / 2e-3}
    assert all(rate > 0 for rate in measure_roofs(CPU, reps=1).values())


class NVMLError(Exception):
    pass


def unsupported(*_):
    raise NVMLError


@pytest.fixture
def nvml(monkeypatch):
    """A card with two reasons to be slow, one of them idleness, that tells no temperature."""
    module = types.SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda handle, clock: {1: 1755, 2: 2619}[clock],
        nvmlDeviceGetPowerUsage=lambda handle: 431_500,
        nvmlDeviceGetTemperature=unsupported,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1 | THROTTLE["sw_power_cap"],
        nvmlDeviceGetName=lambda handle: b"card " + handle.encode(),
        nvmlSystemGetDriverVersion=lambda: "580.1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    about = types.SimpleNamespace(uuid="1-2-3")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: about)
    return module


def test_a_card_tells_what_it_can(nvml):
    assert card(torch.device("cuda", 0)) == {
        "gpu": "card GPU-1-2-3",
        "driver": "580.1",
        "sm_clock_mhz": 1755,
        "memory_clock_mhz": 2619,
        "power_w": 431.5,
        "temperature_c": None,
        "throttle": ["sw_power_cap"],
    }


def test_without_a_driver_there_is_no_card(nvml):
    nvml.nvmlInit = unsupported
    assert card(torch.device("cuda", 0)) is None
    nvml.nvmlInit, nvml.nvmlDeviceGetHandleByUUID = lambda: None, unsupported
    assert card(torch.device("cuda", 0)) is None


def test_circumstances_are_json_and_leave_out_what_is_not_installed():
    about = json.loads(json.dumps(circumstances(CPU), allow_nan=False))
    assert about["gpu"] is None
    assert about["torch"] == torch.__version__
    assert about["commit"]
    assert about["run"].endswith("Z")
    found = versions(("torch", "no-such-distribution"))
    assert found.keys() == {"torch", "sda-fast"}


def bench_small(suite, out):
    """The records and output of a whole suite on a CPU, as a user runs it."""
    options = ["--small", "--reps", "2", "--out", str(out), "--commit", "c0ffee"]
    done = subprocess.run(
        [sys.executable, "-m", "bench", suite, *options],
        cwd=ROOT, env=plain_environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return read_records(out / f"{suite}.jsonl"), done.stdout


def plain_environment(**more):
    """Without the interpreter, as a user's shell has it."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def test_pytest_bench_passes():
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=plain_environment(),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.fixture
def h100(tmp_path):
    """bench/h100.sh with an interpreter that only notes how it was called."""
    fake = tmp_path / "python"
    fake.write_text(
        f'#!/bin/sh\necho "$PYTHONPATH $*" >>{tmp_path}/calls\necho "ran $3"\n'
        'case "$*" in *fails*) exit 3;; *pytest*) exit "${TESTS:-0}";; esac\n'
    )
    fake.chmod(0o755)

    def run(*suites, **environment):
        (tmp_path / "calls").unlink(missing_ok=True)
        out = tmp_path / "results"
        done = subprocess.run(
            [ROOT / "bench/h100.sh", *suites],
            env=plain_environment(PYTHON=str(fake), OUT=str(out), PYTHONPATH="", **environment),
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        calls = tmp_path / "calls"
        return done, calls.read_text().splitlines() if calls.exists() else [], out

    return run


def test_the_gpu_script_tests_first_and_shares_the_time(h100):
    done, calls, out = h100("attention --reps 5", "tune", LIMIT_S="240", COMMIT="c0ffee")
    assert done.returncode == 0, done.stderr
    both = "tests/test_joint_gpu.py tests/test_bench_measure.py tests/test_rope3d_gpu.py"
    assert calls[0].startswith(f"{ROOT} -m pytest {both}")
    assert " -m gpu " in calls[0]
    assert calls[1].startswith(f"{ROOT} -m pytest tests/test_joint_kernels.py tests/test_joint_")
    assert calls[1].count("test_joint_kernels") == 1
    limits = []
    for call, suite in zip(calls[2:], ("attention --reps 5", "tune"), strict=True):
        head, _, rest = call.partition(" --limit-s ")
        assert head == f"{ROOT} -m bench {suite} --out {out}"
        limit, commit = rest.split(maxsplit=1)
        assert commit == "--commit c0ffee"
        limits.append(int(limit))
    # half of what is left, then all of it, each less what imports may take
    assert limits[0] <= 240 // 2 - 25 < limits[1] <= 240 - 25
    assert sorted(p.name for p in out.iterdir()) == [
        "attention.log", "gpu-tests.log", "kernel-tests.log", "tune.log",
    ]  # fmt: skip
    assert (out / "attention.log").read_text() == "ran attention\n"


def test_the_gpu_script_goes_on_after_a_failure_and_says_so_in_the_end(h100):
    done, calls, _ = h100("attention", TESTS="1", LIMIT_S="200", WORKERS="4")
    assert calls[1].endswith("-n 4")
    assert done.returncode == 1
    assert len(calls) == 3
    done, calls, _ = h100("attention --fails", "tune", LIMIT_S="400")
    assert done.returncode == 3
    assert len(calls) == 4
    assert "attention ended with 3" in done.stdout


def test_the_gpu_script_leaves_all_time_to_the_suites_once_tests_have_run(h100):
    _, calls, _ = h100("flux", "flux-train", LIMIT_S="540", TESTS_S="0")
    assert [call.split()[3] for call in calls] == ["flux", "flux-train"]
    assert int(calls[1].split(" --limit-s ")[1].split()[0]) > 500


def test_the_gpu_script_begins_nothing_that_has_no_time(h100):
    done, calls, _ = h100("attention", LIMIT_S="50")
    assert done.returncode == 124
    assert len(calls) == 2
    assert "attention was not run" in done.stdout
    done, calls, _ = h100()
    assert done.returncode == 2
    assert not calls
    assert "usage" in done.stderr


@pytest.mark.parametrize(
    "suite", ["attention", "qformer", "encode", "flux", "flux-train", "training", "tune"]
)
def test_the_gpu_script_tests_what_a_suite_times_by_files_that_are_there(h100, suite):
    _, calls, _ = h100(suite, LIMIT_S="200")
    assert len(calls) == 3
    for call in calls[:2]:
        files = [word for word in call.split() if word.startswith("tests/")]
        assert files
        assert all((ROOT / file).is_file() for file in files)


@gpu
@pytest.mark.gpu
def test_a_graph_replays_into_what_it_returned():
    x, y = torch.randn(64, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    pool = torch.cuda.graph_pool_handle()
    graph = Graph(lambda: (x @ y, x + y, x.new_empty(5)), pool)
    product, total, unwritten = graph.fresh()
    assert torch.allclose(product, x @ y)
    assert total.equal(x + y)
    assert unwritten.isnan().all()
    x.fill_(1)
    assert graph()[1].equal(1 + y)


@gpu
@pytest.mark.gpu
def test_the_gpu_is_timed_by_events_and_its_memory_counted():
    device = torch.device("cuda", torch.cuda.current_device())
    large, small = (torch.randn(n, n, device=device) for n in (4096, 256))
    times = take_turns({"large": lambda: large @ large, "small": lambda: small @ small}, device, 9)
    assert quantiles(times["large"])[1] > quantiles(times["small"])[1] > 0
    peak = peak_bytes(lambda: torch.zeros(1 << 20, device=device), device)
    assert peak == 4 << 20
