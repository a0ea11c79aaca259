"""A run in one page: curves, numbers and samples over time, from what lies in its folder."""

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from PIL import Image

from sda_fast.files import write_whole
from train.display import KNOWN
from train.report import LOG, read_log

REPORT, CONFIG, SHEETS = "report.html", "config.json", "sheets"
MOST_POINTS = 1000
"""Of a curve: more are averaged, so many to a point."""
MOST_SHEETS = 12
SHEET_WIDTH = 1536
"""Pixels: a wider sheet is shown smaller."""
LOG_FROM = 10
"""Largest over smallest value of what is drawn on a logarithmic axis."""

Rows = Mapping[int, Mapping[str, float]]
Curve = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves on common axes.

    Attributes:
        title: above it.
        fields: which fields of rows belong to it.
        label: of a field, in the legend.
        percent: values are shares.
        log: a wide range of positive values is drawn on a logarithmic axis.
    """

    title: str
    fields: Callable[[str], bool]
    label: Callable[[str], str] = str
    percent: bool = False
    log: bool = False


CHARTS = (
    Chart("Loss", lambda key: key not in KNOWN and "/" not in key, log=True),
    Chart("Loss of pictures never trained on", lambda key: key == "eval/loss", log=True),
    Chart("Mean cosine of positions", lambda key: key == "eval/mean_cosine"),
    Chart("Effective rank of positions", lambda key: key == "eval/effective_rank"),
    Chart("Pictures a second", lambda key: key == "pictures_per_s"),
    Chart("Share of the peak, and of time waited for data", lambda key: key in ("mfu", "data_wait"),
          lambda key: {"mfu": "MFU", "data_wait": "data wait"}[key], percent=True),
    Chart("Gradient norm before clipping", lambda key: key == "grad_norm", log=True),
    Chart("Learning rate, of its peak", lambda key: key == "lr"),
    Chart("Peak memory, GiB", lambda key: key == "memory_gib"),
    Chart("Seconds that a checkpoint kept the run waiting", lambda key: key == "checkpoint_stall"),
    Chart("Steps not taken and broken pictures, so far", lambda key: key in ("skipped", "broken")),
)  # fmt: skip


def plot_run(folder: Path) -> Path:
    """Write ``folder/report.html``: one file that needs nothing else, of a run that may go on.

    Returns:
        Where it is.

    Raises:
        FileNotFoundError: folder is not there, or holds no run.
        OSError: the page cannot be written.
    """
    known = [name for name in (LOG, CONFIG) if (folder / name).is_file()]
    if not known:
        raise FileNotFoundError(f"run must be the folder of a run, got {folder} without {CONFIG}")
    rows = read_log(folder) if LOG in known else {}
    config = _read_config(folder / CONFIG)
    page = Template(Path(__file__).with_name("plot.html").read_text(encoding="utf-8"))
    parts = {
        "title": escape(str(config.get("name", folder.name))),
        "state": _state(rows, config),
        "charts": _charts(rows),
        "sheets": _sheets(folder / SHEETS),
        "numbers": _numbers(rows),
        "config": _table(config) if config else _soft(f"There is no {CONFIG}."),
    }
    return write_whole(folder / REPORT, page.substitute(parts))


def _read_config(path: Path) -> dict[str, Any]:
    """Empty where there is none, or a torn one."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _state(rows: Rows, config: Mapping[str, Any]) -> str:
    if not rows:
        return "Nothing has been logged yet."
    total = config.get("steps")
    of = f" of {total:,}" if isinstance(total, int) else ""
    return f"Step {max(rows):,}{of}. {config.get('stage', '')}".strip().rstrip(".") + "."


def _charts(rows: Rows) -> str:
    names = dict.fromkeys(key for row in rows.values() for key in row if key != "step")
    taken: set[str] = set()
    shown = []
    for chart in CHARTS:
        fields = [name for name in names if chart.fields(name)]
        taken |= set(fields)
        shown.append((chart, fields))
    # what a stage of its own kind evaluates
    others = [name for name in names if name not in taken and name.startswith("eval/")]
    shown += [(Chart(name.removeprefix("eval/"), name.__eq__), [name]) for name in others]
    figures = [_figure(rows, chart, fields) for chart, fields in shown if fields]
    missing = [] if any(n.startswith("eval/") for n in names) else [_soft("No evaluation yet.")]
    body = "\n".join(figures)
    return f'<h2>Curves</h2>\n<div class="charts">\n{body}\n</div>\n{"".join(missing)}'


def _figure(rows: Rows, chart: Chart, fields: Sequence[str]) -> str:
    curves = {name: curve_of(rows, name) for name in sorted(fields, key=lambda n: n != "loss")}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return ""
    most = max(sum(name in row for row in rows.values()) for name in curves)
    note = "" if most <= MOST_POINTS else f"; a point is the mean of {-(-most // MOST_POINTS)} rows"
    title = f"<h3>{escape(chart.title)}</h3>"
    alone = len(curves) == 1
    last = ", ".join(
        f"{'' if alone else chart.label(name)} {_number(y[-1])}".strip()
        for name, (_, y) in curves.items()
    )
    caption = f"<figcaption>last: {escape(last)}{note}</figcaption>"
    return f"<figure>{title}{_draw(chart, curves)}{caption}</figure>"


def curve_of(rows: Rows, name: str) -> Curve:
    """Steps and values of a field, at most MOST_POINTS of them: means over neighbours.

    Values that are not finite are left out.
    """
    steps = [step for step, row in rows.items() if math.isfinite(row.get(name, math.nan))]
    values = [rows[step][name] for step in steps]
    width = max(1, -(-len(steps) // MOST_POINTS))
    starts = range(0, len(steps), width)
    x, y = ([fmean(of[i : i + width]) for i in starts] for of in (steps, values))
    return x, y


def _draw(chart: Chart, curves: Mapping[str, Curve]) -> str:
    """An SVG element; text stays text."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.title}):
        # margins by hand: a layout engine draws everything twice, and a run waits meanwhile
        figure = Figure((6, 2.9))
        axes = figure.add_axes((0.11, 0.15, 0.87, 0.81))
        for name, (x, y) in curves.items():
            alone = len(x) < 40
            axes.plot(x, y, label=chart.label(name), lw=1.2, marker="." if alone else None)
        values = [value for _, y in curves.values() for value in y]
        if chart.log and min(values) > 0 and max(values) > LOG_FROM * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: _number(value))
            axes.yaxis.set_minor_formatter(_some_number)
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _some_number(value: float, _: object) -> str:
    """Of the lines between powers of ten some, so that no two words touch."""
    return _number(value) if f"{value:e}"[0] in "235" else ""


def _sheets(folder: Path) -> str:
    files = pick(sorted(folder.glob("*.png")), MOST_SHEETS)
    if not files:
        return f"<h2>Samples</h2>\n{_soft('No sample sheet yet.')}"
    figures = [_sheet(file) for file in files]
    return '<h2>Samples</h2>\n<div class="sheets">\n' + "\n".join(figures) + "\n</div>"


def pick(things: Sequence[Path], most: int) -> list[Path]:
    """At most so many of them, evenly, the first and the last among them."""
    if len(things) <= most:
        return list(things)
    return [things[round(i * (len(things) - 1) / (most - 1))] for i in range(most)]


def _sheet(file: Path) -> str:
    name = file.stem.lstrip("0") or "0"
    try:
        with Image.open(file) as image:
            image.load()
            data = file.read_bytes() if image.width <= SHEET_WIDTH else _smaller(image)
    except (OSError, ValueError, SyntaxError):  # Pillow's words for a torn one
        return f"<figure><figcaption>{escape(file.name)} cannot be read.</figcaption></figure>"
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    caption = f"step {escape(name)}"
    return (
        f'<figure><img alt="samples at {caption}" src="{source}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _smaller(image: Image.Image) -> bytes:
    height = max(1, round(image.height * SHEET_WIDTH / image.width))
    file = io.BytesIO()
    image.resize((SHEET_WIDTH, height), Image.Resampling.LANCZOS).save(file, "PNG")
    return file.getvalue()


def _numbers(rows: Rows) -> str:
    latest: dict[str, tuple[int, float]] = {}
    for step, row in rows.items():
        latest |= {name: (step, value) for name, value in row.items() if name != "step"}
    if not latest:
        return ""
    cells = {name: f"{_number(value)} (step {step:,})" for name, (step, value) in latest.items()}
    return f"<h2>Latest numbers</h2>\n{_table(cells)}"


def _table(cells: Mapping[str, Any]) -> str:
    lines = [
        f"<tr><th>{escape(str(key))}</th><td>{escape(_words(value))}</td></tr>"
        for key, value in cells.items()
    ]
    return '<div class="numbers"><table>' + "".join(lines) + "</table></div>"


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
