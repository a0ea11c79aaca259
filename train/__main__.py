"""``python -m train RECIPE [--set key=value ...]``: run or resume a training run."""

from difflib import get_close_matches
from typing import Annotated, NoReturn

import typer

from train.config import AdapterConfig, TrainConfig, override
from train.recipes import CHAINS, RECIPES
from train.stage import Stage

EXPORT = "export-scenes"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    recipe: Annotated[str | None, typer.Argument(help="A name from --list.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the recipe's own.")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Explain each recipe.")] = False,
) -> None:
    """Run a recipe; started again, it resumes from its newest checkpoint.

    Exit codes: 0 finished, 1 something it needs is missing or broken, 2 bad usage.
    """
    if list_recipes or recipe is None:
        for name, make in RECIPES.items():
            print(f"{name:16} {(make.__doc__ or '').splitlines()[0]}")
        for name, recipes in CHAINS.items():
            print(f"{name:16} {' and then '.join(recipes)}.")
        print(f"{EXPORT:16} Gather the finished scenes runs as the model that ships.")
        raise typer.Exit(0 if list_recipes else 2)
    if recipe == EXPORT:
        _export(assignments or [])
        return
    if recipe not in RECIPES and recipe not in CHAINS:
        near = get_close_matches(recipe, [*RECIPES, *CHAINS]) or list(RECIPES)
        _fail(f"no recipe {recipe!r}; near: {', '.join(near)}", 2)
    for name in CHAINS.get(recipe, (recipe,)):
        _run(name, assignments or [])


def _run(recipe: str, assignments: list[str]) -> None:
    try:
        config = override(RECIPES[recipe](), assignments)
    except ValueError as error:
        _fail(str(error), 2)
    from train.loop import train

    try:
        train(config, build_stage(config))
    except (OSError, ValueError, FloatingPointError) as error:
        _fail(f"{recipe}: {error}", 1)
    print(f"finished: {config.folder / 'export'}")


def _export(assignments: list[str]) -> None:
    from train.scenes_export import export_scenes

    try:
        runs = override(RECIPES["scenes-text"](), assignments).out_dir
        written = export_scenes(runs)
    except (OSError, ValueError) as error:
        _fail(f"{EXPORT}: {error}", 1)
    print(f"finished: {written / 1e6:.1f} MB")


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def build_stage(config: TrainConfig) -> Stage:
    """Return the stage that config.stage names, with its models built or loaded."""
    if config.stage == "text":
        from train.scenes_text import TextStage

        return TextStage(config)
    if config.stage == "clip":
        from train.scenes_encoders import ClipStage

        return ClipStage(config)
    if config.stage == "dino":
        from train.scenes_encoders import DinoStage

        return DinoStage(config)
    from train.scenes_adapter import AdapterStage

    assert isinstance(config, AdapterConfig)
    return AdapterStage(config)


if __name__ == "__main__":
    app()
