"""The command line: ``sda-fast COMMAND``.

Results (paths, or JSON) go to stdout, one a line; words for people and progress go to stderr.
Exit codes: 0 all done; 1 the work failed; 2 bad input or usage.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sda_fast.cli.targets import prepare, result_files
from sda_fast.cli.terminal import (
    load_adapter,
    load_pipeline,
    progress_on,
    quiet,
    stderr_console,
    steps_shown,
    working,
)

if TYPE_CHECKING:
    from PIL import Image
    from rich.progress import Progress

    from sda_fast.embedding import SemanticEmbedding
    from sda_fast.pipeline import SemanticPipeline

FAILED, BAD_INPUT = 1, 2
BAD_INPUTS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
FAILURES = (OSError, NotImplementedError, MemoryError)


class _Commands(TyperGroup):
    """Turns expected errors into one line on stderr and an exit code; the rest is a bug."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except BAD_INPUTS as error:
            _give_up(error, BAD_INPUT)
        except FAILURES as error:
            _give_up(error, FAILED)
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; it may not be imported
                raise
            _give_up(error, FAILED)


app = typer.Typer(
    cls=_Commands,
    help="Pictures as short, editable embeddings for a frozen FLUX, and pictures again.",
    epilog="Exit codes: 0 all done, 1 the work failed, 2 bad input or usage. "
    "Results go to stdout, one a line; messages and progress to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Pictures = Annotated[list[Path], typer.Argument(metavar="PICTURE", show_default=False)]
Model = Annotated[str, typer.Option(help='"scenes" comes with the package; or a pipeline folder.')]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the results, made if needed.")]
Side = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default="the model's")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps.", show_default="the model's")
]
Guidance = Annotated[
    float | None, typer.Option(help="Scale of the guidance.", show_default="the model's")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]
Rule = Annotated[str, typer.Option(help="Mask rule: overlap, local or isolated.")]
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
    images = _open_all(pictures)
    targets = result_files(out, pictures, ".rebuilt.png")
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        for picture, image, target in zip(pictures, images, targets, strict=True):
            sampling = _sampling(
                pipe, progress, f"rebuilding {picture.name}", steps, guidance, rule
            )
            _save_all(pipe.reconstruct(image, height, width, seed, **sampling), [target])


@app.command("encode")
def _encode(pictures: Pictures, model: Model = "scenes", out: Out = Path("out")) -> None:
    """Write the embedding of each picture: OUT/NAME.safetensors."""
    images = _open_all(pictures)
    targets = result_files(out, pictures, ".safetensors")
    with progress_on(stderr_console()) as progress:
        adapter = load_adapter(model, progress)
        task = progress.add_task("encoding", total=len(images))
        for image, target in zip(images, targets, strict=True):
            adapter.encode(image).save(target)
            progress.advance(task)
            typer.echo(target)


@app.command("decode")
def _decode(
    embedding: Annotated[Path, typer.Argument(metavar="EMBEDDING", show_default=False)],
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
    names = [embedding] * len(emb)
    targets = result_files(out, names, ".decoded.png")
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        sampling = _sampling(pipe, progress, f"decoding {embedding.name}", steps, guidance, rule)
        _save_all(pipe.decode(emb, height, width, seed=seed, **sampling), targets)


@app.command("interpolate")
def _interpolate(
    a: Annotated[Path, typer.Argument(metavar="A", help="A picture, or an embedding file.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Likewise.")],
    frames: Annotated[int, typer.Option(min=2, help="Pictures, both ends included.")] = 7,
    method: Annotated[str, typer.Option(help="slerp or lerp of the positions.")] = "slerp",
    node: Annotated[
        list[str] | None,
        typer.Option(help="Change this node alone, such as /1; may be repeated."),
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
    """Draw the way from A to B: OUT/A-to-B.0.png and so on, and OUT/A-to-B.strip.png."""
    from sda_fast.cli.sheets import Tile, contact_sheet, enlarge, save_png

    first, last = _open_end(a), _open_end(b)
    title = f"{a.stem}-to-{b.stem}"
    targets = [out / f"{title}.{i}.png" for i in range(frames)]
    strip = out / f"{title}.strip.png"
    prepare(out, [*targets, strip], [a, b])
    with progress_on(stderr_console()) as progress:
        pipe = load_pipeline(model, progress)
        sampling = _sampling(pipe, progress, f"drawing {frames} frames", steps, guidance, rule)
        sampling["denoise_steps"] = sampling.pop("steps")
        sampling |= {"height": height, "width": width, "seed": seed}
        found: Any = pipe.interpolate(
            first, last, frames, method=method, nodes=node or None, **sampling
        )
        _save_all(found, targets)
    tiles = [Tile(enlarge(f), f"{i / (frames - 1):.2f}") for i, f in enumerate(found)]
    typer.echo(save_png(contact_sheet([tiles], f"{a.name} to {b.name}"), strip))


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


def main() -> None:
    """Entry point of ``sda-fast``."""
    app()


def _give_up(error: BaseException, code: int) -> NoReturn:
    words = str(error) or type(error).__name__
    stderr_console().print(f"[bold red]error:[/] {_escape(words)}", soft_wrap=True)
    raise typer.Exit(code)


def _escape(words: str) -> str:
    from rich.markup import escape

    return escape(words)


def _open_all(pictures: Sequence[Path]) -> "list[Image.Image]":
    from sda_fast.images import load_image

    return [load_image(picture) for picture in pictures]


def _open_end(path: Path) -> "Image.Image | SemanticEmbedding":
    if path.suffix != ".safetensors":
        return _open_all([path])[0]
    from sda_fast.embedding import SemanticEmbedding

    return SemanticEmbedding.load(path)


def _sampling(
    pipe: "SemanticPipeline",
    progress: "Progress",
    words: str,
    steps: int | None,
    guidance: float | None,
    rule: str,
) -> dict[str, Any]:
    """Options of ``decode``, with a bar that moves at each step."""
    callback = steps_shown(progress, words, steps or pipe.defaults.steps)
    return {
        "steps": steps,
        "guidance": guidance,
        "rule": rule,
        "callback_on_step_end": callback,
    }


def _save_all(pictures: Any, targets: Sequence[Path]) -> None:
    from sda_fast.cli.sheets import save_png

    for picture, target in zip(pictures, targets, strict=True):
        typer.echo(save_png(picture, target))


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value)) if value else "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
