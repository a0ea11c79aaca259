"""Tars of pictures in the layout of webdataset; nothing is unpacked to disk, nothing unpickled."""

import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from train.data.folder import Listing, printable
from train.data.index import Entry, Index, join
from train.data.order import Size
from train.data.pictures import KINDS, check_bytes, open_picture, upright_size

SUFFIX = ".tar"


def index_tars(root: Path, listing: Listing, workers: int) -> Index:
    """Find the pictures in these tars and read their headers, a tar a thread.

    A member is a picture if what follows the first dot of its name is the extension of one, as
    webdataset cuts names: ``key.jpg`` is, ``key.mask.png`` is not, nor ``key.json``.

    Args:
        root: of the listing.
        listing: of tars.
        workers: threads.
    """
    names = tuple(file.name for file in listing.files)
    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(partial(_index_tar, root), range(len(names)), names))
    return replace(join([Index.of([], listing.refused), *parts]), files=names)


def read_span(path: Path, offset: int, length: int) -> bytes:
    """These bytes of a file.

    Raises:
        ValueError: the file ends before.
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(file, length, offset)
    finally:
        os.close(file)
    if len(data) != length:
        raise ValueError(f"{path} ends {length - len(data):,} bytes too early")
    return data


def _index_tar(root: Path, number: int, name: str) -> Index:
    entries, refused = [], {}
    path = root / name
    seen: set[str] = set()
    try:
        # "r:" is without compression: spans are read in place
        with tarfile.open(path, "r:") as archive:
            for member in _members(archive, path):
                shown = printable(member.name)
                try:
                    if size := _look(archive, member, seen):
                        span = (number, member.offset_data, member.size)
                        entries.append(Entry(_plain(shown), size, span))
                except ValueError as error:
                    refused[f"{name}/{shown}"] = str(error)
    except (tarfile.TarError, EOFError, ValueError) as error:
        refused[name] = f"is damaged, or no tar without compression: {error}"
    except OSError as error:
        refused[name] = f"cannot be read: {error}"
    return Index.of(entries, refused)


def _members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """Its members; a tar that stops where none should is an error, which tarfile hides."""
    length = path.stat().st_size
    at = 0
    while member := archive.next():
        begin = member.offset_data
        if member.isreg() and not member.issparse() and begin + member.size > length:
            raise tarfile.ReadError(f"{printable(member.name)} is longer than the file")
        if archive.offset <= at:
            raise tarfile.ReadError(f"{printable(member.name)} has a length below 0")
        at = archive.offset
        yield member
    with path.open("rb") as stream:
        stream.seek(archive.offset)
        if stream.read(tarfile.BLOCKSIZE).strip(tarfile.NUL):
            raise tarfile.ReadError(f"no header at byte {archive.offset:,}, and no end")


def _look(archive: tarfile.TarFile, member: tarfile.TarInfo, seen: set[str]) -> Size | None:
    """The size of a picture, None for what is no picture; ValueError if it is refused."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError("has a name that leads out of the tar")
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        raise ValueError("is no plain file: a link, a device or one with holes")
    if name.suffix.lower() not in KINDS or name.name.count(".") != 1:
        return None
    if printable(member.name) != member.name:
        raise ValueError("has a name that is not UTF-8")
    if _plain(member.name) in seen:
        raise ValueError("comes twice in the tar: the first is taken")
    seen.add(_plain(member.name))
    check_bytes(member.size)
    stream = archive.extractfile(member)
    assert stream is not None  # it is a plain file
    with stream, open_picture(stream, name.name) as image:
        return upright_size(image)


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()  # without ./ in front
