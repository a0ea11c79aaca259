"""A folder of pictures, with or without a list of them in metadata.jsonl."""

import hashlib
import json
import os
import stat
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from sda_fast.images import MAX_PIXELS
from train.data.index import Entry, Index, join
from train.data.order import Size
from train.data.pictures import KINDS, check_bytes, open_picture, upright_size

METADATA = "metadata.jsonl"
CHUNK = 1024  # files that a thread reads at a time


@dataclass(frozen=True, slots=True)
class File:
    """One file below a folder.

    Attributes:
        name: from the folder on, with slashes.
        length: in bytes.
        changed: when, in nanoseconds.
        size: of the picture in it, where it is known already.
    """

    name: str
    length: int
    changed: int
    size: Size | None = None


@dataclass(slots=True)
class Listing:
    """Files below a folder, by name, and what was refused of them."""

    files: list[File] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def sha256(self) -> str:
        """Of names, lengths and times: another one means that something has changed."""
        rows = [(f.name, f.length, f.changed, f.size) for f in self.files]
        text = json.dumps([rows, self.refused])
        return hashlib.sha256(text.encode()).hexdigest()

    def take(self, name: str, path: str | None, size: Size | None = None) -> None:
        """Add a file, or the reason why it is refused.

        Args:
            name: of the file.
            path: where it lies, links followed; None for out of the folder.
            size: of its picture, where it is known.
        """
        if path is None:
            self.refused[name] = "is a link out of the folder"
            return
        try:
            about = os.stat(path)
        except OSError as error:
            self.refused[name] = f"cannot be read: {error.strerror}"
            return
        if not stat.S_ISREG(about.st_mode):
            self.refused[name] = "is no file"
            return
        self.files.append(File(name, about.st_size, about.st_mtime_ns, size))

    def take_named(self, root: Path, name: str, size: Size | None = None) -> None:
        """Add a picture that a list names, or the reason why it is refused.

        Args:
            root: resolved; the name leads on from there.
            name: with slashes.
            size: of the picture, where it is known.
        """
        if name.startswith("/") or ".." in PurePosixPath(name).parts:
            self.refused[name] = "leads out of the folder"
        elif PurePosixPath(name).suffix.lower() not in KINDS:
            self.refused[name] = f"must be one of {', '.join(KINDS)}"
        elif size and size[0] * size[1] > MAX_PIXELS:
            self.refused[name] = f"must have at most {MAX_PIXELS:,} pixels, has {size}"
        else:
            self.take(name, _inside(root, name), size)


def list_folder(root: Path, suffixes: Collection[str]) -> Listing:
    """Everything below root of these extensions; names that begin with a dot are passed over.

    Folders that are links into root are passed over too: what is in them is found where it lies.

    Args:
        root: resolved.
        suffixes: with the dot, in small letters.

    Raises:
        OSError: a folder cannot be read.
    """
    listing = Listing()
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name)
                elif _may_matter(entry, root, suffixes):
                    if printable(name) == name:
                        link = entry.is_symlink()
                        listing.take(name, _inside(root, name) if link else entry.path)
                    else:
                        listing.refused[printable(name)] = "has a name that is not UTF-8"
    listing.files.sort(key=lambda file: file.name)
    listing.refused = dict(sorted(listing.refused.items()))
    return listing


def list_metadata(root: Path) -> Listing:
    """The pictures that ``metadata.jsonl`` names: a JSON object a line, with "file_name".

    With "width" and "height", of the picture upright, its header is not read. Whatever else it
    holds is passed over.

    Raises:
        ValueError: a line is no such object, or names what an earlier one has named.
        OSError: it cannot be read.
    """
    listing, seen = Listing(), set()
    with (root / METADATA).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, size = _read_line(line)
            except ValueError as error:
                raise ValueError(f"data: {root / METADATA}, line {number}: {error}") from error
            if name in seen:
                raise ValueError(f"data: {root / METADATA}, line {number}: {name} comes twice")
            seen.add(name)
            listing.take_named(root, name, size)
    listing.files.sort(key=lambda file: file.name)
    return listing


def index_folder(root: Path, listing: Listing, workers: int) -> Index:
    """Read the headers of these pictures, in so many threads."""
    files = listing.files
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(partial(_index_files, root), chunks))
    return join([Index.of([], listing.refused), *parts])


def file_name(key: str, name: str) -> str:
    """A name that a list gives to a file, without ``./`` in front.

    Args:
        key: of the list, for the message.
        name: what it says.

    Raises:
        ValueError: no file can have it.
    """
    if not name or "\0" in name or printable(name) != name:
        raise ValueError(f"{key} must be the name of a file, got {name!r}")
    return PurePosixPath(name).as_posix()


def printable(name: str) -> str:
    """A name of the file system as UTF-8 can hold it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _index_files(root: Path, files: list[File]) -> Index:
    entries, refused = [], {}
    for file in files:
        try:
            check_bytes(file.length)
            size = file.size or _read_size(root / file.name)
            entries.append(Entry(file.name, size, (0, 0, file.length)))
        except (OSError, ValueError) as error:
            refused[file.name] = str(error)
    return Index.of(entries, refused)


def _read_size(path: Path) -> Size:
    with path.open("rb") as stream, open_picture(stream, path.name) as image:
        return upright_size(image)


def _read_line(line: str) -> tuple[str, Size | None]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(name := row.get("file_name"), str):
        raise ValueError(f'must be an object with "file_name", got {line.strip()[:80]}')
    name = file_name("file_name", name)
    height, width = row.get("height"), row.get("width")
    if height is None and width is None:
        return name, None
    if type(height) is not int or type(width) is not int or min(height, width) < 1:
        raise ValueError(f"height and width must be numbers of pixels, got {height} and {width}")
    return name, (height, width)


def _may_matter(entry: os.DirEntry[str], root: Path, suffixes: Collection[str]) -> bool:
    """Whether it is what is looked for, or a link out of root to a folder."""
    if entry.is_symlink() and os.path.isdir(entry.path):
        return not Path(os.path.realpath(entry.path)).is_relative_to(root)
    return os.path.splitext(entry.name)[1].lower() in suffixes


def _inside(root: Path, name: str) -> str | None:
    """Where a name leads, or None if that is not below root."""
    path = os.path.realpath(root / name)
    return path if Path(path).is_relative_to(root) else None
