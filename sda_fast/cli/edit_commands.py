"""The commands that change embeddings and draw what comes of it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sda_fast.cli.app import Guidance, Model, Nodes, Out, Rule, Seed, Side, Steps, app
from sda_fast.cli.subjects import count, embed, named_files, open_single, open_subject
from sda_fast.cli.targets import LONGEST_NAME, check_targets, result_files, save_pictures
from sda_fast.cli.terminal import (
    load_pipeline,
    progress_on,
    sampling_shown,
    stderr_console,
    working,
)

if TYPE_CHECKING:
    from sda_fast.cli.subjects import Subject
    from sda_fast.editors.result import EditResult
    from sda_fast.embedding import SemanticEmbedding
    from sda_fast.pipeline import SemanticPipeline


@app.command("edit")
def _edit(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="A picture, or an embedding file.")
    ],
    instructions: Annotated[
        list[str] | None,
        typer.Argument(metavar="INSTRUCTION", help="Followed one after the other."),
    ] = None,
    script: Annotated[
        Path | None, typer.Option(help="JSON of operations on nodes, in place of instructions.")
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME=FILE",
            help="A picture or an embedding that the script names; may be repeated.",
        ),
    ] = None,
    model: Model = "scenes",
    out: Out = Path("out"),
    height: Side = None,
    width: Side = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    rule: Rule = "overlap",
) -> None:
    """Edit by words or by a script: OUT/NAME.edited.png, .edited.safetensors, .edited.sheet.png.

    The sheet has the source, rebuilt, beside the result, what may change outlined on both.
    """
    from sda_fast.cli.edit_sheet import as_one

    texts, files = _read_texts(instructions, script), _name_files(named, script)
    subject = open_subject(picture)
    others = {name: open_subject(file) for name, file in files.items()}
    targets = result_files(out, [picture] * count(subject), ".edited.png")
    targets += [out / f"{picture.stem}.edited.{end}" for end in ("safetensors", "sheet.png")]
    check_targets(out, targets, [picture, *files.values(), *([script] if script else [])])
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress, edits=script is None)
        follow = _editing(pipe, others if script else None)
        result: Any = embed(pipe, subject)
        with working(progress, "editing"):
            for text in texts:
                result = follow(result, text)
        sampling = sampling_shown(pipe, progress, "drawing", steps, guidance, rule)
        sampling |= {"height": height, "width": width, "seed": seed}
        whole = as_one(result)
        sources = [("source, rebuilt", whole.source)]
        title = f"{picture.name}: {script.name if script else ', then '.join(texts)}"
        _draw_edit(pipe, sources, whole, title, targets, sampling)


@app.command("interpolate")
def _interpolate(
    a: Annotated[Path, typer.Argument(metavar="A", help="A picture, or an embedding file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Likewise.")],
    frames: Annotated[int, typer.Option(min=2, help="Pictures, both ends included.")] = 7,
    mode: Annotated[str, typer.Option(help="slerp or lerp of the positions.")] = "slerp",
    node: Nodes = None,
    gif: Annotated[bool, typer.Option("--gif", help="Write OUT/A-to-B.gif, too.")] = False,
    model: Model = "scenes",
    out: Out = Path("out"),
    height: Side = None,
    width: Side = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    rule: Rule = "overlap",
) -> None:
    """Draw the way from A to B: OUT/A-to-B.0.png and so on, .strip.png and .safetensors of all."""
    from sda_fast.cli.edit_sheet import compare, save_edit_sheet
    from sda_fast.cli.sheets import Tile, enlarge, save_gif

    ends = open_single(a), open_single(b)
    pictures = [out / f"{a.stem}-to-{b.stem}.{i}.png" for i in range(frames)]
    strip, file, film = (
        out / f"{a.stem}-to-{b.stem}.{end}" for end in ("strip.png", "safetensors", "gif")
    )
    check_targets(out, [*pictures, strip, file, *([film] if gif else [])], [a, b])
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        first, last = (embed(pipe, end) for end in ends)
        way = first.interpolate(last, frames, mode, node or None)
        sampling = sampling_shown(pipe, progress, f"drawing {frames} frames", steps, guidance, rule)
        drawn: Any = pipe.decode(way, height, width, seed=seed, **sampling)
        save_pictures(drawn, pictures)
    tiles = [Tile(picture, f"{i / (frames - 1):.2f}") for i, picture in enumerate(drawn)]
    changed = compare(first, way.select(-1))
    typer.echo(save_edit_sheet([tiles], changed, f"{a.name} to {b.name}", strip))
    way.save(file)
    typer.echo(file)
    if gif:
        typer.echo(save_gif([enlarge(picture) for picture in drawn], film))


@app.command("mix")
def _mix(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="PICTURE", help="Pictures, or embedding files.", show_default=False),
    ],
    weight: Annotated[
        list[float] | None,
        typer.Option(help="One for each in their order; only ratios count.", show_default="equal"),
    ] = None,
    node: Nodes = None,
    model: Model = "scenes",
    out: Out = Path("out"),
    height: Side = None,
    width: Side = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    rule: Rule = "overlap",
) -> None:
    """Draw the mean of A, B, ...: OUT/A-B.mixed.png, .mixed.safetensors and .mixed.sheet.png.

    With --node it is A elsewhere; nodes above it are mixed by the share of their area.
    """
    from sda_fast.cli.edit_sheet import compare
    from sda_fast.embedding import SemanticEmbedding
    from sda_fast.mixing import shares

    if len(files) < 2:
        raise ValueError(f"PICTURE must be two or more, got {len(files)}")
    weights = weight or [1.0] * len(files)
    parts = shares(weights, len(files))
    subjects = [open_single(file) for file in files]
    title = "-".join(file.stem for file in files)[:LONGEST_NAME]
    targets = [out / f"{title}.mixed.{end}" for end in ("png", "safetensors", "sheet.png")]
    check_targets(out, targets, files)
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        given = [embed(pipe, subject) for subject in subjects]
        result = compare(given[0], SemanticEmbedding.mix(given, weights, node or None))
        sampling = sampling_shown(pipe, progress, "drawing", steps, guidance, rule)
        sampling |= {"height": height, "width": width, "seed": seed}
        labels = [f"{f.name}, weight {part:.2f}" for f, part in zip(files, parts, strict=True)]
        sources = list(zip(labels, given, strict=True))
        _draw_edit(pipe, sources, result, f"mix in {', '.join(node or ['/'])}", targets, sampling)


def _read_texts(instructions: Sequence[str] | None, script: Path | None) -> list[str]:
    if bool(instructions) == bool(script):
        raise ValueError(
            "edit takes an INSTRUCTION or a --script, "
            f"got {'both' if script else 'neither of them'}"
        )
    if script is None:
        return list(instructions or ())
    try:
        return [script.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        raise ValueError(f"--script must be a text, got {script}: {error}") from error


def _name_files(pairs: Sequence[str] | None, script: Path | None) -> dict[str, Path]:
    if pairs and script is None:
        raise ValueError(f"--with gives names to a --script, got {pairs[0]!r} without one")
    return named_files(pairs or ())


def _editing(
    pipe: "SemanticPipeline", others: "Mapping[str, Subject] | None"
) -> "Callable[[Any, str], EditResult]":
    """What carries out a script that may name others, or without these an instruction."""
    if others is None:
        if pipe.editor is None:
            raise ValueError("--model must have an editor to follow instructions, got one without")
        return pipe.edit
    from sda_fast.editors.script import ScriptEditor

    return ScriptEditor({name: embed(pipe, other) for name, other in others.items()}).edit


def _draw_edit(
    pipe: "SemanticPipeline",
    sources: "Sequence[tuple[str, SemanticEmbedding]]",
    result: "EditResult",
    title: str,
    targets: Sequence[Path],
    sampling: dict[str, Any],
) -> None:
    """Draw an edit and what it came from, by the same noise, then write all of it.

    Args:
        pipe: what draws.
        sources: words and embedding of each, of as many pictures as the result.
        result: what is written.
        title: of the sheet.
        targets: a file for each picture of the result, for its embedding, and for the sheet.
        sampling: options of ``decode``.
    """
    from sda_fast.cli.edit_sheet import in_words, save_edit_sheet
    from sda_fast.cli.sheets import Tile
    from sda_fast.embedding import SemanticEmbedding

    together = SemanticEmbedding.cat([*(emb for _, emb in sources), result.embedding])
    drawn: Any = pipe.decode(together, **sampling)
    size = len(result.embedding)
    labels = [words for words, _ in sources]
    rows = [
        [
            Tile(drawn[i * size + row], words)
            for i, words in enumerate([*labels, in_words(result, row)])
        ]
        for row in range(size)
    ]
    *pictures, file, sheet = targets
    save_pictures(drawn[-size:], pictures)
    result.embedding.save(file)
    typer.echo(file)
    typer.echo(save_edit_sheet(rows, result, title, sheet))
