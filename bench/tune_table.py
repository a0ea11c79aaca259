"""What ``bench tune`` prints: lines for csrc_triton/tiles.py, from its records alone."""

import json
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from bench.records import Record

KERNELS = ("forward", "dq", "dkdv")
"""In the order of the table."""
HALF = ("bfloat16", "float16")
"""Dtypes that share their tiles, so that an entry need not name them."""
WIDTH = 88
"""Characters of a text on a line."""


def fastest(records: Iterable[Record], kernel: str, implementation: str) -> Record | None:
    """The record of the fastest tile in the last round of a sweep; None if none was timed."""
    timed = [
        record
        for record in records
        if (record["kernel"], record["implementation"]) == (kernel, implementation)
        and record["p50_ms"] is not None
    ]
    last = max((record["round"] for record in timed), default=0)
    in_turns = [record for record in timed if record["round"] == last]
    return min(in_turns, key=lambda record: record["p50_ms"], default=None)


def entries(records: Sequence[Record]) -> list[str]:
    """Lines of ``Entry(...)``, the more special ones first, as the table is read.

    Args:
        records: of sweeps, of any cases.
    """
    # special is what holds from a large B * H and a large image on
    key = lambda r: (
        KERNELS.index(r["kernel"]), r["head_dim"], r["implementation"],
        -r["batch_heads"], -r["num_img"], r["case"],
    )  # fmt: skip
    sweeps = sorted((r for r in records if r["kernel"] is not None), key=key)
    lines = []
    for _, sweep in groupby(sweeps, key=key):
        tried = list(sweep)
        best = fastest(tried, tried[0]["kernel"], tried[0]["implementation"])
        if best is not None:
            lines += _entry(best, _standing(tried, best["round"]))
    return lines


def preferred(records: Sequence[Record]) -> list[str]:
    """Lines of ``PREFERRED``: the implementation that wins a pass, over all cases, and the times.

    Args:
        records: of whole passes, of any cases.
    """
    lines = []
    for direction in ("forward", "backward"):
        timed = [
            record
            for record in records
            if (record["kernel"], record["pass"]) == (None, direction)
            and record["p50_ms"] is not None
        ]
        cases = _by_case(timed)
        names = list(dict.fromkeys(name for times in cases.values() for name in times))
        if not names:
            continue
        # by the geometric mean, over the cases in which all were timed
        shared = [times for times in cases.values() if len(times) == len(names)]
        winner = min(names, key=lambda name: sum(math.log(times[name]) for times in shared))
        texts = [
            f"{case}: " + ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items())
            for case, times in cases.items()
        ]
        why = _text(f"{_measured(timed[0])}: {'; '.join(texts)}", 8)
        lines += [f'    "{direction}": (', f'        "{winner}",', *why, "    ),"]
    return ["PREFERRED = {", *lines, "}"] if lines else []


def line(record: Record) -> str:
    """A record for the terminal."""
    tile = record.get("tile")
    what = f"{record['implementation']} {record['kernel'] or 'pass ' + record['pass']}"
    head = f"  {what:22}{'-'.join(map(str, tile.values())) if tile else '':18}"
    if record["p50_ms"] is None:
        return f"{head}{record['status']}: {record['reason']}"
    return f"{head}{record['p50_ms']:9.4f} ms{', in the table' if record.get('current') else ''}"


def _by_case(timed: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Milliseconds by implementation of each case and D, in the order of the records."""
    found: dict[str, dict[str, float]] = {}
    for record in timed:
        times = found.setdefault(f"{record['case']} D={record['head_dim']}", {})
        times[record["implementation"]] = record["p50_ms"]
    return found


def _standing(tried: Iterable[Record], number: int) -> str:
    """What became of the tile of the table in a round."""
    for record in tried:
        if record["current"] and record["round"] == number:
            time = record["p50_ms"]
            became = record["status"] if time is None else f"{time:.4f} ms"
            return f"{became} with {_tile(record)}"
    return "not tried"


def _entry(best: Record, before: str) -> list[str]:
    measured = f"{_measured(best)}: {best['case']} {best['p50_ms']:.4f} ms, before {before}"
    holds = f"{(best['head_dim'],)}, min_img={best['num_img']}, min_batch_heads="
    return [
        "    Entry(",
        f'        "{best["kernel"]}",',
        f"        {_tile(best)},",
        *_text(measured, 8),
        f'        "{best["implementation"]}",',
        *([] if best["dtype"] in HALF else [f"        dtypes=(torch.{best['dtype']},),"]),
        f"        head_dims={holds}{best['batch_heads']},",
        "    ),",
    ]


def _tile(record: Record) -> str:
    return f"Tile({', '.join(map(str, record['tile'].values()))})"


def _measured(record: Record) -> str:
    """When, on what and of which code."""
    where = record["gpu"] or f"{record['processor']} CPU in the interpreter"
    versions = f"torch {record['torch']}, triton {record['triton']}"
    return f"{record['run'][:10]}, {where}, {versions}, commit {record['commit']}"


def _text(text: str, indent: int) -> Iterator[str]:
    """A string literal on as many lines as it needs, with a comma after it."""
    parts = textwrap.wrap(text, WIDTH - indent, drop_whitespace=False, break_on_hyphens=False)
    for i, part in enumerate(parts):
        yield " " * indent + json.dumps(part) + ("," if i + 1 == len(parts) else "")
