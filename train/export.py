"""A run's adapter or editor for ``from_pretrained``, with a card that carries the licences."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sda_fast.adapter import ENCODER_FILE, SemanticAdapter
from sda_fast.files import moved_in_when_whole, write_whole
from sda_fast.weights import write_safetensors
from train.checkpoint import newest_valid, read_meta, read_state
from train.lineage import CHECKPOINTS
from train.model_card import editor_card, model_card
from train.report import LOG, read_log

CARD = "README.md"
ADAPTERS, EDITORS = ("adapter", "flux"), ("edit", "edit-pictures")
"""Stages that train one."""
ADAPTER, ENCODER, EDITOR = "adapter.", "encoder.", "editor."
"""Before the names of averaged weights."""


def export_run(
    run: Path, to: Path | None = None, warn: Callable[[str], None] = warnings.warn
) -> Path:
    """Write the averaged weights of a run's newest whole checkpoint, and their card.

    The folder holds config.json, the weights, the encoder layers that were opened and README.md;
    all of it appears at once, and replaces an earlier export. An editor's card comes last.

    Args:
        run: folder of the run, finished or not.
        to: where; None is ``export/adapter`` or ``export/editor`` in the run's folder.
        warn: is told of checkpoints that are not whole.

    Returns:
        Where it is.

    Raises:
        FileNotFoundError: there is no such run, or no whole checkpoint in it.
        ValueError: the run trains neither, or its weights are not those of one.
        ImportError: peft is not installed, where a language model edits.
        OSError: it cannot be written.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"run must be the folder of a run, got {run}, which is not there")
    newest = newest_valid(run / CHECKPOINTS, warn)
    if newest is None:
        raise FileNotFoundError(
            f"run must hold a whole checkpoint, got {run} with none in {run / CHECKPOINTS}"
        )
    meta = read_meta(newest)
    stage = meta.get("stage")
    if stage not in (*ADAPTERS, *EDITORS):
        raise ValueError(
            f"run must be of stage {', '.join((*ADAPTERS, EDITORS[0]))} or {EDITORS[1]}, got {run} "
            f"of stage {stage!r}: what that trains is in {run / 'export'} when it has finished"
        )
    state = read_state(newest, "ema/")
    if stage in EDITORS:
        editor, target = _editor(newest, meta, state), to or run / "export" / "editor"
        card = editor_card(meta, evaluation(run, meta["step"]))
        editor.save_pretrained(target)
        return write_whole(target / CARD, card).parent
    adapter = _adapter(newest, meta["adapter"], state)
    opened = _below(state, ENCODER)
    card = model_card(meta, evaluation(run, meta["step"]), opened=bool(opened))
    target = to or run / "export" / "adapter"
    with moved_in_when_whole(target, SemanticAdapter.config_name, _is_own) as scratch:
        adapter.save_pretrained(scratch)
        if opened:
            write_safetensors(scratch / ENCODER_FILE, opened)
        (scratch / CARD).write_text(card, encoding="utf-8")
    return target


def evaluation(run: Path, step: int) -> tuple[int, dict[str, float]] | None:
    """The newest evaluation that is no newer than a step: (its step, numbers by name)."""
    if not (run / LOG).is_file():
        return None
    for at, row in reversed(read_log(run).items()):
        known = {name.removeprefix("eval/"): v for name, v in row.items() if name[:5] == "eval/"}
        if at <= step and known:
            return at, known
    return None


def _adapter(path: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> SemanticAdapter:
    """An adapter with the averaged weights."""
    adapter = SemanticAdapter(**config)
    try:
        adapter.load_state_dict(_below(state, ADAPTER))
    except RuntimeError as error:
        raise ValueError(f"run: {path} holds no weights of its own adapter: {error}") from error
    return adapter.eval()


def _editor(path: Path, meta: Mapping[str, Any], state: Mapping[str, Tensor]) -> Any:
    """An editor with the averaged weights."""
    known = {name: value for name, value in meta["editor"].items() if name != "instructions"}
    llm = meta["config"]["llm"]
    if llm is None:
        from sda_fast.editors.t5 import EmbeddingEditor

        editor: Any = EmbeddingEditor(**known)
    else:
        from sda_fast.editors.llm import LLMEditor

        learned = known.pop("base_fingerprint")
        known.pop("base")
        editor = LLMEditor.from_base(llm, **known)
        if editor.config["base_fingerprint"] != learned:
            raise ValueError(f"run: the language model in {llm} is not the one it learned with")
    try:
        editor.load_state_dict(_below(state, EDITOR))
    except RuntimeError as error:
        raise ValueError(f"run: {path} holds no weights of its own editor: {error}") from error
    return editor.eval()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _is_own(name: str) -> bool:
    """Whether an export writes a file of that name."""
    weights = name.startswith("diffusion_pytorch_model") and ".safetensors" in name
    return weights or name in (ENCODER_FILE, CARD)
