"""Run the frozen encoders over all pictures once, into shards; cut off, it goes on by itself."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from train.config import differences
from train.data.loader import BrokenCount
from train.data.order import Size, assign_buckets
from train.data.shards import (
    BEGUN,
    FORMAT,
    Shard,
    check_shard,
    discard_shard,
    finish,
    gather,
    shard_file,
    write_json,
    write_shard,
)
from train.data.source import NAMED, Source

Encode = Callable[..., Mapping[str, Tensor]]
READERS = 8  # threads that decode; Pillow leaves the interpreter to others meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """Which pictures go into which shard, and what the folder says of itself.

    Attributes:
        buckets: (height, width) that pictures are cropped to.
        about: what the result depends on beside the pictures, as hashes of the encoders; JSON. A
            folder is not gone on with under another one.
        per_shard: pictures of a shard, at most.
        batch_size: pictures that are encoded at a time; the same pictures under another one give
            the same result up to rounding.
        wanted: tensors that encode must return.
    """

    buckets: tuple[Size, ...]
    about: Mapping[str, Any]
    per_shard: int = 256
    batch_size: int = 16
    wanted: tuple[str, ...] = ("features", "latents")

    def __post_init__(self) -> None:
        if min(self.per_shard, self.batch_size) < 1:
            raise ValueError(
                f"per_shard and batch_size must be at least 1, got {self.per_shard} and "
                f"{self.batch_size}"
            )


@dataclass(frozen=True, slots=True)
class _Part:
    """The pictures of a shard, all of one size."""

    size: Size
    indices: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Made:
    """A shard to write: tensors [n, ...], the ids of the n, what is not in it and why."""

    tensors: dict[str, Tensor]
    ids: list[str]
    broken: dict[str, str]


def precompute(
    source: Source,
    out: Path,
    encode: Encode,
    layout: ShardLayout,
    rank: int = 0,
    world: int = 1,
    progress: bool = True,
) -> bool:
    """Write features and latents of every picture, as ``train.data.source.open_source`` reads them.

    Shard k is made by the process of rank k modulo world; which process makes it does not change
    a byte of it. Shards that are there and whole are kept, so that after a kill, and under any
    other number of processes, the same call goes on. A shard that is damaged is named in a warning
    and made anew. Pictures that cannot be read are left out and named beside the shard.

    Args:
        source: of pictures.
        out: folder, new or begun by such a call.
        encode: what the source reads, in its order and stacked on the CPU: pictures
            [B, 3, H, W] uint8 -> "features" [B, S, F] and "latents" [B, C, h, w], or what else
            layout wants, which are kept in the dtype they come in.
        layout: of the shards.
        rank: of this process.
        world: number of processes.
        progress: show it on the terminal.

    Returns:
        Whether all is there and the folder a source; other processes may have to finish first.

    Raises:
        ValueError: an argument that cannot be; out holds something else, or was begun of other
            pictures or under another layout (the differences are listed); encode returns something
            else; more than 1 % of the pictures cannot be read (listed).
        FloatingPointError: encode returns what is not finite.
        OSError: out cannot be written.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be 0 to {world - 1}, got {rank}")
    if source.kind != "pictures" or not len(source):
        raise ValueError(f"source must hold pictures, got {len(source)} of kind {source.kind}")
    begun = {
        "format": FORMAT,
        "source": source.fingerprint,
        "buckets": [list(size) for size in layout.buckets],
        "per_shard": layout.per_shard,
        "about": dict(layout.about),
    }
    _begin(out, begun)
    parts = _cut(source, layout)
    with _progress(progress) as bar:
        own = {number: parts[number] for number in range(rank, len(parts), world)}
        _write(source, out, encode, layout, own, bar)
    return _finish(out, begun, len(parts), len(source))


def _write(
    source: Source,
    out: Path,
    encode: Encode,
    layout: ShardLayout,
    parts: Mapping[int, _Part],
    bar: Progress,
) -> None:
    """Make those of these shards that are missing."""
    count = BrokenCount(len(source))
    written: Future[None] | None = None
    task = bar.add_task("precompute", total=sum(len(part.indices) for part in parts.values()))
    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as writer:
        for number, part in parts.items():
            kept = _kept(source, out, number, part)
            made = kept or _encode_part(source, part, encode, layout, readers)
            count.add(len(part.indices), made.broken)
            if count.over():
                raise ValueError(count.message())
            if isinstance(made, _Made):
                if written is not None:
                    written.result()  # no more than one waits: it holds a GB at full size
                shard = made.tensors, made.ids, made.broken
                written = writer.submit(write_shard, out, number, part.size, *shard)
            bar.update(task, advance=len(part.indices))
        if written is not None:
            written.result()


def _begin(out: Path, begun: dict[str, Any]) -> None:
    """Claim the folder, or see that it was claimed for the same."""
    begun = json.loads(json.dumps(begun))
    out.mkdir(parents=True, exist_ok=True)
    path = out / BEGUN
    if not path.is_file():
        # another process may be about to claim it
        if foreign := sorted(p.name for p in out.iterdir() if not p.name.startswith(".")):
            if BEGUN in foreign:
                return _begin(out, begun)
            raise ValueError(f"out must be a new folder, got {out} with {', '.join(foreign[:4])}")
        write_json(path, begun)
        return
    try:
        had = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"out: {path} is damaged: {error}") from error
    if changed := differences(_flat(had), _flat(begun)):
        raise ValueError(
            f"out: {out} was begun otherwise: {'; '.join(changed)}. Choose another folder"
        )


def _flat(content: dict[str, Any]) -> dict[str, Any]:
    inner = {f"about.{key}": value for key, value in content.get("about", {}).items()}
    return {key: value for key, value in content.items() if key != "about"} | inner


def _cut(source: Source, layout: ShardLayout) -> list[_Part]:
    """The pictures of every shard: bucket after bucket, in the order of the source."""
    buckets = assign_buckets(source.sizes, layout.buckets)
    parts = []
    for bucket, size in enumerate(layout.buckets):
        members = np.flatnonzero(buckets == bucket)
        for start in range(0, len(members), layout.per_shard):
            parts.append(_Part(size, members[start : start + layout.per_shard]))
    return parts


def _kept(source: Source, out: Path, number: int, part: _Part) -> Shard | None:
    """The shard, if it is there and whole, and what was broken still is; None if not."""
    wanted = {source.ids(index): index for index in part.indices.tolist()}
    try:
        shard = check_shard(out, number, list(wanted))
    except FileNotFoundError:
        return None
    except ValueError as error:
        again = str(error)
    else:
        mended = [name for name in shard.broken if _readable(source, wanted[name], part.size)]
        if not mended:
            return shard
        again = f"{shard_file(number)} lacks {', '.join(mended[:NAMED])}, which can be read now"
    warnings.warn(f"{again}: the shard is made anew", RuntimeWarning, stacklevel=4)
    discard_shard(out, number)
    return None


def _readable(source: Source, index: int, size: Size) -> bool:
    try:
        source.read(index, size)
    except (OSError, ValueError):
        return False
    return True


def _encode_part(
    source: Source, part: _Part, encode: Encode, layout: ShardLayout, readers: ThreadPoolExecutor
) -> _Made:
    done: list[dict[str, Tensor]] = []
    names: list[str] = []
    broken: dict[str, str] = {}
    for ids, samples, unread in _batches(source, part, layout.batch_size, readers):
        broken |= unread
        if ids:
            read = [torch.stack([sample[key] for sample in samples]) for key in samples[0]]
            done.append(_encode(encode, read, ids, layout.wanted))
            names += ids
    keys = done[0] if done else ()
    return _Made({key: torch.cat([row[key] for row in done]) for key in keys}, names, broken)


def _batches(
    source: Source, part: _Part, batch_size: int, readers: ThreadPoolExecutor
) -> Iterator[tuple[list[str], list[dict[str, Tensor]], dict[str, str]]]:
    """(ids, samples, broken) of so many pictures; the next ones are decoded meanwhile."""

    def begin(start: int) -> list[tuple[str, Future[dict[str, Tensor]]]]:
        indices = part.indices[start : start + batch_size].tolist()
        return [(source.ids(i), readers.submit(source.read, i, part.size)) for i in indices]

    running = map(begin, range(0, len(part.indices), batch_size))
    ahead = list(islice(running, 2))
    while ahead:
        ids, samples, broken = [], [], {}
        for name, future in ahead.pop(0):
            try:
                samples.append(future.result())
                ids.append(name)
            except (OSError, ValueError) as error:
                broken[name] = str(error)
        ahead += islice(running, 1)
        yield ids, samples, broken


@torch.no_grad()
def _encode(
    encode: Encode, read: list[Tensor], ids: list[str], wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    result = {key: tensor.cpu() for key, tensor in encode(*read).items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in result.items()}
    rows = {shape[0] for shape in shapes.values() if len(shape) > 1}
    if not set(wanted) <= result.keys() or rows != {len(ids)}:
        raise ValueError(
            f"encode must return {' and '.join(wanted)} with {len(ids)} rows, got {shapes}"
        )
    for key, tensor in result.items():
        rows = tensor.float().flatten(1).isfinite().all(1).tolist()
        if bad := [name for name, finite in zip(ids, rows, strict=True) if not finite]:
            raise FloatingPointError(f"encode must return finite {key}, got others of {bad}")
    return result


def _finish(out: Path, begun: dict[str, Any], number: int, pictures: int) -> bool:
    gathered = gather(out, number)
    if gathered is None:
        return False
    index, lengths = gathered
    count = BrokenCount(pictures)
    count.add(pictures, index.refused)
    if count.over():
        raise ValueError(count.message())
    finish(out, begun, index, lengths)
    return True


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        disable=not shown,
    )
