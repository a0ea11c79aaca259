"""What a person sees while the command line works: progress on stderr, and nothing else there."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from sda_fast.adapter import SemanticAdapter
    from sda_fast.pipeline import SemanticPipeline

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def stderr_console() -> Console:
    """A console on stderr; stdout is for results."""
    return Console(stderr=True, highlight=False)


def progress_on(console: Console) -> Progress:
    """Progress bars on a console; nothing is drawn where it is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        # rich would send what is printed to stdout to this console too
        redirect_stdout=sys.stdout.isatty(),
    )


@contextmanager
def working(progress: Progress, words: str) -> Generator[None, None, None]:
    """A moving bar for work whose length nobody knows."""
    task = progress.add_task(words, total=None)
    yield
    progress.update(task, total=1, completed=1)


def steps_shown(progress: Progress, words: str, total: int) -> StepCallback:
    """A bar of ``total`` denoising steps, as a ``callback_on_step_end`` that moves it."""
    task = progress.add_task(words, total=total)

    def advance(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        progress.advance(task)
        return tensors

    return advance


def sampling_shown(
    pipe: "SemanticPipeline",
    progress: Progress,
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


def load_pipeline(model: str, progress: Progress, edits: bool = False) -> "SemanticPipeline":
    """Load a pipeline without other bars.

    Args:
        model: "scenes", or a folder or hub id of a saved pipeline.
        progress: where to show that it loads.
        edits: whether to load the editor, too, and FLUX's T5, which may read for it.

    Raises:
        ValueError: see ``SemanticPipeline.from_pretrained``.
        OSError: likewise.
    """
    with working(progress, f"loading {model}"), quiet():
        from sda_fast.pipeline import SemanticPipeline

        without: dict[str, Any] = {"text_encoder_2": None, "tokenizer_2": None, "editor": False}
        without = {} if edits else without
        pipe = SemanticPipeline.from_pretrained(model, **without)
    pipe.flux.set_progress_bar_config(disable=True)
    return pipe


def load_adapter(model: str, progress: Progress) -> "SemanticAdapter":
    """Load the adapter and the encoders of a pipeline, without its FLUX.

    Args:
        model: as in ``load_pipeline``.
        progress: likewise.

    Raises:
        ValueError: the folder has no encoders, or see ``SemanticPipeline.from_pretrained``.
        OSError: likewise.
    """
    with working(progress, f"loading {model}"), quiet():
        from sda_fast import pipeline_parts
        from sda_fast.pipeline_folder import find_root, read_settings

        root = find_root(model)
        settings = read_settings(root)
        if settings.encoder is None:
            raise ValueError(f"model must have encoders to encode with, got {root} without them")
        parts = {name: root / name for name in ("adapter", "clip", "dino")}
        return pipeline_parts.load_adapter(parts, settings.encoder)


@contextmanager
def quiet() -> Generator[None, None, None]:
    """Without the loading bars of diffusers and transformers, and their advice on torchvision."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    logs = of_diffusers, of_transformers
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity, bars in before:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
