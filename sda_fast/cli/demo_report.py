"""The demo's page: one HTML file with everything inside, pictures and script included."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sda_fast.cli.sheets import LEVEL_COLORS
from sda_fast.embedding import SemanticEmbedding
from sda_fast.files import write_whole

PNG_UP_TO = 256
"""Longer side in pixels up to which a picture is embedded without loss."""
HEAT_COLUMNS = 128
"""Most channels of a position that its pattern shows, evenly picked."""
COLD, ZERO, WARM = (64, 132, 255), (13, 15, 19), (255, 179, 0)
METRICS = {
    "recall": "recall",
    "precision": "precision",
    "color": "colour",
    "shape": "shape",
    "size": "size",
    "miou": "layout mIoU",
    "psnr_db": "PSNR, dB",
}
"""Key in metrics.json -> column of the table."""
TILES = {
    "recall": "of the objects came back, judged by their place",
    "color": "of those have the right colour",
    "shape": "have the right shape",
    "miou": "layout mIoU: overlap of objects with where they were",
}
"""Key in metrics.json -> words on a tile."""
SNIPPET = """import sda_fast as sda

pipe = sda.SemanticPipeline.from_pretrained({model!r})
a, b = pipe.encode("a.png"), pipe.encode("b.png")  # [1, {positions}, {channels}] each
mixed = a.transplant(b, "{path}")  # one node and everything below it
pipe.decode(mixed)[0].save("mixed.png")"""


@dataclass(frozen=True)
class Demo:
    """What the demo made, all that its page and sheets show.

    Attributes:
        names: of the B pictures.
        sources: B pictures as they were encoded.
        rebuilt: B pictures of the same size.
        embedding: of the sources, batch B.
        words: for each picture the objects of its scene as (came out right, words); empty for
            pictures that are no scenes.
        ends: which two pictures are A and B below.
        frames: the way from A to B, both included.
        transplants: {path of the node taken from B: the picture}.
        path: the one that is shown first.
        grid: (rows, columns) of image tokens.
        metrics: what metrics.json holds.
    """

    names: list[str]
    sources: list[Image.Image]
    rebuilt: list[Image.Image]
    embedding: SemanticEmbedding
    words: list[list[tuple[bool, str]]]
    ends: tuple[int, int]
    frames: list[Image.Image]
    transplants: dict[str, Image.Image]
    path: str
    grid: tuple[int, int]
    metrics: dict[str, Any]


def write_report(demo: Demo, path: Path) -> Path:
    """Write the page, whole or not at all; the folder must be there."""
    return write_whole(path, _fill(_template("demo_report.html"), _fields(demo)))


def heat(tokens: Tensor) -> Image.Image:
    """Draw the positions of one embedding: a row each, blue below zero, amber above.

    Args:
        tokens: [N, C] float.

    Returns:
        N pixels high, C wide; of more than HEAT_COLUMNS channels, every k-th.
    """
    tokens = tokens.detach().float().cpu()
    tokens = tokens[:, :: -(-tokens.shape[1] // HEAT_COLUMNS)]
    value = (tokens / (2.5 * tokens.std().clamp_min(1e-6))).clamp(-1, 1)[..., None]
    cold, zero, warm = (torch.tensor(color).float() for color in (COLD, ZERO, WARM))
    color = zero + value.clamp_min(0) * (warm - zero) + value.clamp_max(0).abs() * (cold - zero)
    return Image.fromarray(color.round().byte().numpy())


def data_uri(picture: Image.Image) -> str:
    """The picture as a data: address: PNG if it is small, else JPEG."""
    stream = io.BytesIO()
    kind = "png" if max(picture.size) <= PNG_UP_TO else "jpeg"
    picture.save(stream, format=kind, optimize=True, **({"quality": 90} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _fields(demo: Demo) -> dict[str, str]:
    """What stands in the template's {{places}}, as HTML."""
    emb, metrics = demo.embedding, demo.metrics
    positions, channels = emb.tokens.shape[1:]
    width, height = demo.sources[0].size
    sources, rebuilt, frames = (
        [data_uri(p) for p in group] for group in (demo.sources, demo.rebuilt, demo.frames)
    )
    heats = [data_uri(heat(tokens)) for tokens in emb.tokens]
    transplants = {path: data_uri(picture) for path, picture in demo.transplants.items()}
    a, b = demo.ends
    data = {
        "tokens_per_node": emb.tree.tokens_per_node,
        "colors": LEVEL_COLORS,
        "grid": demo.grid,
        "pictures": [{"source": s, "heat": h} for s, h in zip(sources, heats, strict=True)],
        "frames": frames,
        "transplants": transplants,
        "transplant": demo.path,
    }
    middle = len(frames) // 2
    return {
        "title": f"Pictures, rebuilt from {positions} vectors",
        "lede": f"Each of these {len(sources)} pictures of {width} × {height} pixels became "
        f"<b>{positions} vectors</b> of {channels} numbers. A frozen FLUX decoder, which never "
        "sees the picture, drew it again from the vectors and noise.",
        "pixels": "square" if max(width, height) <= PNG_UP_TO else "",
        "numbers": _numbers(metrics["mean"], metrics["seconds"]["total"]),
        "gallery_words": _gallery_words(metrics),
        "cards": "\n".join(_card(demo, i, sources[i], rebuilt[i]) for i in range(len(sources))),
        "channels": str(channels),
        "positions": str(positions),
        "kept_positions": str(positions - int(emb.tree.subtree(demo.path).sum())),
        "legend": _legend(demo),
        "first_source": sources[0],
        "first_heat": heats[0],
        "end_a": rebuilt[a],
        "end_b": rebuilt[b],
        "middle": frames[middle],
        "middle_frame": str(middle),
        "last_frame": str(len(frames) - 1),
        "graft_a": rebuilt[a],
        "graft_b": rebuilt[b],
        "graft_result": transplants[demo.path],
        "graft_path": escape(demo.path),
        "quadrant_color": LEVEL_COLORS[1],
        "table_words": _table_words(metrics),
        "table": _table(metrics),
        "snippet": escape(
            SNIPPET.format(
                model=metrics["model"], positions=positions, channels=channels, path=demo.path
            )
        ),
        "footer": _footer(metrics),
        # "</" would end the script element
        "data": json.dumps(data).replace("</", "<\\/"),
        "script": _template("demo_report.js"),
    }


def _template(name: str) -> str:
    return resources.files("sda_fast.cli").joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, fields: Mapping[str, str]) -> str:
    """Replace each {{name}} once; what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: fields[place[1]], template)


def _numbers(mean: Mapping[str, float], seconds: float) -> str:
    """The tiles on top: a number, and what it is."""
    tiles = [(number(key, mean[key]), words) for key, words in TILES.items() if key in mean]
    if not tiles:
        tiles.append((number("psnr_db", mean["psnr_db"]), "dB PSNR, mean over the pictures"))
    tiles.append((f"{seconds:.0f} s", "for everything on this page"))
    return "".join(f"<li><b>{value}</b><span>{words}</span></li>" for value, words in tiles)


def number(key: str, value: float | None) -> str:
    """A metric in the form that people read: per cent, decibels, or two decimals."""
    if value is None:
        return "–"
    if key == "psnr_db":
        return f"{value:.1f}"
    return f"{value:.2f}" if key == "miou" else f"{100 * value:.0f} %"


def _gallery_words(metrics: Mapping[str, Any]) -> str:
    if "ceiling" not in metrics:
        return "Left, the picture as it was encoded; right, what the decoder drew."
    return (
        "Left, a scene that no model was trained on; right, what the decoder drew. Below, each "
        "object of the scene, and whether a program that reads pictures found it again."
    )


def _card(demo: Demo, i: int, source: str, rebuilt: str) -> str:
    words = "".join(
        f'<li class="{"good" if good else "bad"}">{escape(text)}</li>'
        for good, text in demo.words[i]
    )
    name = escape(demo.names[i])
    return (
        f'<div class="card"><div class="pair">'
        f'<figure><div class="pic"><img alt="{name}" src="{source}"></div>'
        f"<figcaption>{name}</figcaption></figure>"
        f'<figure><div class="pic"><img alt="{name}, rebuilt" src="{rebuilt}"></div>'
        f"<figcaption>rebuilt</figcaption></figure></div>"
        f'<ul class="words">{words}</ul><div class="under"></div></div>'
    )


def _legend(demo: Demo) -> str:
    keys = [
        f'<span class="key" style="background:{LEVEL_COLORS[level]}">level {level}: '
        f"{4**level} × {count}</span>"
        for level, count in enumerate(demo.embedding.tree.tokens_per_node)
        if count
    ]
    return "Nodes × positions: " + "".join(keys)


def _table_words(metrics: Mapping[str, Any]) -> str:
    if "ceiling" not in metrics:
        return "These are your own pictures, so only pixels can be compared."
    return (
        "A program reads the rebuilt pictures and compares the objects it finds with the scene. "
        "Recall and precision count objects by their place alone; colour, shape and size are "
        "those of the objects found. The last line is what it says of the sources themselves: "
        "more than that no decoder can reach."
    )


def _table(metrics: Mapping[str, Any]) -> str:
    keys = [key for key in METRICS if key in metrics["mean"]]
    rows: list[tuple[str, str, Mapping[str, Any]]] = [
        ("", record["name"], record) for record in metrics["pictures"]
    ]
    rows.append(("mean", "mean", metrics["mean"]))
    if "ceiling" in metrics:
        rows.append(("ceiling", "sources, read by the same program", metrics["ceiling"]))
    head = "".join(f"<th>{METRICS[key]}</th>" for key in keys)
    body = "".join(
        f'<tr class="{kind}"><td>{escape(name)}</td>{_cells(keys, record)}</tr>'
        for kind, name, record in rows
    )
    return f"<table><thead><tr><th>picture</th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cells(keys: Sequence[str], record: Mapping[str, Any]) -> str:
    return "".join(f"<td>{number(key, record.get(key))}</td>" for key in keys)


def _footer(metrics: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    words = (
        f"Model {metrics['model']}, {metrics['steps']} steps, seed {metrics['seed']}. {versions}."
    )
    if metrics["model"] == "scenes":
        words += (
            " The model is small enough to be trained on a desk, so that every claim can be "
            "checked; it says nothing about the quality of FLUX.1 itself."
        )
    return escape(words)
