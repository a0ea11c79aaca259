"""Edits to learn from: of scenes as they are drawn, of pictures, or of what was precomputed."""

import hashlib
import math
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor

from sda_fast.scenes.edits import Edit, sample_edits
from sda_fast.scenes.render import render
from sda_fast.weights import require_folder
from train.batch import Batch
from train.config import EditConfig, PictureEditConfig
from train.data.edit_pairs import (
    SAID,
    SOURCE,
    TARGET,
    instructions_of,
    open_edits,
    read_rows,
    text_of,
    text_tensor,
)
from train.data.loader import Loader
from train.data.order import Order, Size, bucket_sizes
from train.data.shards import BEGUN, DONE, ShardSource
from train.data.source import Source
from train.edit_models import (
    Behind,
    Read,
    check_instructions,
    load_adapter,
    load_behind,
    load_instructions,
)
from train.flux import FITS, INDEX, check_made, hold_apart, models_of, sizes_of
from train.precompute import ShardLayout, precompute
from train.ranks import Ranks
from train.stage import HELD_OUT, WORLDS, shares

LATENTS = "latents"
"""Of the target; beside the positions of both, which lie under the names of the pictures."""


class EditData(Protocol):
    """What a stage of editors draws; see train.stage.Stage.

    A batch holds "source" and "target", [B, 3, H, W] pictures, or [B, N, C] positions with
    "latents" [B, c, h, w] of the target; its instructions are those of ``said``.
    """

    num_pictures: float
    about: dict[str, Any]

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        ...

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        ...

    def held_out(self, share: range) -> Batch:
        """Edits that are never trained on."""
        ...

    def unseen_shares(self, most: int) -> list[range]:
        """All their places, in parts of at most so many of one size."""
        ...


class SceneEdits:
    """Edits of scenes, drawn and rendered for each step; or trained on as they were precomputed."""

    def __init__(self, config: EditConfig, ranks: Ranks, pairs: ShardSource | None) -> None:
        self.config, self.places = config, shares(config, ranks)
        self.num_pictures: float = math.inf if pairs is None else len(pairs)
        made = None if pairs is None else pairs.fingerprint
        self.about: dict[str, Any] = {"world": config.world, "pairs": made}
        self._loader: Loader | None = None
        if pairs is not None:
            order = Order(np.zeros(len(pairs), np.int64), config.batch_size, config.seed)
            self._loader = Loader(pairs, order, pairs.buckets, self.places, workers=0)

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return self._drawn(first) if self._loader is None else self._loader.batches(first)

    def _drawn(self, first: int) -> Generator[list[Batch], None, None]:
        step = first
        while True:
            yield edit_batches(self.config, "train", step, self.places)
            step += 1

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        if self._loader is not None:
            return self._loader.batches_of(step, places)
        return edit_batches(self.config, "train", step, places)

    def held_out(self, share: range) -> Batch:
        """See EditData; always drawn."""
        return edit_batches(self.config, "test", 0, [share])[0]

    def unseen_shares(self, most: int) -> list[range]:
        """See EditData."""
        stop = self.config.eval_pictures
        return [range(at, min(at + most, stop)) for at in range(0, stop, most)]


class PictureEdits:
    """Edits of pictures, or of what was precomputed of them; some are held out."""

    def __init__(self, config: PictureEditConfig, ranks: Ranks, source: Source) -> None:
        self.unseen, self.loader = hold_apart(config, source, ranks)
        self.num_pictures: float = len(self.loader.source)
        unseen = hashlib.sha256("\n".join(self.unseen.ids).encode()).hexdigest()
        self.about: dict[str, Any] = {"data": source.fingerprint, "unseen": unseen}

    def batches(self, first: int) -> Generator[list[Batch], None, None]:
        """See Stage."""
        return self.loader.batches(first)

    def batches_of(self, step: int, places: list[range]) -> list[Batch]:
        """See Stage."""
        return self.loader.batches_of(step, places)

    def held_out(self, share: range) -> Batch:
        """See EditData."""
        return self.unseen.batch(share)

    def unseen_shares(self, most: int) -> list[range]:
        """See EditData."""
        return self.unseen.shares(most)


def edit_batches(
    config: EditConfig, split: Literal["train", "test"], step: int, places: list[range]
) -> list[Batch]:
    """Edits of a step with their instructions; step 0 are those that a run is looked at by."""
    world = WORLDS[config.world]
    seed = config.seed * 10**9 + step if step else HELD_OUT
    edits = sample_edits(world, split, seed, max(share.stop for share in places))
    return [
        Batch(
            step=step,
            places=tuple(share),
            ids=tuple(f"edit {seed}/{place}" for place in share),
            tensors=_rendered([edits[place] for place in share], world.size),
            size=(world.size, world.size),
            texts=tuple(edits[place].instruction for place in share),
        )
        for share in places
    ]


def said(batch: Batch) -> list[str]:
    """Instructions of a batch."""
    return list(batch.texts) or [text_of(text) for text in batch.tensors[SAID]]


def open_data(config: EditConfig, pairs: ShardSource | None, read: Read, ranks: Ranks) -> EditData:
    """The edits of a run; every instruction is looked at, nothing is computed.

    Args:
        config: of the run.
        pairs: of ``open_pairs``.
        read: what reads instructions.
        ranks: of the run; all call this.

    Raises:
        FileNotFoundError: data are not there, or none are set.
        ValueError: an instruction is too long; or see ``open_edits`` and ``hold_apart``.
        OSError: see ``open_edits``.
    """
    if pairs is not None:
        check_instructions(read, list(instructions_of(pairs)))
    if not isinstance(config, PictureEditConfig):
        return SceneEdits(config, ranks, pairs)
    return PictureEdits(config, ranks, pairs or open_pictures(config, read, ranks))


def open_pairs(config: EditConfig, behind: Behind) -> ShardSource | None:
    """What precompute-edits wrote, if the run learns from that.

    Raises:
        FileNotFoundError: there is no such folder, or nothing of the kind in it.
        ValueError: it is not finished or damaged, or made otherwise than the run wants it.
    """
    if config.pairs is None:
        return None
    root = require_folder(config.pairs, "pairs")
    if not (root / DONE).is_file():
        state = "not finished" if (root / BEGUN).is_file() else "not of its making"
        raise FileNotFoundError(
            f"pairs must be a folder that precompute-edits finished, {root} is {state}: it has no "
            f"{DONE}"
        )
    source = ShardSource(root)
    check_made("pairs", source, made_by(config, behind))
    return source


def open_pictures(config: PictureEditConfig, read: Read | None, ranks: Ranks) -> Source:
    """The pairs of pictures that config.data lists; see ``open_data``."""
    path, cache, workers = config.data, config.folder / INDEX, max(1, config.workers)
    if path is None:
        raise FileNotFoundError(
            f"data must be a file of JSON lines, got none: set data=... or pairs=... "
            f"({config.name})"
        )
    if not path.is_file():
        raise FileNotFoundError(f"data must be a file of JSON lines, got {path}, which is none")
    rows = read_rows(path)
    if read is not None:
        check_instructions(read, [row[2] for row in rows])
    return ranks.in_turn(lambda: open_edits(path, cache, workers))


def made_by(config: EditConfig, behind: Behind) -> dict[str, Any]:
    """What precomputed edits depend on beside their pictures; of the models what is loaded."""
    pictures = isinstance(config, PictureEditConfig)
    sizes = sizes_of(config) if pictures else {"world": config.world}
    models = {} if behind.readers is None else models_of(behind.readers)
    return {**sizes, "adapter": behind.fingerprint, **models}


class DrawnEdits:
    """Edits of scenes of the train split as a source; see train.data.source.Source.

    Args:
        config: of the run.
        count: how many.
    """

    kind: Literal["pictures"] = "pictures"
    refused: Mapping[str, str] = {}

    def __init__(self, config: EditConfig, count: int) -> None:
        self.world = WORLDS[config.world]
        # step 0 is never drawn to train on
        seed = config.seed * 10**9
        self.edits = sample_edits(self.world, "train", seed, count)
        self.sizes = np.full((count, 2), self.world.size, np.int32)
        name = f"{config.world} {seed} {count}"
        self.fingerprint = hashlib.sha256(name.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.edits)

    def ids(self, index: int) -> str:
        """The name of an edit."""
        return f"edit {index}"

    def read(self, index: int, size: Size) -> dict[str, Tensor]:
        """Both pictures [3, H, W] in [0, 1] and the instruction of ``text_tensor``."""
        edit = self.edits[index]
        drawn = {name: pictures[0] for name, pictures in _rendered([edit], size[0]).items()}
        return {**drawn, SAID: text_tensor(edit.instruction)}


def precompute_edits(config: EditConfig, to: Path, ranks: Ranks, count: int | None) -> bool:
    """Write the positions of edits, which runs of this config read by pairs=FOLDER.

    Args:
        config: of a recipe of editors.
        to: folder of the shards.
        ranks: that share the work.
        count: edits of scenes to draw; None for pictures, of which all are taken.

    Returns:
        Whether all is there; other ranks may have to finish first.

    Raises:
        FileNotFoundError: a model or the data are not there.
        ValueError: count does not fit the recipe or is below 1; or see ``open_edits`` and
            ``precompute``.
        OSError: see these.
    """
    pictures = isinstance(config, PictureEditConfig)
    if pictures == (count is not None) or (count is not None and count < 1):
        wanted = "left out for pictures" if pictures else "at least 1 for scenes"
        raise ValueError(f"--pairs must be {wanted}, got {'none' if count is None else count}")
    behind = load_adapter(config, ranks)
    if pictures:
        # a language model looks at them when it learns: it is not loaded for its tokenizer
        read = None if config.llm else load_instructions(config, ranks)
        source, buckets = open_pictures(config, read, ranks), bucket_sizes(config.resolution, FITS)
    else:
        assert count is not None
        source = DrawnEdits(config, count)
        buckets = ((source.world.size, source.world.size),)
    behind = load_behind(config, behind, ranks, decodes=False)

    def encode(source: Tensor, target: Tensor, said: Tensor) -> dict[str, Tensor]:
        before, after = source.to(ranks.device), target.to(ranks.device)
        return {
            SOURCE: behind.tokens(before).bfloat16(),
            TARGET: behind.tokens(after).bfloat16(),
            LATENTS: behind.latents(after),
            SAID: said,
        }

    layout = ShardLayout(
        buckets=buckets,
        about=made_by(config, behind),
        batch_size=config.micro_batch or 16,
        wanted=(SOURCE, TARGET, LATENTS, SAID),
    )
    return precompute(source, to, encode, layout, ranks.rank, ranks.world, ranks.first)


def _rendered(edits: list[Edit], size: int) -> dict[str, Tensor]:
    return {
        SOURCE: render([edit.source for edit in edits], size),
        TARGET: render([edit.target for edit in edits], size),
    }
