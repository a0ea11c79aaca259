"""Which tile is the fastest for each attention kernel, among those that are right?

``python -m bench tune`` on one GPU: for each case and kernel a frozen sweep of tiles, each checked
against the reference before it is timed, alone, without the kernels around it; then for joint
attention which implementation wins, for rotated attention into how many parts keys are split best.
Prints what to paste into csrc_triton/tiles.py. ``--small`` goes through all of it on a CPU, in
Triton's interpreter.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import cases as joint
from bench import qformer_cases as qformer
from bench.attempts import Tuning, Turns, run
from bench.cases import Case, names, select
from bench.circumstances import circumstances
from bench.measure import Deadline
from bench.qformer_cases import QFormerCase
from bench.tune_joint import JointTuning
from bench.tune_rope3d import Rope3dTuning
from csrc_triton.tiles import HEAD_DIMS
from sda_fast.ops.inputs import interpreted

TUNINGS: dict[type, type[Tuning]] = {Case: JointTuning, QFormerCase: Rope3dTuning}
"""What measures a case, by its kind."""
OPS = tuple(case for case in qformer.EVERY if case.kind == "op")
SMALL_OPS = tuple(case for case in qformer.SMALL if case.kind == "op")
GROUPS = {
    "goals": (*joint.GOALS, *(case for case in qformer.GOALS if case.kind == "op")),
    "flux": joint.FLUX,
    "op": OPS,
    "small": (*joint.SMALL, *SMALL_OPS),
}
"""Names for several cases at once, of both operators."""
CASES = joint.CASES | {case.name: case for case in (*OPS, *SMALL_OPS)}
DEFAULT = ",".join(
    ["flux-1024-b1-tree32.8.4", "op-b1-s1369", "op-b16-s1369", "op-b16-s4096"]
    + [f"flux-{case}-tree32.8.4" for case in ("2048-b1", "512-b1", "1024-b4")]
)
"""Cases by worth; one after another of its operator finds most kernels compiled."""
SMALL = f"{joint.SMALL[0].name},{SMALL_OPS[1].name}"
"""The second small case of rotated attention has keys for two parts."""
RESERVE = 0.1
"""Part of the limit that is kept for timing what is ready when it nears."""
FILE = "tune.jsonl"


def chosen(cases: str, head_dims: str | None, device: torch.device) -> list[Any]:
    """The cases of a list in each head dim of another, or in their own.

    Raises:
        ValueError: there is no such case, or no kernel for it here.
    """
    found = select(cases, GROUPS, CASES)
    if head_dims is not None:
        dims = [int(part) if part.isdecimal() else 0 for part in head_dims.split(",")]
        if not set(dims) <= set(HEAD_DIMS):
            known = ", ".join(map(str, HEAD_DIMS))
            raise ValueError(f"head-dims must be of {known}, got {head_dims!r}")
        found = [replace(case, head_dim=dim) for dim in dims for case in found]
    if device.type == "cuda" and interpreted():
        raise ValueError("TRITON_INTERPRET is set: without it the kernels run on this GPU")
    if device.type == "cpu" and not interpreted():
        raise ValueError(
            "there is no CUDA device; with TRITON_INTERPRET=1 --small goes through a small case "
            "in Triton's interpreter"
        )
    halves = [case for case in found if case.dtype != torch.float32]
    if device.type == "cpu" and halves:
        raise ValueError(f"Triton's interpreter needs float32 cases, got {names(halves)}")
    return found


def main(
    cases: Annotated[
        str | None, typer.Option(help="Groups goals, flux, op, small; names; patterns: a,b-*,c.")
    ] = None,
    head_dims: Annotated[
        str | None, typer.Option(help="D to try, as 64,128; the cases' own unless given.")
    ] = None,
    reps: Annotated[int, typer.Option(min=1, help="Turns of each tile.")] = 25,
    limit_s: Annotated[float, typer.Option(help="Stop after so many seconds.")] = 540.0,
    out: Annotated[
        Path | None, typer.Option(help=f"Folder; records are appended to {FILE} in it.")
    ] = None,
    small: Annotated[bool, typer.Option(help="Few tiles, small cases; on a CPU, too.")] = False,
    commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
) -> None:
    """Sweep the tiles of the attention kernels; print entries for csrc_triton/tiles.py."""
    start = time.monotonic()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    try:
        subjects = chosen(cases or (SMALL if small else DEFAULT), head_dims, device)
    except ValueError as error:
        print(f"bench tune: {error}")
        raise typer.Exit(2) from error
    about = circumstances(device)
    if commit and about["commit"] == "unknown":
        about["commit"] = commit
    turns = Turns(device, reps, Deadline(start + limit_s), RESERVE * limit_s)
    file = (out or Path("out/bench" if small else "bench/results")) / FILE
    tunings = {kind: tuning(turns, small, about) for kind, tuning in TUNINGS.items()}
    records = run(turns, lambda case: tunings[type(case)].measure(case), subjects, file)
    print(f"{len(records)} records in {file}")
    for tuning in tunings.values():
        mine = [record for record in records if record["op"] == tuning.op]
        if mine:
            print("\n".join(["", *tuning.report(mine)]))
    states = {record["status"] for record in records}
    if "failed" in states or "ok" not in states:
        raise typer.Exit(1)
