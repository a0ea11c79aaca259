"""Where samples come from: a folder of pictures, of tars, or of what was precomputed of them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sda_fast.weights import require_folder
from train.data.folder import METADATA, Listing, index_folder, list_folder, list_metadata
from train.data.index import Index, Indexed
from train.data.order import Size
from train.data.pictures import KINDS, decode
from train.data.shards import BEGUN, DONE, ShardSource
from train.data.tars import SUFFIX, index_tars, read_span

MOST_REFUSED = 0.01
"""Share of the samples that may be unfit before a run stops."""
NAMED = 20


class Source(Protocol):
    """Samples by number, 0 to n - 1."""

    @property
    def kind(self) -> Literal["pictures", "precomputed"]:
        """Whether a sample is a picture or what was precomputed of one."""
        ...

    @property
    def sizes(self) -> NDArray[np.int32]:
        """[n, 2] height and width: of each picture upright, or after the crop precomputed."""
        ...

    @property
    def refused(self) -> Mapping[str, str]:
        """Pictures found unfit at first sight, with the reason; they have no number."""
        ...

    @property
    def fingerprint(self) -> str:
        """A sha256 over ids, sizes and lengths in bytes."""
        ...

    def __len__(self) -> int: ...

    def ids(self, index: int) -> str:
        """The name of a sample, as a person finds it: from the folder on, through a tar."""
        ...

    def read(self, index: int, size: Size) -> dict[str, Tensor]:
        """One sample, cropped to height and width.

        Returns:
            "pictures" [3, H, W] uint8, or "features" [S, F] and "latents" [C, h, w].

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        ...


class PictureSource(Indexed):
    """Pictures in a folder or in its tars, as ``Source`` describes them."""

    kind: Literal["pictures"] = "pictures"

    def read(self, index: int, size: Size) -> dict[str, Tensor]:
        """Decode a picture, as ``train.data.pictures.decode``.

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        name = self.index.name(index)
        if not self.index.files:
            return {"pictures": decode((self.root / name).read_bytes(), name, size)}
        file, offset, length = self.index.spans[index].tolist()
        data = read_span(self.root / self.index.files[file], offset, length)
        return {"pictures": decode(data, name, size)}


def open_source(path: Path, cache: Path | None = None, workers: int = 8) -> Source:
    """Find the samples in a folder, whichever kind it is.

    A folder of pictures is searched to any depth; a ``metadata.jsonl`` in it, a JSON object with
    "file_name" a line, limits it to those it names. A folder of ``*.tar`` is taken as webdataset
    lays them out. Of every picture the header is read, nothing is decoded: files without a byte,
    with the extension of another kind, with too many pixels, names and links that lead out of the
    folder are refused.

    Args:
        path: the folder.
        cache: a file that keeps what was found. It holds while names, lengths and times of the
            files are those it was made of, and is made anew otherwise. Its folder is made too.
        workers: threads that read headers.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
        ValueError: there is no picture in it, pictures and tars, what was not precomputed to its
            end, or more than 1 % was refused; the first of these are listed.
        OSError: a folder in it, or the cache, cannot be read or written.
    """
    root = require_folder(path, "data").resolve()
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if (root / DONE).is_file():
        return ShardSource(root)
    if (root / BEGUN).is_file():
        raise ValueError(f"data must be precomputed to its end, got {root} without {DONE}")
    if (root / METADATA).is_file():
        listing, tars = list_metadata(root), False
    else:
        listing, tars = _list_either(root)
    read = index_tars if tars else index_folder
    return PictureSource(root, index_once(root, listing, cache, workers, read))


def index_once(
    root: Path,
    listing: Listing,
    cache: Path | None,
    workers: int,
    read: Callable[[Path, Listing, int], Index] = index_folder,
) -> Index:
    """The index of what was listed: as the cache keeps it, or read anew and kept there.

    Args:
        root: of the listing.
        listing: of pictures or tars.
        cache: see ``open_source``.
        workers: likewise.
        read: (root, listing, workers) -> index.

    Raises:
        ValueError: see ``check_refused``.
        OSError: the cache cannot be written.
    """
    key = listing.sha256()
    if (index := _kept(cache, key)) is None:
        index = replace(read(root, listing, workers), listing=key)
        check_refused(root, index)
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            index.save(cache)
    return index


def list_reasons(refused: Mapping[str, str]) -> str:
    """The first of these ids with their reasons, and how many more there are."""
    lines = [f"  {name}: {reason}" for name, reason in list(refused.items())[:NAMED]]
    if len(refused) > NAMED:
        lines.append(f"  and {len(refused) - NAMED:,} more")
    return "\n".join(lines)


def _list_either(root: Path) -> tuple[Listing, bool]:
    """Pictures or tars below root, and whether they are tars."""
    listing = list_folder(root, {*KINDS, SUFFIX})
    in_tars = [file.name.lower().endswith(SUFFIX) for file in listing.files]
    if any(in_tars) and not all(in_tars):
        raise ValueError(
            f"data must hold pictures or tars, got {root} with {len(in_tars) - sum(in_tars)} "
            f"pictures and {sum(in_tars)} tars"
        )
    return listing, any(in_tars)


def _kept(cache: Path | None, key: str) -> Index | None:
    """What the cache holds, if it is whole and of this listing."""
    if cache is None or not cache.is_file():
        return None
    try:
        index = Index.load(cache)
    except ValueError:
        return None
    return index if index.listing == key else None


def check_refused(root: Path, index: Index) -> None:
    """See that there are pictures, and few that are unfit.

    Raises:
        ValueError: there are none, or more than ``MOST_REFUSED`` were refused; some are listed.
    """
    count, total = len(index.refused), len(index) + len(index.refused)
    damaged = sum(name in index.refused for name in index.files)
    if count > MOST_REFUSED * total or damaged > MOST_REFUSED * len(index.files):
        of_tars = f", {damaged} of {len(index.files)} tars among them" if damaged else ""
        raise ValueError(
            f"data must have at most 1 % of unfit pictures, got {count:,} of {total:,} in {root}"
            f"{of_tars}:\n{list_reasons(index.refused)}"
        )
    if not len(index):
        raise ValueError(
            f"data must hold pictures ({', '.join(KINDS)}), tars of them, or what was precomputed, "
            f"got {root} without any"
        )
