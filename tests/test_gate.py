"""The compile gate: tiles that break a promise, planted one by one, are named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gate import TABLE

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import torch, triton
from bench import gate_worker as gate
from csrc_triton.tiles import Tile, forced

triton.runtime.driver.set_active(gate.Target())
triton.knobs.nvidia.dump_ptxas_log = True
layout = gate.Layout(gate.TREE.tokens_per_node, 64, 64, "overlap", 0, 2, ())
found = {}
for name, sizes in json.loads(sys.argv[1]).items():
    with forced(forward=Tile(*sizes)):
        words, launch, tensor_cores = gate._joint_launch(
            "forward", "fused", layout, torch.bfloat16, 128
        )
        [(compiled, log)] = gate._compile(launch)
    found[name] = gate._examine(words, compiled, log, tensor_cores).faults
print(json.dumps(found))
"""
PLANTED = {
    "none": (128, 128, 8, 2),
    "spills": (128, 128, 4, 2),
    "shared memory": (128, 128, 8, 4),
    "no tensor cores of Hopper": (32, 64, 4, 2),
}


@pytest.fixture(scope="module")
def faults():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(PLANTED)],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=300,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "TRITON_ALWAYS_COMPILE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("planted", "named"),
    [("spills", "spills"), ("shared memory", "bytes of shared memory, the limit is 232448"),
     ("no tensor cores of Hopper", "no HGMMA"), ("no tensor cores of Hopper", "HMMA")],
)  # fmt: skip
def test_a_broken_promise_is_named(faults, planted, named):
    assert any(named in fault for fault in faults[planted]), faults[planted]


def test_the_tile_of_the_table_breaks_none(faults):
    assert faults["none"] == []


def test_the_table_is_kept_and_knows_both_versions_of_triton():
    rows = [line.split("|")[1:-1] for line in TABLE.read_text().splitlines() if "|" in line][2:]
    versions = {row[1].strip() for row in rows}
    assert "3.6.0" in versions
    assert len(versions) == 2
    assert all(row[3].strip() == "0" for row in rows), "a spill stands in the table"
