"""The commands that take pictures to embeddings and back, and those that tell of them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sda_fast.cli.app import (
    FAILED,
    Guidance,
    Model,
    Out,
    Pictures,
    Rule,
    Seed,
    Side,
    Steps,
    app,
)
from sda_fast.cli.subjects import open_pictures
from sda_fast.cli.targets import result_files, save_pictures
from sda_fast.cli.terminal import (
    load_adapter,
    load_pipeline,
    progress_on,
    quiet,
    sampling_shown,
    stderr_console,
    working,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("reconstruct")
def _reconstruct(
    pictures: Pictures,
    model: Model = "scenes",
    out: Out = Path("out"),
    height: Side = None,
    width: Side = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    rule: Rule = "overlap",
) -> None:
    """Encode pictures and rebuild them: OUT/NAME.rebuilt.png each.

    Without --height and --width a picture keeps its aspect ratio.
    """
    images = open_pictures(pictures)
    targets = result_files(out, pictures, ".rebuilt.png")
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        for picture, image, target in zip(pictures, images, targets, strict=True):
            words = f"rebuilding {picture.name}"
            sampling = sampling_shown(pipe, progress, words, steps, guidance, rule)
            save_pictures(pipe.reconstruct(image, height, width, seed, **sampling), [target])


@app.command("encode")
def _encode(pictures: Pictures, model: Model = "scenes", out: Out = Path("out")) -> None:
    """Write the embedding of each picture: OUT/NAME.safetensors."""
    images = open_pictures(pictures)
    targets = result_files(out, pictures, ".safetensors")
    with progress_on(stderr_console()) as progress:
        adapter = load_adapter(model, progress)
        task = progress.add_task("encoding", total=len(images))
        out.mkdir(parents=True, exist_ok=True)
        for image, target in zip(images, targets, strict=True):
            adapter.encode(image).save(target)
            progress.advance(task)
            typer.echo(target)


@app.command("decode")
def _decode(
    embedding: Annotated[Path, typer.Argument(metavar="EMBEDDING", show_default=False)],
    levels: Annotated[
        int | None, typer.Option(min=1, help="Read these first levels alone.", show_default="all")
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
    """Draw what an embedding file holds: OUT/NAME.decoded.png, numbered if there are several."""
    from sda_fast.embedding import SemanticEmbedding

    emb = SemanticEmbedding.load(embedding)
    emb = emb if levels is None else emb.truncate(levels)
    names = [embedding] * len(emb)
    targets = result_files(out, names, ".decoded.png")
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        sampling = sampling_shown(
            pipe, progress, f"decoding {embedding.name}", steps, guidance, rule
        )
        save_pictures(pipe.decode(emb, height, width, seed=seed, **sampling), targets)


@app.command("info")
def _info(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An embedding, an adapter, or a pipeline folder.")
    ],
    as_json: Json = False,
) -> None:
    """Say what is in an embedding file, an adapter (folder or safetensors) or a pipeline folder."""
    from sda_fast.cli.describe import describe

    found = describe(file)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name.replace('_', ' '):<{width}}  {_plain(value)}")


@app.command("doctor")
def _doctor(model: Model = "scenes", as_json: Json = False) -> None:
    """Check versions, GPU, which attention will run and why, and the model's weights.

    Exit code 1 if there is a problem.
    """
    from rich.console import Console

    from sda_fast.cli.doctor import examine, show

    with progress_on(stderr_console()) as progress, working(progress, "looking"), quiet():
        report = examine(model)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        show(report, Console(highlight=False))
    if report["problems"]:
        raise typer.Exit(FAILED)


@app.command("demo")
def _demo(
    out: Out = Path("out/demo"),
    model: Model = "scenes",
    pictures: Annotated[
        list[Path] | None,
        typer.Option(help="Two or more of your own: a file or a folder; may be repeated."),
    ] = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the scenes and of the noise.")] = 0,
) -> None:
    """Encode, rebuild, interpolate and transplant unseen pictures; write a report to look at."""
    from sda_fast.cli.demo import run_demo

    typer.echo(run_demo(out, model, pictures or (), steps=steps, seed=seed))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) if value else "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
