"""Pairs of pictures and what was said to make one of the other, from a file of JSON lines."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.data.folder import Listing, file_name
from train.data.index import Entry, Index, Indexed
from train.data.order import Size
from train.data.pictures import decode
from train.data.shards import ShardSource
from train.data.source import check_refused, index_once

SOURCE, TARGET, SAID = "source", "target", "instruction"
TEXT_BYTES = 1024
"""Of the longest instruction, in UTF-8: shards keep all of one length."""

Row = tuple[str, str, str]
"""source, target, instruction."""


class EditSource(Indexed):
    """Edits as ``train.data.source.Source`` describes it; a sample's name is its line as a list.

    Attributes:
        sizes: of the sources, which those of the targets equal.
    """

    kind: Literal["pictures"] = "pictures"

    def read(self, index: int, size: Size) -> dict[str, Tensor]:
        """Both pictures of a pair [3, H, W] uint8, and the instruction of ``text_tensor``.

        Raises:
            ValueError: a picture is damaged.
            OSError: one cannot be read.
        """
        source, target, said = json.loads(self.index.name(index))
        names = {SOURCE: source, TARGET: target}
        read = {k: decode((self.root / n).read_bytes(), n, size) for k, n in names.items()}
        return {**read, SAID: text_tensor(said)}


def open_edits(path: Path, cache: Path | None = None, workers: int = 8) -> EditSource:
    """Find the pairs that a file lists, a JSON object a line: "source", "target", "instruction".

    Names lead on from the file's folder. Of every picture the header is read, nothing is decoded;
    what ``open_source`` refuses of pictures is refused here with all their pairs, and so are
    pairs of two sizes.

    Args:
        path: the file.
        cache: see ``open_source``.
        workers: threads that read headers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no such object, says nothing or too much, or comes twice; or more
            than 1 % of pictures or pairs were refused: the first are listed.
        OSError: the file or the cache cannot be read or written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"data must be a file of JSON lines, got {path}, which is none")
    root, rows = path.resolve().parent, read_rows(path)
    listing = Listing()
    for name in sorted({name for row in rows for name in row[:2]}):
        listing.take_named(root, name)
    pictures = index_once(root, listing, cache, workers)
    known = {pictures.name(n): n for n in range(len(pictures))}
    entries, refused = [], {}
    for row in rows:
        name = json.dumps(row, ensure_ascii=False)
        if reason := _unfit(row, pictures, known):
            refused[name] = reason
            continue
        source, target = (known[picture] for picture in row[:2])
        height, width = pictures.sizes[source].tolist()
        # both lengths: another picture in the place of one is noticed
        length = int(pictures.spans[source, 2] + pictures.spans[target, 2])
        entries.append(Entry(name, (height, width), (0, 0, length)))
    index = Index.of(entries, refused)
    check_refused(root, index)
    return EditSource(root, index)


def read_rows(path: Path) -> list[Row]:
    """What the lines of a file say.

    Raises:
        ValueError: see ``open_edits``; the message names file and line.
        OSError: it cannot be read.
    """
    rows: dict[Row, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _read_row(line.decode())  # what is no UTF-8 is a ValueError, too
                if row in rows:
                    raise ValueError(f"is line {rows[row]} again")
            except ValueError as error:
                raise ValueError(f"data: {path}, line {number}: {error}") from error
            rows[row] = number
    return list(rows)


def instructions_of(source: ShardSource) -> Iterator[str]:
    """The instruction of every edit that was precomputed; no more of the shards is read.

    Raises:
        ValueError: a shard is damaged.
    """
    for file in source.index.files:
        try:
            with safe_open(source.root / file, "pt") as shard:
                # a shard without a whole pair holds nothing
                texts = shard.get_tensor(SAID) if SAID in shard.keys() else ()  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{source.root / file} is truncated or damaged: {error}") from error
        yield from map(text_of, texts)


def text_tensor(text: str) -> Tensor:
    """[TEXT_BYTES] uint8: a text in UTF-8, with zeros behind it."""
    data = text.encode()
    return torch.frombuffer(bytearray(data.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)


def text_of(tensor: Tensor) -> str:
    """The text of ``text_tensor``."""
    return bytes(tensor.tolist()).rstrip(b"\0").decode()


def _read_row(line: str) -> Row:
    found: Any = json.loads(line)
    keys = SOURCE, TARGET, SAID
    if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in keys):
        raise ValueError(
            f"must be an object with {', '.join(map(repr, keys))}, got {line.strip()[:80]}"
        )
    source, target = (file_name(key, found[key]) for key in keys[:2])
    said = found[SAID].strip()
    if not said or "\0" in said:
        raise ValueError(f"instruction must be a text that says something, got {found[SAID]!r}")
    if (length := len(said.encode())) > TEXT_BYTES:
        raise ValueError(
            f"instruction must have at most {TEXT_BYTES} bytes, got {length:,}: {said[:80]!r}"
        )
    return source, target, said


def _unfit(row: Row, pictures: Index, known: Mapping[str, int]) -> str | None:
    """Why a pair is refused; None if it is not."""
    for name in row[:2]:
        if name not in known:
            return f"{name} {pictures.refused[name]}"
    source, target = (tuple(pictures.sizes[known[name]].tolist()) for name in row[:2])
    return None if source == target else f"target must be as large as source, {source}, is {target}"
