"""``python -m train RECIPE [--set key=value ...]``: run or resume a training run."""

import json
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch.distributed as dist
import typer
from typer.core import TyperGroup

from train.config import AdapterConfig, EditConfig, FluxConfig, TrainConfig, override
from train.ranks import Ranks, leave, open_ranks
from train.recipes import CHAINS, RECIPES
from train.signals import AGAIN, Ended
from train.stage import Stage

HELP = """Run a recipe; started again, it resumes from its newest checkpoint.

Exit codes: 0 finished, 1 something it needs is missing or broken, 2 bad usage, 75 told to end by
SIGTERM or SIGUSR1 and saved: the same command line goes on; 130 interrupted. torchrun hands SIGTERM
on to its ranks (SIGUSR1 too, if --signals-to-handle names it), kills them after --shutdown-timeout,
30 s unless set, and itself ends with 1.
"""
RecipeName = Annotated[str, typer.Argument(help="A name of python -m train --list.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, over the recipe's own.")
]
FAULTS = (OSError, ValueError, FloatingPointError, RuntimeError, ImportError)


class _Commands(TyperGroup):
    """``RECIPE`` is short for ``run RECIPE``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put "run" in front of what is no command."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_Commands, add_completion=False, pretty_exceptions_enable=False)


@app.command(help=HELP)
def run(
    recipe: RecipeName = "",
    assignments: Assignments = None,
    parent: Annotated[
        str | None,
        typer.Option("--from", help="A run or checkpoint to grow from, or 'scratch'."),
    ] = None,
    report_to: Annotated[
        list[str] | None, typer.Option(help="wandb or trackio, beside the log and TensorBoard.")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Explain each recipe.")] = False,
) -> None:
    """See HELP."""
    if list_recipes or not recipe:
        _explain()
        raise typer.Exit(0 if list_recipes else 2)
    for name in CHAINS.get(recipe, (recipe,)):
        config = _config(name, assignments)
        try:
            with open_ranks(config.timeout_s) as ranks:
                _train(config, parent, report_to or [], ranks)
        except Ended as error:
            typer.echo(f"{name}: {error}", err=True)
            _end(AGAIN)
        except FAULTS as error:
            _fail(f"{name}: {error}", 1)
        except KeyboardInterrupt:
            _end(130)
        except Exception:
            traceback.print_exc()
            _end(1)


@app.command()
def precompute(
    recipe: RecipeName,
    to: Annotated[Path, typer.Option(help="Folder of the shards.")],
    assignments: Assignments = None,
) -> None:
    """Write encoder features and VAE latents of a recipe's pictures as safetensors shards.

    Under torchrun all ranks share the work. Started again it goes on, with any number of ranks.
    """
    config = _flux_config("precompute", recipe, assignments)
    from train.flux import precompute_for

    try:
        with open_ranks(config.timeout_s) as ranks:
            finished = precompute_for(config, to, ranks)
    except FAULTS as error:
        _fail(f"precompute: {error}", 1)
    # of all ranks the last one sees the end
    if finished:
        print(f"finished: {to}")


@app.command("precompute-edits")
def precompute_edits(
    recipe: RecipeName,
    to: Annotated[Path, typer.Option(help="Folder of the shards.")],
    pairs: Annotated[int | None, typer.Option(help="Edits of scenes to draw.")] = None,
    assignments: Assignments = None,
) -> None:
    """Write source and target embeddings of a recipe's edits, for --set pairs=FOLDER.

    Of pictures it takes all that data=... lists, of scenes it draws --pairs. Under torchrun all
    ranks share the work. Started again it goes on, with any number of ranks.
    """
    config = _config(recipe, assignments)
    if not isinstance(config, EditConfig):
        _fail(f"precompute-edits is of recipes of an editor, got {recipe}", 2)
    from train.edit_data import precompute_edits as make

    try:
        with open_ranks(config.timeout_s) as ranks:
            finished = make(config, to, ranks, pairs)
    except FAULTS as error:
        _fail(f"precompute-edits: {error}", 1)
    if finished:
        print(f"finished: {to}")


@app.command()
def plan(
    recipe: RecipeName,
    gpus: Annotated[int, typer.Option(help="How many.")] = 1,
    assignments: Assignments = None,
    pictures: Annotated[float | None, typer.Option(help="To train on; none: all steps.")] = None,
    price: Annotated[float | None, typer.Option(help="Of a GPU hour.")] = None,
    memory: Annotated[float, typer.Option(help="GiB of a GPU.")] = 80.0,
    mfu: Annotated[float | None, typer.Option(help="Share to assume where none is known.")] = None,
    bandwidth: Annotated[float, typer.Option(help="GB/s between GPUs, each way.")] = 50.0,
) -> None:
    """Print memory, largest batch, pictures a second, hours and cost of a recipe."""
    config = _config(recipe, assignments)
    if not isinstance(config, AdapterConfig):
        _fail(f"plan is of recipes of an adapter, got {recipe}", 2)
    from train.plan import Assumptions, print_plan

    try:
        about = Assumptions(gpus, pictures, price, memory, mfu, bandwidth)
        print_plan(config, about)
    except FAULTS as error:
        _fail(f"plan: {error}", 1)


@app.command()
def plot(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Draw a run's log and sheets as one HTML file."""
    from train.plot import plot_run

    _print(lambda: plot_run(run), "plot")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    to: Annotated[Path | None, typer.Option(help="Folder; none: in the run's.")] = None,
) -> None:
    """Write a run's adapter or editor as a folder for from_pretrained, with a model card."""
    from train.export import export_run

    _print(lambda: export_run(run, to), "export")


@app.command()
def replay(
    step: Annotated[Path, typer.Argument(help="RUN/nonfinite/step-NNNNNN.json.")],
) -> None:
    """Compute a step again that was not taken, and say where numbers were not finite."""
    from train.nonfinite import replay as again

    try:
        with open_ranks(timeout_s=600.0) as ranks:
            for row in again(step, build_stage, ranks):
                print(json.dumps(row))
    except FAULTS as error:
        _fail(f"replay: {error}", 1)


@app.command("export-scenes")
def export_scenes(
    editor: Annotated[
        Path | None, typer.Option(help="Run of an editor: put into what ships already.")
    ] = None,
    assignments: Assignments = None,
) -> None:
    """Gather the finished scenes runs as the model that ships, or give that an editor."""
    from train import scenes_export

    if editor is not None:
        _print(lambda: f"{scenes_export.export_editor(editor) / 1e6:.1f} MB", "export-scenes")
        return
    runs = _config("scenes-text", assignments).out_dir
    _print(lambda: f"{scenes_export.export_scenes(runs) / 1e6:.1f} MB", "export-scenes")


def build_stage(config: TrainConfig, ranks: Ranks) -> Stage:
    """Return the stage that config.stage names, with its models built or loaded."""
    if config.stage == "text":
        from train.scenes_text import TextStage

        return TextStage(config, ranks)
    if config.stage == "clip":
        from train.scenes_encoders import ClipStage

        return ClipStage(config, ranks)
    if config.stage == "dino":
        from train.scenes_encoders import DinoStage

        return DinoStage(config, ranks)
    if config.stage == "instructions":
        from train.scenes_instructions import InstructionsStage

        return InstructionsStage(config, ranks)
    if isinstance(config, EditConfig):
        from train.editor import EditStage

        return EditStage(config, ranks)
    if isinstance(config, FluxConfig):
        from train.flux import FluxStage

        return FluxStage(config, ranks)
    from train.adapter import AdapterStage

    assert isinstance(config, AdapterConfig)
    return AdapterStage(config, ranks)


def _train(config: TrainConfig, parent: str | None, report_to: list[str], ranks: Ranks) -> None:
    from train.lineage import begins_anew, find_parent
    from train.loop import train
    from train.report import check_report_to

    check_report_to(report_to)
    found = None
    if isinstance(config, AdapterConfig):
        found = find_parent(config, parent) if begins_anew(config) else None
    elif parent is not None:
        raise ValueError(f"--from is for recipes of an adapter, got {config.name}")
    train(config, build_stage(config, ranks), ranks, found, report_to)
    if ranks.first:
        print(f"finished: {config.folder / 'export'}")


def _explain() -> None:
    lines = {name: (make.__doc__ or "").splitlines()[0] for name, make in RECIPES.items()}
    lines |= {name: f"{' and then '.join(recipes)}." for name, recipes in CHAINS.items()}
    width = max(map(len, lines))
    for name, line in lines.items():
        print(f"{name:{width}} {line}")


def _config(recipe: str, assignments: list[str] | None) -> TrainConfig:
    if recipe not in RECIPES:
        near = get_close_matches(recipe, [*RECIPES, *CHAINS]) or list(RECIPES)
        _fail(f"no recipe {recipe!r}; near: {', '.join(near)}", 2)
    try:
        return override(RECIPES[recipe](), assignments or [])
    except ValueError as error:
        _fail(str(error), 2)


def _flux_config(command: str, recipe: str, assignments: list[str] | None) -> FluxConfig:
    config = _config(recipe, assignments)
    if not isinstance(config, FluxConfig):
        _fail(f"{command} is of recipes on pictures, got {recipe}", 2)
    return config


def _print(act: Callable[[], Any], command: str) -> None:
    try:
        print(f"finished: {act()}")
    except FAULTS as error:
        _fail(f"{command}: {error}", 1)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    _end(code)


def _end(code: int) -> NoReturn:
    if dist.is_initialized():
        leave(code)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
