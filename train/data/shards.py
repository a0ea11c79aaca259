"""Shards of what was precomputed of pictures: safetensors, each sample with a digest of its own."""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sda_fast.files import sync
from train.data.index import Entry, Index, Indexed, join
from train.data.order import Size

BEGUN, DONE, INDEX = "begun.json", "precomputed.json", "index.safetensors"
DIGESTS = "digests"
"""Tensor of a shard: [n, 32] uint8, a sha256 of each sample. A digest of the whole shard would
have every process read all of it, a GB, for the first sample it takes from it."""
FORMAT = 1  # of the folder
STALE = 3600  # seconds after which what another host began to write is taken for left


@dataclass(frozen=True, slots=True)
class Shard:
    """What the JSON beside a shard says.

    Attributes:
        size: height and width that its pictures were cropped to.
        ids: of its samples, by row.
        broken: pictures that are not in it, with the reason.
        length: of its file, in bytes.
        sha256: of its file.
    """

    size: Size
    ids: tuple[str, ...]
    broken: Mapping[str, str]
    length: int
    sha256: str


def shard_file(number: int) -> str:
    """The name of a shard's tensors."""
    return f"shard-{number:06d}.safetensors"


def _shard_note(out: Path, number: int) -> Path:
    return out / f"shard-{number:06d}.json"


@contextmanager
def durable(path: Path) -> Generator[Path, None, None]:
    """A file to write, which is on the disk before it takes the place of path.

    Raises:
        OSError: it cannot be written; path is as it was.
    """
    # several hosts may share the folder
    whose = f"{os.getpid()}@{socket.gethostname()}"
    partial = path.with_name(f".{path.name}.{whose}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object durably.

    Raises:
        OSError: it cannot be written; path is as it was.
    """
    with durable(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_shard(
    out: Path,
    number: int,
    size: Size,
    tensors: Mapping[str, Tensor],
    ids: Sequence[str],
    broken: Mapping[str, str],
) -> None:
    """Write a shard, then the JSON beside it that makes it valid. The same input, the same bytes.

    Args:
        out: the folder.
        number: of the shard, from 0.
        size: height and width its pictures were cropped to.
        tensors: each [n, ...], on the CPU.
        ids: of the n samples.
        broken: pictures that are not in it, with the reason.

    Raises:
        OSError: it cannot be written.
    """
    rows = [_digest({name: t[row] for name, t in tensors.items()}) for row in range(len(ids))]
    digests = torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8) if rows else None
    kept = torch.zeros(0, 32, dtype=torch.uint8) if digests is None else digests.view(-1, 32)
    data = save({**{k: t.contiguous() for k, t in tensors.items()}, DIGESTS: kept})
    with durable(out / shard_file(number)) as partial:
        partial.write_bytes(data)
    note = {
        "size": size,
        "ids": ids,
        "broken": broken,
        "length": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    write_json(_shard_note(out, number), note)


def read_note(out: Path, number: int) -> Shard:
    """What the JSON beside a shard says; the shard is not looked at.

    Raises:
        FileNotFoundError: there is none: the shard is missing.
        ValueError: it is damaged.
    """
    path = _shard_note(out, number)
    try:
        shard = Shard(**json.loads(path.read_text(encoding="utf-8")))
        height, width = shard.size
        return replace(shard, size=(height, width), ids=tuple(shard.ids))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_shard(out: Path, number: int, wanted: Sequence[str]) -> Shard:
    """See that a shard is whole and of these pictures.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is of other pictures, or its bytes are not those that were written.
    """
    shard, path = read_note(out, number), out / shard_file(number)
    there = [name for name in wanted if name not in shard.broken] == list(shard.ids)
    if not there or not shard.broken.keys() <= set(wanted):
        raise ValueError(f"{path} is of other pictures")
    _check_length(path, shard.length)
    with path.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"{path} differs from its sha256")
    return shard


def discard_shard(out: Path, number: int) -> None:
    """Take away the JSON beside a shard: it is missing from then on."""
    _shard_note(out, number).unlink(missing_ok=True)


def gather(out: Path, number: int) -> tuple[Index, list[int]] | None:
    """The index of shards 0 to number - 1 and their lengths, or None while one is missing.

    Raises:
        ValueError: the JSON of a shard is damaged.
    """
    parts, lengths = [], []
    for k in range(number):
        try:
            shard = read_note(out, k)
        except FileNotFoundError:
            return None
        rows = [Entry(name, shard.size, (k, row, 0)) for row, name in enumerate(shard.ids)]
        parts.append(Index.of(rows, shard.broken))
        lengths.append(shard.length)
    return replace(join(parts), files=tuple(map(shard_file, range(number)))), lengths


def finish(out: Path, begun: Mapping[str, Any], index: Index, lengths: Sequence[int]) -> None:
    """Write the index of all shards, and then the file that makes the folder a source.

    Args:
        out: the folder, with all its shards.
        begun: what ``begun.json`` says.
        index: as gathered.
        lengths: of the shards, likewise.

    Raises:
        OSError: something cannot be written.
    """
    with durable(out / INDEX) as partial:
        index.save(partial)
    about = {"pictures": len(index), "broken": len(index.refused), "lengths": lengths}
    write_json(out / DONE, {**begun, **about, "fingerprint": index.fingerprint()})
    _sweep(out)


class ShardSource(Indexed):
    """What was precomputed of pictures, as ``train.data.source.Source`` describes it.

    The length of every shard is compared at once, the digest of a sample when it is read.

    Args:
        root: folder that ``train.precompute`` has finished.

    Attributes:
        about: what was said of the encoders when it was made.
        buckets: (height, width) its pictures were cropped to.

    Raises:
        ValueError: something in it is damaged or truncated.
        OSError: something in it is missing.
    """

    kind: Literal["precomputed"] = "precomputed"

    def __init__(self, root: Path) -> None:
        try:
            done = json.loads((root / DONE).read_text(encoding="utf-8"))
            self.about: dict[str, Any] = done["about"]
            self.buckets: tuple[Size, ...] = tuple((h, w) for h, w in done["buckets"])
            lengths, fingerprint = done["lengths"], done["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"data: {root / DONE} is damaged: {error}") from error
        super().__init__(root, Index.load(root / INDEX))
        if self.fingerprint != fingerprint or len(lengths) != len(self.index.files):
            raise ValueError(f"data: {root / INDEX} is not that of {root / DONE}")
        for name, length in zip(self.index.files, lengths, strict=True):
            _check_length(root / name, length)

    def read(self, index: int, size: Size) -> dict[str, Tensor]:
        """One sample: "features" [S, F] and "latents" [C, h, w]; no more of the shard is read.

        Raises:
            ValueError: it is damaged, or was cropped to another size.
            OSError: its shard cannot be read.
        """
        if (had := tuple(self.sizes[index].tolist())) != tuple(size):
            raise ValueError(f"size must be {had}, as it was precomputed, got {tuple(size)}")
        file, row, _ = self.index.spans[index].tolist()
        path = self.root / self.index.files[file]
        try:
            with safe_open(path, "pt") as shard:
                sample = {name: shard.get_slice(name)[row] for name in shard.keys()}  # noqa: SIM118
            digest = bytes(sample.pop(DIGESTS).tolist())
        except (SafetensorError, KeyError, IndexError) as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from error
        if _digest(sample) != digest:
            raise ValueError(f"row {row} of {path} differs from its sha256")
        return sample


def _digest(sample: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in sorted(sample.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _sweep(out: Path) -> None:
    """Remove what processes left that were killed while they wrote."""
    for partial in out.glob(".*.partial"):
        whose = re.search(r"\.(\d+)@(.*)\.partial$", partial.name)
        with suppress(FileNotFoundError):  # others sweep too
            old = time.time() - partial.stat().st_mtime > STALE
            here = whose and whose[2] == socket.gethostname()
            if old or (whose and here and not Path(f"/proc/{whose[1]}").exists()):
                partial.unlink()


def _check_length(path: Path, wanted: int) -> None:
    if (length := path.stat().st_size) != wanted:
        raise ValueError(f"{path} must have {wanted:,} bytes, has {length:,}")
