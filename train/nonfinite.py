"""Steps that were not taken because a number was not finite: what is needed to look at them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sda_fast.files import write_whole
from train.batch import Batch, micro_batches
from train.checkpoint import PART, check_checkpoint, checkpoints_of, write_checkpoint
from train.config import FluxConfig, restore
from train.ranks import Ranks
from train.stage import Stage
from train.state import State
from train.step import seed_step

FOLDER = "nonfinite"
KEPT_STATES = 2
"""States that stay; one serves all steps in a row that were not taken."""


def note_step(
    state: State, step: int, batches: list[Batch], in_row: int, meta: dict[str, Any]
) -> None:
    """Write ``nonfinite/step-NNNNNN.json`` and, for the first in a row, the state beside it.

    Args:
        state: as it was before the step, and still is.
        step: that was not taken.
        batches: of this rank.
        in_row: which this is in a row, from 1.
        meta: of a checkpoint of this state.

    Raises:
        OSError: it cannot be written.
    """
    mine = [{"places": list(batch.places), "ids": list(batch.ids)} for batch in batches]
    every = state.ranks.gather(mine)
    if not state.ranks.first:
        return
    folder = state.config.folder / FOLDER
    folder.mkdir(exist_ok=True)
    first = step - in_row + 1
    if in_row == 1:
        for old in (*checkpoints_of(folder)[: 1 - KEPT_STATES or None], *folder.glob(f"{PART}*")):
            shutil.rmtree(old)
        tensors = {
            name: t.detach().to("cpu", copy=True).contiguous()
            for name, t in state.tensors().items()
        }
        write_checkpoint(folder, tensors, {**meta, "step": first})
    about = {
        "step": step,
        "state": f"step-{first:06d}",
        "world_size": state.ranks.world,
        "micro_batch": len(batches[0].places),
        "ranks": [{"rank": rank, "micro_batches": had} for rank, had in enumerate(every)],
    }
    write_whole(folder / f"step-{step:06d}.json", json.dumps(about, indent=2) + "\n")


def replay(path: Path, build: Callable[[Any, Ranks], Stage], ranks: Ranks) -> list[dict[str, Any]]:
    """Take a step again that was not taken, without an update, and say where it fails.

    Args:
        path: ``RUN/nonfinite/step-NNNNNN.json``.
        build: makes the stage of a config.
        ranks: this process alone; it computes what each rank of the run computed.

    Returns:
        For each micro-batch: rank, ids, losses, and the norm of its gradient.

    Raises:
        OSError: the file or its state is not there.
        ValueError: it is no such file, or the state is not whole.
    """
    about = json.loads(path.read_text(encoding="utf-8"))
    config = restore((path.parent.parent / "config.json").read_text(encoding="utf-8"))
    if isinstance(config, FluxConfig):
        config = replace(config, shard_flux=False)  # nobody is there to share with
    check_checkpoint(path.parent / about["state"])
    stage = build(config, ranks)
    state = State(config, stage, ranks)
    state.load(path.parent / about["state"])
    found = []
    for rank in range(about["world_size"]):
        seed_step(config.seed, about["step"], rank)
        places = micro_batches(config.batch_size, about["micro_batch"], rank, about["world_size"])
        for batch in stage.batches_of(about["step"], places):
            losses, norm = state.backward([batch])
            state.forget()
            found.append(
                {
                    "rank": rank,
                    "ids": list(batch.ids),
                    "losses": {name: value.item() for name, value in losses.items()},
                    "grad_norm": norm.item(),
                    "finite": bool(torch.stack([*losses.values(), norm]).isfinite().all()),
                }
            )
    return found
