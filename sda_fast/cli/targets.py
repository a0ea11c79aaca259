"""Where the results of a command go: files of one folder, never an input."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

LONGEST_NAME = 100
"""Characters of a name that is made of several; a file system takes 255 bytes, endings and all."""


def result_files(out: Path, inputs: Sequence[Path], suffix: str) -> list[Path]:
    """One result file for each input, numbered where names are the same; see ``check_targets``."""
    targets: list[Path] = []
    for path in inputs:
        target, number = out / f"{path.stem}{suffix}", 2
        while target in targets:
            target, number = out / f"{path.stem}-{number}{suffix}", number + 1
        targets.append(target)
    check_targets(out, targets, inputs)
    return targets


def check_targets(out: Path, targets: Sequence[Path], inputs: Sequence[Path]) -> None:
    """See that results can be written to a folder and none would replace an input; nothing is made.

    Raises:
        NotADirectoryError: see ``check_folder``.
        ValueError: a result would replace an input.
    """
    check_folder(out)
    for target in targets:
        if any(target.exists() and target.samefile(path) for path in inputs):
            raise ValueError(f"--out must not lead to the input {target}: it would be overwritten")


def check_folder(out: Path) -> None:
    """See that ``--out`` is a folder or can become one; nothing is made.

    Raises:
        NotADirectoryError: it, or a part of its path, is something else.
    """
    for path in (out, *out.parents):
        if os.path.lexists(path) and not path.is_dir():
            raise NotADirectoryError(f"--out must be a folder, got {out}, but {path} is none")


def save_pictures(pictures: Iterable[Any], targets: Sequence[Path]) -> None:
    """Write PIL images as PNG, each whole or not at all, and print where; their folder is made."""
    from sda_fast.cli.sheets import save_png

    targets[0].parent.mkdir(parents=True, exist_ok=True)
    for picture, target in zip(pictures, targets, strict=True):
        typer.echo(save_png(picture, target))
