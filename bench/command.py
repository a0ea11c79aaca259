"""The command line that suites share, and what it tells and writes."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.circumstances import circumstances
from bench.measure import Deadline
from bench.records import Record
from bench.roofs import measure_roofs
from bench.suite import RESERVE, Suite, run


def choose(text: str, variants: Mapping[str, Any]) -> list[Any]:
    """Variants by name, separated by commas; all for "all".

    Raises:
        ValueError: there is none of a name.
    """
    chosen = list(variants) if text == "all" else text.split(",")
    unknown = [name for name in chosen if name not in variants]
    if unknown:
        raise ValueError(f"variants must be of {', '.join(variants)}, got {', '.join(unknown)}")
    return [variants[name] for name in chosen]


def command(
    name: str,
    about: str,
    suite: type[Suite],
    variants: Mapping[str, Any],
    select: Callable[[str], Sequence[Any]],
    at_home: str | None = None,
) -> Callable[..., None]:
    """The ``main`` of a suite.

    Args:
        name: of the suite; its records go to a file of that name.
        about: what ``--help`` says.
        suite: what measures.
        variants: all that can take part, by name.
        select: the cases of a list; it knows the groups "goals" and "small".
        at_home: its group of cases that count as results without a GPU; None: there are none.
    """
    of_cpu = [] if at_home is None else select(at_home)

    def main(
        cases: Annotated[
            str | None, typer.Option(help="Groups as goals or small; names; patterns: a,b-*,c.")
        ] = None,
        variants: Annotated[str, typer.Option(help="Names, separated by commas.")] = "all",
        reps: Annotated[int, typer.Option(min=1, help="Turns of each variant.")] = 50,
        limit_s: Annotated[float, typer.Option(help="Stop after so many seconds.")] = 540.0,
        out: Annotated[
            Path | None, typer.Option(help=f"Folder; records are appended to {name}.jsonl in it.")
        ] = None,
        small: Annotated[bool, typer.Option(help="Cases of milliseconds, on a CPU, too.")] = False,
        commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
    ) -> None:
        start = time.monotonic()
        device = current_device()
        try:
            usual = "goals" if device.type == "cuda" or at_home is None else at_home
            chosen = select(cases or ("small" if small else usual))
            refuse_without_gpu(device, small or all(case in of_cpu for case in chosen))
            competing = choose(variants, known)
        except ValueError as error:
            print(f"bench {name}: {error}")
            raise typer.Exit(2) from error
        shared = describe(device, commit)
        deadline, reserve = Deadline(start + limit_s), RESERVE * limit_s
        measuring = suite(competing, device, reps, deadline, reserve, shared)
        file = results_folder(out, small) / f"{name}.jsonl"
        records = run(measuring, chosen, file)
        print(f"{len(records)} records in {file}")
        wrong = [r for r in records if r["status"] == "failed" and r["variant"].startswith("ours")]
        if wrong or not any(r["status"] == "ok" for r in records):
            raise typer.Exit(1)

    known = variants
    main.__doc__ = about
    return main


def current_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def refuse_without_gpu(device: torch.device, small: bool) -> None:
    """Large cases are for a GPU.

    Raises:
        ValueError: there is none, and the cases are not the small ones.
    """
    if device.type != "cuda" and not small:
        raise ValueError("there is no CUDA device; --small goes through small cases on a CPU")


def results_folder(out: Path | None, small: bool) -> Path:
    """Where records go: small cases are no results."""
    return out or Path("out/bench" if small else "bench/results")


def describe(device: torch.device, commit: str) -> Record:
    """Circumstances and roofs, told on the terminal; commit counts where git cannot tell."""
    about = circumstances(device)
    if commit and about["commit"] == "unknown":
        about["commit"] = commit
    about["roofs"] = measure_roofs(device)
    copy, matmul = about["roofs"]["copy"] / 1e12, about["roofs"]["matmul"] / 1e12
    where = about["gpu"] or f"{about['processor']} CPU"
    print(
        f"{where}: copy {copy:.3f} TB/s, matmul {matmul:.2f} TFLOP/s, torch {about['torch']}",
        flush=True,
    )
    return about
