"""Files that appear whole or not at all, and folders whose every bit is accounted for."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

MANIFEST = "SHA256SUMS"
"""In the form that ``sha256sum -c`` reads."""


def write_whole(path: str | PathLike[str], data: bytes | str) -> Path:
    """Write a file beside path and put it in its place; the folder must be there.

    Args:
        path: what is there already is replaced.
        data: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; path is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def moved_in_when_whole(
    folder: str | PathLike[str], key: str, own: Callable[[str], bool]
) -> Generator[Path, None, None]:
    """A scratch folder inside folder, whose files move up at the end, if nothing was raised.

    The key file goes first and comes last: cut off in between, the folder is without it and will
    be refused, so files of two saves are never read as one.

    Args:
        folder: created if it is not there.
        key: the name of the file without which nobody reads the folder.
        own: whether a file of that name is of an earlier save, to be removed; others stay.

    Raises:
        OSError: something cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial.") as scratch:
        yield Path(scratch)
        (folder / key).unlink(missing_ok=True)
        for file in folder.iterdir():
            if file.is_file() and own(file.name):
                file.unlink()
        for file in sorted(Path(scratch).iterdir(), key=lambda file: file.name == key):
            os.replace(file, folder / file.name)


def sync(path: Path) -> None:
    """Wait until the disk has a file or folder: a rename is no good if a power cut empties it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(root: Path) -> None:
    """Write the sha256 of every file below root to ``SHA256SUMS`` there."""
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    lines = [f"{_sha256(root / name)}  {name}\n" for name in files if name != MANIFEST]
    (root / MANIFEST).write_text("".join(lines), encoding="utf-8")


def check_manifest(root: Path) -> None:
    """Compare every file that ``SHA256SUMS`` names: a flipped bit would load in silence.

    Raises:
        ValueError: a file differs or is missing, or the manifest itself is torn.
    """
    for line in (root / MANIFEST).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        file = root / name
        if len(digest) != 64 or not name:
            raise ValueError(f"{root / MANIFEST} is torn at {line[:80]!r}")
        if not file.is_file() or _sha256(file) != digest:
            state = "differs from" if file.is_file() else "is missing, but named in"
            raise ValueError(f"{file} {state} {MANIFEST}: fetch or save it again")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
