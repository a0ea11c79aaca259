"""Where each picture lies and how large it is: arrays, which workers share and a file keeps."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sda_fast.files import write_whole
from train.data.order import Size

ARRAYS = ("names", "ends", "sizes", "spans")
FORMAT = 2  # of the file


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture.

    Attributes:
        name: of the picture in its folder or tar.
        size: height and width, upright.
        span: number of the file it lies in, and where there: offset and length in bytes in a tar,
            row and 0 in a shard; for a file of its own zeros and its length.
    """

    name: str
    size: Size
    span: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True, slots=True)
class Index:
    """What is known of n pictures.

    Attributes:
        names: UTF-8 bytes of all names in a row.
        ends: [n] int64, where each name ends there.
        sizes: [n, 2] int32, height and width, upright.
        spans: [n, 3] int64, as in ``Entry``.
        files: the tars or shards that pictures lie in; empty where each is a file of its own.
        refused: pictures that were found unfit, with the reason.
        listing: of what it was made, as a hash; "" for what is not kept.
    """

    names: NDArray[np.uint8]
    ends: NDArray[np.int64]
    sizes: NDArray[np.int32]
    spans: NDArray[np.int64]
    files: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    listing: str = ""

    @classmethod
    def of(cls, entries: Sequence[Entry], refused: Mapping[str, str] | None = None) -> "Index":
        """An index of these pictures, in this order."""
        names = [entry.name.encode() for entry in entries]
        return cls(
            np.frombuffer(b"".join(names), np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            np.array([entry.size for entry in entries], np.int32).reshape(-1, 2),
            np.array([entry.span for entry in entries], np.int64).reshape(-1, 3),
            refused=dict(refused or {}),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def name(self, index: int) -> str:
        """The name of a picture in its folder or tar.

        Raises:
            IndexError: there is no such picture.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 to {len(self) - 1}, got {index}")
        start = self.ends[index - 1] if index else 0
        return self.names[start : self.ends[index]].tobytes().decode()

    def id(self, index: int) -> str:
        """The name of a picture, behind that of the tar or shard that it lies in."""
        name = self.name(index)
        return f"{self.files[self.spans[index, 0]]}/{name}" if self.files else name

    def fingerprint(self) -> str:
        """A sha256 over ids, sizes and lengths: a file in another's place seldom has its length."""
        digest = hashlib.sha256(json.dumps([len(self), self.files]).encode())
        for part in (self.names, self.ends, self.sizes, self.spans[:, ::2]):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write it as one file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "format": FORMAT,
            "sha256": self._sha256(),
            "listing": self.listing,
            "files": self.files,
            "refused": self.refused,
        }
        tensors = {name: torch.from_numpy(getattr(self, name).copy()) for name in ARRAYS}
        write_whole(path, save(tensors, {"about": json.dumps(about)}))

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read what ``save`` wrote; the arrays stay in the file until they are used.

        Raises:
            ValueError: it is another file, truncated, or a bit of it has flipped.
            OSError: it cannot be read.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["about"])
                arrays = {name: file.get_tensor(name).numpy() for name in ARRAYS}
            kept, digest = about.pop("format"), about.pop("sha256")
            index = cls(**arrays, **about)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole index: {error}") from error
        index = replace(index, files=tuple(index.files))
        if kept != FORMAT or index._sha256() != digest:
            raise ValueError(f"{path} is no whole index: it differs from its own sha256")
        return index

    def _sha256(self) -> str:
        about = [self.listing, self.files, self.refused]
        digest = hashlib.sha256(json.dumps(about).encode())
        for name in ARRAYS:
            array = getattr(self, name)
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Indexed:
    """What a source knows of its samples from their index; see ``train.data.source.Source``.

    Args:
        root: folder of the source.
        index: of what is in it.
    """

    def __init__(self, root: Path, index: Index) -> None:
        self.root, self.index = root, index
        self.sizes, self.refused = index.sizes, index.refused
        self.fingerprint = index.fingerprint()

    def __len__(self) -> int:
        return len(self.index)

    def ids(self, index: int) -> str:
        """The name of a sample: from the folder on, through its tar or shard."""
        return self.index.id(index)


def join(parts: Sequence[Index]) -> Index:
    """One index of several, in this order; files and listing are of the first.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("parts must hold at least one index, got none")
    starts = np.cumsum([0, *(len(part.names) for part in parts)])
    return replace(
        parts[0],
        names=np.concatenate([part.names for part in parts]),
        ends=np.concatenate([p.ends + start for p, start in zip(parts, starts, strict=False)]),
        sizes=np.concatenate([part.sizes for part in parts]),
        spans=np.concatenate([part.spans for part in parts]),
        refused={name: why for part in parts for name, why in part.refused.items()},
    )
