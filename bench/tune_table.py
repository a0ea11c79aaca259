"""What ``bench tune`` prints: lines for csrc_triton/tiles.py, from its records alone."""

import json
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
    """Lines of ``Preference(...)``: what wins each pass of each case, the more special ones first.

    Args:
        records: of whole passes, of any cases.
    """
    key = lambda r: (
        r["pass"] != "forward", r["head_dim"], -r["batch_heads"], -r["num_img"], r["case"],
    )  # fmt: skip
    timed = [r for r in records if r["kernel"] is None and r["p50_ms"] is not None]
    lines = []
    for _, group in groupby(sorted(timed, key=key), key=key):
        tried = sorted(group, key=lambda r: r["p50_ms"])
        best = tried[0]
        times = ", ".join(f"{r['implementation']} {r['p50_ms']:.4f} ms" for r in tried)
        lines += [
            "    Preference(",
            f'        "{best["pass"]}",',
            f'        "{best["implementation"]}",',
            *_text(f"{_measured(best)}: {best['case']} {times}", 8),
            *_where(best),
            "    ),",
        ]
    return lines


def line(record: Record) -> str:
    """A record for the terminal."""
    tile = record.get("tile")
    what = f"{record['implementation']} {record['kernel'] or 'pass ' + record['pass']}"
    head = f"  {what:22}{'-'.join(map(str, tile.values())) if tile else '':18}"
    if record["p50_ms"] is None:
        return f"{head}{record['status']}: {record['reason']}"
    return f"{head}{record['p50_ms']:9.4f} ms{', in the table' if record.get('current') else ''}"


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
    return [
        "    Entry(",
        f'        "{best["kernel"]}",',
        f"        {_tile(best)},",
        *_text(measured, 8),
        f'        "{best["implementation"]}",',
        *_where(best),
        "    ),",
    ]


def _where(best: Record) -> list[str]:
    """From which sizes on a choice holds."""
    sizes = f"min_img={best['num_img']}, min_batch_heads={best['batch_heads']}"
    return [
        *([] if best["dtype"] in HALF else [f"        dtypes=(torch.{best['dtype']},),"]),
        f"        head_dims={(best['head_dim'],)}, {sizes},",
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
