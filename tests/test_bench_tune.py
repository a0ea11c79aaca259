"""The sweep of joint attention's tiles, on a CPU in Triton's interpreter."""

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import astuple, replace
from itertools import product

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import attempts, tune, tune_joint
from bench.__main__ import main as bench
from bench.attempts import Attempt, Turns, run
from bench.cases import Case
from bench.circumstances import circumstances
from bench.measure import Deadline
from bench.records import read_records
from bench.suite import DeviceLost
from bench.tune_joint import NARROW_SWEEP, SWEEP, JointTuning, Subject, shapes, with_masked
from bench.tune_table import entries, fastest, line, preferred
from csrc_triton import joint_attention, tiles
from csrc_triton.tiles import (
    IMPLEMENTATIONS,
    KERNELS,
    ROPE3D_KERNELS,
    Entry,
    Problem,
    Tile,
    choose_tile,
)
from sda_fast.hierarchy import Hierarchy

from .test_bench_measure import ROOT, plain_environment

CPU = torch.device("cpu")
TINY = Case("tiny", 4, 4, Hierarchy((2, 1)), heads=2, head_dim=16, dtype=torch.float32)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def evaluated(lines):
    """What the printed lines mean where they are pasted."""
    names = {"Entry": Entry, "Preference": tiles.Preference, "Tile": Tile, "torch": torch}
    return eval("(" + "\n".join(lines) + "\n)", names)


def ran(cases, out):
    """Records and printed lines of the command, in this process."""
    options = ["--small", "--cases", cases, "--reps", "1", "--out", str(out), "--commit", "c0ffee"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setitem(tune.CASES, TINY.name, TINY)
        with pytest.raises(SystemExit) as stop:
            bench(["tune", *options])
    assert stop.value.code == 0, said.getvalue()
    return read_records(out / "tune.jsonl"), said.getvalue()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The smallest case of each operator."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    return ran(f"{TINY.name},{tune.SMALL_OPS[0].name}", tmp_path_factory.mktemp("results") / "new")


def test_a_user_s_process_runs_the_suite_to_its_end(tmp_path):
    case = tune.SMALL_OPS[0].name
    options = ["--small", "--cases", case, "--reps", "1", "--out", str(tmp_path / "new")]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tune", *options],
        cwd=ROOT, env=plain_environment(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1"),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "new" / "tune.jsonl")
    assert {(r["case"], r["status"]) for r in records} == {(case, "ok")}
    assert f"{len(records)} records in" in done.stdout
    assert "# ROPE3D_ENTRIES" in done.stdout


def test_in_the_interpreter_the_suite_runs_to_its_end(small):
    every, said = small
    assert {r["status"] for r in every} == {"ok"}
    records = [r for r in every if r["op"] == "hierarchical_attention"]
    others = every[len(records) :]
    assert {r["op"] for r in others} == {"rope3d_attention"}
    assert list(dict.fromkeys(r["kernel"] for r in others)) == [*ROPE3D_KERNELS]
    sweeps = [(r["implementation"], r["kernel"]) for r in records if r["kernel"]]
    assert list(dict.fromkeys(sweeps)) == [(i, k) for i in IMPLEMENTATIONS for k in KERNELS]
    passes = [(r["pass"], r["implementation"]) for r in records if not r["kernel"]]
    assert passes == [(d, i) for d in ("forward", "backward") for i in IMPLEMENTATIONS]
    for record in records:
        assert (record["suite"], record["case"]) == ("tune", TINY.name)
        assert 0 < record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
        assert (record["reps"], record["gpu"], record["nvml"]) == (1, None, None)
    assert f"{len(every)} records in" in said


def test_the_smallest_forward_tile_is_among_those_that_pass(small):
    for implementation in IMPLEMENTATIONS:
        found = [
            Tile(**r["tile"])
            for r in small[0]
            if (r["kernel"], r["implementation"], r["status"]) == ("forward", implementation, "ok")
        ]
        assert {Tile(16, 16, 4, 1, 16), Tile(16, 16, 8, 1, 16)} <= set(found)


def test_what_is_printed_can_be_pasted(small):
    records, said = small
    _, table, rest, _ = re.split(r"\n# ENTRIES|\n# PREFERRED|\n# ROPE3D_ENTRIES", said)
    found = evaluated(table.splitlines())
    assert [(e.kernel, e.implementation) for e in found] == [
        (kernel, implementation) for kernel in KERNELS for implementation in IMPLEMENTATIONS
    ]
    for entry in found:
        best = fastest(records, entry.kernel, entry.implementation)
        assert entry.tile == Tile(**best["tile"])
        assert (entry.dtypes, entry.head_dims) == ((torch.float32,), (TINY.head_dim,))
        for part in (f"torch {torch.__version__}", "triton", "commit", best["case"], "before"):
            assert part in entry.chosen_by
        assert f" {best['p50_ms']:.4f} ms" in entry.chosen_by
    choices = evaluated(rest.splitlines())
    assert [choice.direction for choice in choices] == ["forward", "backward"]
    for choice in choices:
        times = {r["implementation"]: r["p50_ms"] for r in records
                 if (r["pass"], r["kernel"]) == (choice.direction, None)}  # fmt: skip
        assert choice.implementation == min(times, key=times.get)
        assert choice.dtypes == (torch.float32,)
        assert TINY.name in choice.chosen_by


def tuning(**options):
    return JointTuning(Turns(CPU, 1, **options), small=True, about=circumstances(CPU))


def records_of(found, kernel, implementation):
    return {
        (Tile(**r["tile"]), r["round"]): r
        for r in found
        if (r["kernel"], r["implementation"]) == (kernel, implementation)
    }


def spoiled(launch, spoil):
    """A launcher that calls `spoil(results, tile)` on what it has written."""

    def wrong(*args):
        results = launch(*args)
        [tile] = [arg for arg in args if isinstance(arg, Tile)]
        spoil(args, results, tile)
        return results

    return wrong


@needs_no_gpu
def test_a_wrong_tile_is_recorded_and_never_timed(kernels, monkeypatch):
    """out of one tile is a little too large; another asks for more memory than there is."""
    wrong, large = shapes("forward", Tile(16, 16, 8, 1, 16), 16, small=True)[1:]

    def spoil(args, _lse, tile):
        if tile == wrong:
            args[3].mul_(1.01)
        if tile == large:
            raise OutOfResources(294912, 232448, "shared memory")

    timed = []
    turns = attempts.take_turns
    launch = spoiled(joint_attention.launch_joint_attention, spoil)
    monkeypatch.setattr(joint_attention, "launch_joint_attention", launch)
    monkeypatch.setattr(
        attempts, "take_turns", lambda steps, *rest: timed.append(len(steps)) or turns(steps, *rest)
    )
    found = list(tuning().measure(TINY))
    json.dumps(found, allow_nan=False)
    for implementation in IMPLEMENTATIONS:
        mine = records_of(found, "forward", implementation)
        bad, refused = mine[wrong, 1], mine[large, 1]
        assert bad["status"] == "failed"
        assert bad["reason"].startswith("wrong: out is off by")
        assert refused["status"] == "refused"
        assert "shared memory, Required: 294912" in refused["reason"]
        for record in (bad, refused):
            assert (record["reps"], record["p50_ms"]) == (0, None)
            assert f"{record['status']}: {record['reason']}" in line(record)
        assert fastest(found, "forward", implementation)["current"]
    # of three forward tiles one was right
    assert timed[0] == timed[3] == 1
    assert all(entry.tile not in (wrong, large) for entry in evaluated(entries(found))[:2])


@needs_no_gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_result_of_every_kernel_is_checked(implementation, kernels):
    subject = Subject.of(TINY, CPU)
    for kernel, names in tune_joint.RESULTS.items():
        [tile, *_] = shapes(kernel, Tile(16, 16, 4, 1, 16), 16, small=True)
        results = subject.kernel_step(kernel, implementation, tile)()
        assert subject.faults(names, results) == []
        for i, name in enumerate(names):
            for spoil in (lambda t: t.mul_(1.01), lambda t: t.view(-1)[-1:].fill_(torch.nan)):
                spoilt = [t.clone() for t in results]
                spoil(spoilt[i])
                [fault] = subject.faults(names, spoilt)
                assert fault.startswith(f"{name} is off by")


def fixed_times(monkeypatch, ms):
    """Nothing is timed: a step takes as long as `ms` says of its place."""
    monkeypatch.setattr(
        attempts, "take_turns", lambda steps, *_: {name: [ms(int(name))] for name in steps}
    )


@needs_no_gpu
def test_the_fastest_shape_is_tried_with_other_masked_blocks(kernels, monkeypatch):
    fixed_times(monkeypatch, lambda place: 9.0 - place)  # the last one wins
    found = list(tuning().measure(TINY))
    mine = records_of(found, "forward", "fused")
    table, small, wide = shapes("forward", Tile(16, 16, 8, 1, 16), 16, small=True)
    assert {tile for tile, number in mine if number == 1} == {table, small, wide}
    other = replace(wide, block_masked=32)
    assert [tile for tile, number in mine if number == 2] == [wide, table, other]
    assert Tile(**fastest(found, "forward", "fused")["tile"]) == other
    passes = [r for r in found if r["kernel"] is None and r["implementation"] == "fused"]
    assert passes[0]["tiles"] == {"forward": mine[other, 2]["tile"]}
    assert passes[1]["tiles"].keys() == {"dq", "dkdv"}
    assert passes[1]["flops"] == 2.5 * passes[0]["flops"] > 0


def test_near_the_limit_nothing_more_is_begun(tmp_path, capsys):
    late = tuning(deadline=Deadline.after(1), reserve_s=100)
    assert run(late.turns, late.measure, [TINY, TINY], tmp_path / "t.jsonl") == []
    assert capsys.readouterr().out.count("no time left for tiny-b1-tree2.1, D = 16") == 2
    assert not (tmp_path / "t.jsonl").exists()
    assert list(late.measure(TINY)) == [] or pytest.fail("a sweep was begun")
    attempt = Attempt(lambda: pytest.fail("set up"), lambda _: [], {"tile": 1})
    [record] = late.turns.time_all([attempt])
    assert (record["status"], record["reason"]) == ("skipped", "no time was left")


def test_a_lost_device_ends_the_run_and_what_is_known_stays(monkeypatch):
    alive = iter([True, False])
    monkeypatch.setattr(Turns, "_alive", lambda self: next(alive))

    def broken():
        raise RuntimeError("an illegal\n  memory access")

    made = [lambda: tuple, broken, broken, lambda: tuple]
    work = [Attempt(make, lambda _: [], {"place": i}) for i, make in enumerate(made)]
    records = []
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        list(map(records.append, Turns(CPU, 1).time_all(work)))
    assert [r["status"] for r in records] == ["failed", "failed", "failed", "skipped"]
    assert records[1]["reason"] == "RuntimeError: an illegal memory access"
    assert all(r["p50_ms"] is None for r in records)


def test_the_sweep_begins_with_the_table_and_holds_tiles_that_can_be_launched():
    for kernel, head_dim in product(KERNELS, (64, 128)):
        current = choose_tile(kernel, "fused", Problem(torch.bfloat16, head_dim, 128, 4096, 24))
        found = shapes(kernel, current, head_dim, small=False)
        assert found[0] == current
        more = len(NARROW_SWEEP[kernel]) if head_dim == 64 else 0
        assert len(found) == len(set(found)) == len(SWEEP[kernel]) + more
        for tile in found:
            assert all(n & (n - 1) == 0 for n in astuple(tile)[:3])
            for one in (tile, *with_masked(kernel, tile)):
                inner = one.block_m if kernel == "dkdv" else one.block_n
                assert inner % one.block_masked == 0
                assert replace(one, block_masked=tile.block_masked) == tile


def record(kernel, ms, case="flux-1024-b1", **more):
    about = {
        "kernel": kernel, "pass": "forward", "implementation": "fused", "case": case,
        "head_dim": 128, "dtype": "bfloat16", "num_img": 4096, "batch_heads": 24, "round": 1,
        "status": "ok", "p50_ms": ms, "current": False, "gpu": "NVIDIA H100 80GB HBM3",
        "torch": "2.11", "triton": "3.6", "run": "2026-01-02T03:04:05Z", "commit": "c",
        "tile": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 3, "block_masked": 64},
    }  # fmt: skip
    return about | more


def test_entries_are_read_as_they_were_measured(monkeypatch):
    """Each case gets its own best tile back from the table it was pasted into."""
    shape = lambda m: {"block_m": m, "block_n": 64, "num_warps": 8, "num_stages": 2,
                       "block_masked": 64}  # fmt: skip
    measured = {16: (1024, 24), 32: (4096, 24), 64: (16384, 24), 128: (4096, 96)}
    found = []
    for m, (num_img, batch_heads) in measured.items():
        size = {"num_img": num_img, "batch_heads": batch_heads, "case": f"case{m}"}
        found.append(record("dq", 2.0, current=True, **size))
        found.append(record("dq", 1.0, **size, tile=shape(m)))
        found.append(record("dq", 0.5, **size, status="failed") | {"p50_ms": None})
    others = [
        Problem(torch.bfloat16, 128, 128, 512, 24),
        Problem(torch.bfloat16, 64, 128, 4096, 24),
    ]
    standing = [choose_tile("dq", "fused", other) for other in others]
    pasted = evaluated(entries(found))
    monkeypatch.setattr(tiles, "ENTRIES", (*pasted, *tiles.ENTRIES))
    for m, (num_img, batch_heads) in measured.items():
        problem = Problem(torch.bfloat16, 128, 128, num_img, batch_heads)
        assert choose_tile("dq", "fused", problem).block_m == m
        [entry] = [entry for entry in pasted if entry.tile.block_m == m]
        assert entry.chosen_by == (
            f"2026-01-02, NVIDIA H100 80GB HBM3, torch 2.11, triton 3.6, commit c: case{m} "
            "1.0000 ms, before 2.0000 ms with Tile(64, 64, 4, 3, 64)"
        )
    assert [choose_tile("dq", "fused", other) for other in others] == standing


def test_the_last_round_decides():
    found = [
        record("dq", 1.0),
        record("dq", 1.5, round=2, current=True),
        record("dq", 1.4, round=2),
    ]
    assert fastest(found, "dq", "fused")["p50_ms"] == 1.4
    assert fastest(found, "dq", "split") is None
    assert entries([record("dq", None, status="failed")]) == []


def test_auto_takes_what_won_each_case(monkeypatch):
    times = {1024: {"fused": 1.0, "split": 1.1}, 16384: {"fused": 1.1, "split": 1.0}}
    found = [
        record(None, ms, f"case{num_img}", implementation=name, num_img=num_img)
        for num_img, both in times.items()
        for name, ms in both.items()
    ]
    pasted = evaluated(preferred(found))
    assert [choice.min_img for choice in pasted] == [16384, 1024]
    assert "case16384 split 1.0000 ms, fused 1.1000 ms" in pasted[0].chosen_by
    monkeypatch.setattr(tiles, "PREFERRED", (*pasted, *tiles.PREFERRED))
    sizes = {512: "fused", 1024: "fused", 4096: "fused", 16384: "split", 65536: "split"}
    for num_img, winner in sizes.items():
        problem = Problem(torch.bfloat16, 128, 128, num_img, 24)
        assert tiles.choose_implementation("forward", problem) == winner
        assert tiles.choose_implementation("backward", problem) == "fused"
    assert preferred([]) == []


@needs_no_gpu
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cases", "flux-1"], "got 'flux-1'"),
        (["--small", "--head-dims", "16,48"], "head-dims must be of 16, 32, 64, 128, got '16,48'"),
        (["--small"], "there is no CUDA device; with TRITON_INTERPRET=1 --small goes"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench(["tune", *options, "--out", str(tmp_path / "new")])
    assert stop.value.code == 2
    assert says in capsys.readouterr().out
    assert not (tmp_path / "new").exists()
