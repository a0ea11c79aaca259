"""Compile every tile for Hopper on a machine without a GPU, and hold it to what Hopper needs.

``python -m bench gate`` runs the launchers themselves on tensors without memory, under a driver
that knows the target sm_90a and nothing else, and reads what the assembler made: tensor core
instructions (HGMMA, never HMMA), registers, spills, shared memory, atomics, tf32, serialised wgmma
(C75xx). The table of all kernels is kept in results/gate.md, so that a change shows in a diff.
It speaks of what FLUX and the adapter bring: strides that are multiples of 16 elements, and trees
of up to five levels. Odd strides and six levels compile and are right, but may spill.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.tables import table
from sda_fast.files import write_whole

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "bench" / "results" / "gate.md"
OLDEST = "3.6.0"
"""The oldest Triton that the project runs on."""


@dataclass(frozen=True, slots=True)
class Built:
    """What became of one kernel under one Triton.

    Attributes:
        kernel: its name, tile and what it was compiled for.
        registers: of a thread.
        spills: loads and stores of spilled registers.
        shared: bytes of a program.
        hgmma: Hopper's tensor core instructions.
        hmma: those of its forebears.
        instructions: all of them.
        faults: the promises that are broken.
    """

    kernel: str
    registers: int
    spills: int
    shared: int
    hgmma: int
    hmma: int
    instructions: int
    faults: list[str]


def main(
    oldest: Annotated[
        Path | None, typer.Option(help=f"A folder with Triton {OLDEST}, for that version too.")
    ] = None,
) -> None:
    """Compile all tiles and print the broken promises; a stale table is one, and is mended."""
    folders = [None] if oldest is None else [None, oldest]
    with ThreadPoolExecutor(len(folders)) as pool:
        tables = dict(pool.map(_build_all, folders))
    faults = [
        f"Triton {version}, {built.kernel}: {fault}"
        for version, kernels in tables.items()
        for built in kernels
        for fault in built.faults
    ]
    print("\n".join(faults) or f"{sum(map(len, tables.values()))} kernels keep their promises")
    text = _page(tables)
    stale = not TABLE.is_file() or TABLE.read_text(encoding="utf-8") != text
    if stale:
        write_whole(TABLE, text)
        print(f"{TABLE.name} was stale and is written anew: look at the difference and commit it")
    if faults or stale:
        raise typer.Exit(1)


def _build_all(folder: Path | None) -> tuple[str, list[Built]]:
    """Triton's version and all kernels, compiled in a process of their own."""
    paths = [str(ROOT)] if folder is None else [str(folder), str(ROOT)]
    # the interpreter would take the place of the compiler
    drop = ("TRITON_INTERPRET", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in drop}
    done = subprocess.run(
        [sys.executable, "-m", "bench.gate_worker"],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "TRITON_ALWAYS_COMPILE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"bench gate: the compilation failed\n{done.stderr[-4000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer["triton"], [Built(*kernel.values()) for kernel in answer["built"]]


def _page(tables: dict[str, list[Built]]) -> str:
    head = ["kernel", "Triton", *list(Built.__dataclass_fields__)[1:-1]]
    rows = [
        [built.kernel, version, *(str(v) for v in list(asdict(built).values())[1:-1])]
        for version, kernels in tables.items()
        for built in kernels
    ]
    rows.sort(key=lambda row: (row[0], row[1]))
    about = (
        "What ptxas makes of every tile for sm_90a; written by `make gate`, which fails on a "
        "spill, a missing HGMMA, an HMMA, too much shared memory, a serialised wgmma, tf32 or an "
        "atomic. Strides are multiples of 16 elements, the tree has three levels."
    )
    return f"# Compiled kernels\n\n{about}\n\n{table(head, rows)}\n"
