"""What ``bench tune`` prints: lines for csrc_triton/tiles.py, from its records alone."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from bench.records import Record
from bench.tables import table

KERNELS = ("forward", "dq", "dkdv", "rope3d_forward", "rope3d_dq", "rope3d_dkdv")
"""In the order of the tables."""
HALF = ("bfloat16", "float16")
"""Dtypes that share their tiles, so that an entry need not name them."""
WIDTH = 88
"""Characters of a text on a line."""


def fastest(records: Iterable[Record], kernel: str, implementation: str | None) -> Record | None:
    """The record of the fastest tile in the last round of a sweep; None if none was timed.

    Keys are in as many parts as the rule says, since that is how the tile will run.
    """
    timed = [
        record
        for record in records
        if (record["kernel"], record["implementation"]) == (kernel, implementation)
        and record["p50_ms"] is not None
        and _by_rule(record)
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


def parts_table(records: Sequence[Record]) -> list[str]:
    """Lines of a table: what each number of parts took of the tiles that were tried in several.

    Args:
        records: of sweeps of kernels that split their keys, of any cases.
    """
    key = lambda r: (r["case"], r["head_dim"], KERNELS.index(r["kernel"]), *r["tile"].values())
    timed = [r for r in records if r["parts"] and r["round"] == 2 and r["p50_ms"] is not None]
    rows = []
    for _, group in groupby(sorted(timed, key=lambda r: (key(r), r["parts"])), key=key):
        tried = list(group)
        best = min(r["p50_ms"] for r in tried)
        for r in tried if len(tried) > 1 else []:
            what = r["case"], str(r["head_dim"]), r["kernel"], _sizes(r)
            sizes = r["tiles"], r["blocks"], r["parts"], r["tiles"] * r["parts"]
            times = f"{r['p50_ms']:.4f}", f"{r['p50_ms'] / best:.2f}"
            rule = f"its choice for {r['processors']} processors" if r["by_rule"] else ""
            rows.append([*what, *map(str, sizes), *times, rule])
    head = ["case", "D", "kernel", "tile", "tiles", "blocks", "parts", "programs", "ms"]
    return table([*head, "÷ fastest", "choose_parts"], rows).splitlines() if rows else []


def line(record: Record) -> str:
    """A record for the terminal."""
    what = " ".join(
        filter(None, (record["implementation"], record["kernel"] or f"pass {record['pass']}"))
    )
    tile = _sizes(record) if record.get("tile") else ""
    parts = f"in {record['parts']:<6}" if record.get("parts") else ""
    head = f"  {what:22}{tile:18}{parts}"
    if record["p50_ms"] is None:
        return f"{head}{record['status']}: {record['reason']}"
    return f"{head}{record['p50_ms']:9.4f} ms{', in the table' if record.get('current') else ''}"


def _standing(tried: Iterable[Record], number: int) -> str:
    """What became of the tile of the table in a round."""
    for record in tried:
        if record["current"] and record["round"] == number and _by_rule(record):
            time = record["p50_ms"]
            became = record["status"] if time is None else f"{time:.4f} ms"
            return f"{became} with {_tile(record)}{_in_parts(record)}"
    return "not tried"


def _entry(best: Record, before: str) -> list[str]:
    time = f"{best['p50_ms']:.4f} ms{_in_parts(best)}"
    measured = f"{_measured(best)}: {best['case']} {time}, before {before}"
    named = [] if best["implementation"] is None else [f'        "{best["implementation"]}",']
    return [
        "    Entry(",
        f'        "{best["kernel"]}",',
        f"        {_tile(best)},",
        *_text(measured, 8),
        *named,
        *_where(best),
        "    ),",
    ]


def _where(best: Record) -> list[str]:
    """From which sizes on a choice holds."""
    sizes = f"min_img={best['num_img']}, min_batch_heads={best['batch_heads']}"
    return [
        *([] if best["dtype"] in HALF else [f"        dtypes=(torch.{best['dtype']},),"]),
        f"        head_dims={(best.get('width', best['head_dim']),)}, {sizes},",
    ]


def _tile(record: Record) -> str:
    return f"Tile({', '.join(map(str, record['tile'].values()))})"


def _sizes(record: Record) -> str:
    return "-".join(map(str, record["tile"].values()))


def _by_rule(record: Record) -> bool:
    """Whether its keys are in as many parts as the rule says; true where they are not split."""
    return record.get("by_rule", True)


def _in_parts(record: Record) -> str:
    parts = record.get("parts")
    return "" if parts is None else f" in {parts} part{'s' if parts > 1 else ''}"


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
