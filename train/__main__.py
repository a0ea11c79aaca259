"""``python -m train RECIPE [--set key=value ...]``: run or resume a training run."""

from typing import Annotated

import typer

from train.config import TrainConfig, override
from train.loop import train
from train.recipes import RECIPES
from train.stage import Stage


def main(
    recipe: Annotated[str | None, typer.Argument(help="A name from --list.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, over the recipe's own.")
    ] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="Explain each recipe.")] = False,
) -> None:
    """Run a recipe; started again, it resumes from its newest checkpoint."""
    if list_recipes or recipe is None:
        for name, make in RECIPES.items():
            print(f"{name:16} {(make.__doc__ or '').splitlines()[0]}")
        raise typer.Exit(0 if list_recipes else 2)
    if recipe not in RECIPES:
        raise typer.BadParameter(f"no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
    try:
        config = override(RECIPES[recipe](), assignments or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    train(config, build_stage(config))
    print(f"finished: {config.folder / 'export'}")


def build_stage(config: TrainConfig) -> Stage:
    """Return the stage that config.stage names, with its models built or loaded."""
    if config.stage == "text":
        from train.scenes_text import TextStage

        return TextStage(config)
    if config.stage in ("clip", "dino"):
        from train.scenes_encoders import ClipStage, DinoStage

        return (ClipStage if config.stage == "clip" else DinoStage)(config)
    from train.scenes_adapter import AdapterStage

    return AdapterStage(config)


if __name__ == "__main__":
    typer.run(main)
