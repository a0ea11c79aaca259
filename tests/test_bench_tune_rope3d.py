"""The sweep of rotated attention's tiles and parts, on a CPU in Triton's interpreter."""

import json
from dataclasses import astuple, replace

import pytest
import torch

from bench import attempts
from bench.attempts import Turns
from bench.circumstances import circumstances
from bench.qformer_cases import SMALL, QFormerCase
from bench.tune_rope3d import (
    RESULTS,
    SPLIT,
    SWEEP,
    Rope3dTuning,
    Subject,
    Trial,
    other_parts,
    shapes,
)
from bench.tune_table import entries, fastest, line, parts_table
from csrc_triton import rope3d_attention, rope3d_attention_backward, tiles
from csrc_triton.rope3d import Transform
from csrc_triton.tiles import ROPE3D_KERNELS, Problem, Tile, choose_tile
from sda_fast import ops, reference
from sda_fast.hierarchy import Hierarchy

from .numerics import DTYPES
from .test_bench_tune import CPU, evaluated, needs_no_gpu, ran, record

CASE = SMALL[1]
# 6 queries of 2 heads, 36 keys: three blocks of 16
TINY = QFormerCase("op", 1, 6, 2, 16, Hierarchy((2, 1)), torch.float32)
LAUNCHERS = {
    "rope3d_forward": (rope3d_attention, "launch_rope3d_attention"),
    "rope3d_dq": (rope3d_attention_backward, "launch_rope3d_dq"),
    "rope3d_dkdv": (rope3d_attention_backward, "launch_rope3d_dkdv"),
}


def tuning():
    return Rope3dTuning(Turns(CPU, 1), small=True, about=circumstances(CPU))


def trial_of(r):
    return Trial(Tile(**r["tile"]), r["parts"], r["by_rule"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The command on a case with keys for several parts."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    return ran(CASE.name, tmp_path_factory.mktemp("results") / "new")


def test_the_suite_tries_every_tile_then_other_parts(small):
    records, said = small
    assert {(r["suite"], r["case"], r["op"]) for r in records} == {
        ("tune", CASE.name, "rope3d_attention")
    }
    assert {r["status"] for r in records} == {"ok"}
    assert f"{len(records)} records in" in said
    current, other = Tile(16, 16, 4, 1), Tile(16, 32, 4, 1)
    # three blocks, of 32 keys two
    rounds = {
        1: [Trial(current, 2), Trial(other, 1)],
        2: [Trial(current, 2), Trial(other, 1)]
        + [
            Trial(tile, parts, by_rule=False)
            for tile, parts in ((current, 1), (current, 3), (other, 2))
        ],
    }
    for kernel in SPLIT:
        for number, expected in rounds.items():
            mine = [r for r in records if (r["kernel"], r["round"]) == (kernel, number)]
            assert {trial_of(r) for r in mine} == set(expected)
            assert len(mine) == len(expected)
            for r in mine:
                assert r["current"] == (trial_of(r).tile == current)
                assert (r["tiles"], r["blocks"]) == (4, 3 if r["current"] else 2)
    last = [r for r in records if r["kernel"] == "rope3d_dkdv"]
    assert [trial_of(r) for r in last] == [Trial(current), Trial(other)]
    for r in records:
        assert 0 < r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"]


def test_what_is_printed_can_be_pasted(small):
    records, said = small
    printed = said[said.index("# ROPE3D_ENTRIES") :]
    found = evaluated(printed.splitlines())
    assert [entry.kernel for entry in found] == list(ROPE3D_KERNELS)
    for entry in found:
        best = fastest(records, entry.kernel, None)
        assert best["by_rule"]
        assert entry.tile == Tile(**best["tile"])
        assert (entry.implementation, entry.dtypes) == (None, (torch.float32,))
        # the table goes by the width of a row of a tile
        assert (entry.head_dims, entry.min_img, entry.min_batch_heads) == ((32,), 36, 4)
        assert f"{CASE.name} {best['p50_ms']:.4f} ms" in entry.chosen_by
        assert ("part" in entry.chosen_by) == (entry.kernel in SPLIT)
    rows = [row for row in printed.splitlines() if row.startswith(f"# | {CASE.name}")]
    shown = [("16-16-4-1-64", "3", parts, "2") for parts in "123"]
    shown += [("16-32-4-1-64", "2", parts, "1") for parts in "12"]
    wanted = [(kernel, *one) for kernel in SPLIT for one in shown]
    for (kernel, tile, blocks, parts, rule), row in zip(wanted, rows, strict=True):
        cells = [cell.strip() for cell in row.split("|")[2:-1]]
        assert cells[:7] == ["16", kernel, tile, "4", blocks, parts, str(4 * int(parts))]
        assert cells[-1] == ("its choice for 132 processors" if parts == rule else "")


def turns_of(args):
    [transforms] = [a for a in args if isinstance(a, tuple) and isinstance(a[0], Transform)]
    return transforms


@needs_no_gpu
def test_the_rule_s_trial_is_what_the_operator_launches(kernels, monkeypatch):
    launched = {}
    for kernel, (module, name) in LAUNCHERS.items():
        launch = getattr(module, name)

        def spy(*args, launch=launch, kernel=kernel):
            launched[kernel] = args
            return launch(*args)

        monkeypatch.setattr(module, name, spy)
    subject = Subject.of(TINY, CPU)
    leaves = [t.requires_grad_() for t in subject.inputs[:3]]
    out = ops.rope3d_attention(*leaves, *TINY.places(CPU))
    torch.autograd.grad(out, leaves, subject.inputs[3])
    by_operator = dict(launched)
    for kernel in ROPE3D_KERNELS:
        tile = choose_tile(kernel, "", subject.problem)
        subject.kernel_step(kernel, subject.by_rule(kernel, tile))()
        mine, theirs = launched[kernel], by_operator[kernel]
        assert len(mine) == len(theirs)
        for a, b in zip(*(turns_of(args) for args in (mine, theirs)), strict=True):
            assert a.coords.equal(b.coords)
            assert a.pairs.equal(b.pairs)
            assert a.weight is b.weight is None
        plain = [[a for a in args if isinstance(a, int | float | Tile)] for args in (mine, theirs)]
        assert plain[0] == plain[1]
        assert plain[0][-1] == tile
        assert kernel not in SPLIT or plain[0][-2] == 2


@needs_no_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_result_of_every_kernel_is_checked(dtype, kernels):
    subject = Subject.of(replace(TINY, dtype=dtype), CPU)
    for kernel, names in RESULTS.items():
        trial = Trial(Tile(16, 16, 4, 1), 2 if kernel in SPLIT else None)
        results = subject.kernel_step(kernel, trial)()
        assert subject.faults(names, results) == []
        for i, name in enumerate(names):
            for spoil in (lambda t: t.mul_(1.1), lambda t: t.view(-1)[-1:].fill_(torch.nan)):
                spoilt = [t.clone() for t in results]
                spoil(spoilt[i])
                [fault] = subject.faults(names, spoilt)
                assert fault.startswith(f"{name} is off by")
            short = [t[:0] if j == i else t for j, t in enumerate(results)]
            [fault] = subject.faults(names, short)
            assert fault.startswith(f"{name} is [0")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lse_is_held_to_plain_torch_and_to_turned_keys(dtype):
    case = replace(TINY, dtype=dtype)
    subject, places = Subject.of(case, CPU), case.places(CPU)
    q, k, v, _ = subject.inputs
    lse = lambda *places: reference.rope3d_attention(q, k, v, *places, return_lse=True)[1]
    assert subject.faults(["lse"], [lse(*places)]) == []
    for wrong in (lse(None, None), lse(places[0], places[1].flip(0)), lse(*places) * 1.4427):
        [fault] = subject.faults(["lse"], [wrong])
        assert fault.startswith("lse is off by")


@needs_no_gpu
def test_a_wrong_tile_or_number_of_parts_is_recorded_and_never_timed(kernels, monkeypatch):
    module, name = LAUNCHERS["rope3d_forward"]
    launch = getattr(module, name)
    other = shapes("rope3d_forward", Tile(16, 16, 4, 1), small=True)[1]

    def wrong(*args):
        out, lse = launch(*args)
        *_, parts, tile = args
        if tile == other:
            out.mul_(1.01)
        elif parts == 1:
            lse.add_(0.01)
        return out, lse

    timed = []
    turns = attempts.take_turns
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(
        attempts, "take_turns", lambda steps, *rest: timed.append(len(steps)) or turns(steps, *rest)
    )
    found = list(tuning().measure(TINY))
    json.dumps(found, allow_nan=False)
    bad = [r for r in found if r["status"] != "ok"]
    assert [(trial_of(r).tile == other, r["parts"], r["round"]) for r in bad] == [
        (True, 1, 1), (False, 1, 2)
    ]  # fmt: skip
    for r, what in zip(bad, ("out", "lse"), strict=True):
        assert (r["status"], r["reps"], r["p50_ms"]) == ("failed", 0, None)
        assert r["reason"].startswith(f"wrong: {what} is off by")
        assert f"in 1     failed: {r['reason']}" in line(r)
    # of two tiles one was right, then of three numbers of parts two
    assert timed[:2] == [1, 2]
    best = fastest(found, "rope3d_forward", None)
    assert (best["parts"], best["current"], best["round"]) == (2, True, 2)
    assert evaluated(entries(found))[0].tile == Tile(16, 16, 4, 1)
    rows = [row for row in parts_table(found) if "rope3d_forward" in row]
    assert [row.split("|")[7].strip() for row in rows] == ["2", "3"]


@needs_no_gpu
def test_when_time_is_over_what_was_timed_still_counts(kernels, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(Turns, "is_late", lambda self: bool(found))
    for r in tuning().measure(TINY):
        found.append(r)
    states = [(r["kernel"], r["round"], r["status"]) for r in found]
    assert states[:2] == [("rope3d_forward", 1, "ok")] * 2
    assert set(states[2:]) == {("rope3d_forward", 2, "skipped")}
    assert fastest(found, "rope3d_forward", None) in found[:2]
    assert parts_table(found) == []
    assert "no time left for rope3d_dq" in capsys.readouterr().out


def bare(**sizes):
    """A Subject that knows its sizes only."""
    return Subject(QFormerCase("op", **sizes), [torch.empty(0)], (), None)


@pytest.mark.parametrize(
    ("sizes", "tile", "numbers"),
    [
        # 16 tiles, 22 blocks; 12 and 16 parts would leave some without keys
        ({"batch": 1, "side": 37}, (128, 64), [8, 1, 4, 11, 22]),
        ({"batch": 1, "side": 37}, (64, 64), [4, 1, 2, 6, 8, 11]),
        ({"batch": 1, "side": 27}, (128, 128), [3, 1, 6]),
        # more tiles than processors
        ({"batch": 16, "side": 64}, (128, 64), [1, 2, 3, 4]),
        ({"batch": 1, "side": 4}, (128, 64), [1]),
    ],
)
def test_the_parts_that_are_tried_all_have_keys(sizes, tile, numbers):
    subject, tile = bare(**sizes), Tile(*tile, 8, 2)
    trials = other_parts(subject, "rope3d_forward", tile)
    assert [trial.parts for trial in trials] == numbers
    assert [trial.by_rule for trial in trials] == [True, *[False] * (len(numbers) - 1)]
    _, blocks, _ = subject.sizes(tile)
    for number in numbers[1:]:
        in_each = -(-blocks // number)
        assert (number - 1) * in_each < blocks <= number * in_each


def test_the_sweep_begins_with_the_table_and_holds_tiles_that_can_be_launched():
    for kernel in ROPE3D_KERNELS:
        current = choose_tile(kernel, "", Problem(torch.bfloat16, 64, 128, 1369, 16))
        found = shapes(kernel, current, small=False)
        assert found[0] == current
        assert len(found) == len(set(found)) == len(SWEEP[kernel])
        for tile in found:
            assert all(n & (n - 1) == 0 for n in astuple(tile)[:3])
            # a warpgroup multiplies 64 rows
            assert (tile.block_n if kernel == "rope3d_dkdv" else tile.block_m) >= 64


def timed(ms, parts, m=128, case="op-b1-s1369", **more):
    shape = {"block_m": m, "block_n": 64, "num_warps": 8, "num_stages": 2, "block_masked": 64}
    split = {"tiles": 16, "blocks": 22, "processors": 132, "parts": parts, "by_rule": parts == 8}
    about = {"implementation": None, "round": 2, "head_dim": 64, "width": 64, "num_img": 1369,
             "batch_heads": 16, "tile": shape}  # fmt: skip
    return record("rope3d_forward", ms, case, **(about | split | more))


def test_the_rule_decides_the_tile_and_the_table_what_the_rule_costs(monkeypatch):
    found = [
        timed(0.5, 8, round=1), timed(3.0, 8, m=64, current=True), timed(1.0, 8, m=64, round=1),
        timed(2.0, 8), timed(1.0, 11), timed(4.0, 1), timed(0.5, 22, m=64),
        timed(None, 4, status="failed"), timed(9.0, 8, m=32),
    ]  # fmt: skip
    assert fastest(found, "rope3d_forward", None) == found[3]
    [entry] = evaluated(entries(found))
    assert entry.tile == Tile(128, 64, 8, 2)
    assert entry.chosen_by.endswith(
        "op-b1-s1369 2.0000 ms in 8 parts, before 3.0000 ms with Tile(64, 64, 8, 2, 64) in 8 parts"
    )
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in parts_table(found)]
    assert [row[3:9:2] + row[9:] for row in rows[2:]] == [
        ["64-64-8-2-64", "22", "128" , "6.00", "its choice for 132 processors"],
        ["64-64-8-2-64", "22", "352", "1.00", ""],
        ["128-64-8-2-64", "22", "16", "4.00", ""],
        ["128-64-8-2-64", "22", "128", "2.00", "its choice for 132 processors"],
        ["128-64-8-2-64", "22", "176", "1.00", ""],
    ]  # fmt: skip
    assert parts_table([]) == []
    pasted = evaluated(entries([*found, timed(1.0, 8, m=64, batch_heads=256, case="op-b16-s1369")]))
    monkeypatch.setattr(tiles, "ROPE3D_ENTRIES", (*pasted, *tiles.ROPE3D_ENTRIES))
    for batch_heads, m in ((16, 128), (64, 128), (256, 64), (1024, 64)):
        problem = Problem(torch.bfloat16, 64, 128, 4096, batch_heads)
        assert choose_tile("rope3d_forward", "", problem).block_m == m
