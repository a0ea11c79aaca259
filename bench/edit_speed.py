"""How long an edit takes, from embedding and instruction to embedding: ``bench edit-speed``.

Editors of full size with random weights on a GPU, smaller ones on a CPU, mode beside mode, with
kept keys and values and without, launched and as CUDA graphs. The instruction is encoded before.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import THREE_LEVELS, select
from bench.command import command
from bench.measure import Step
from bench.records import Record
from bench.suite import Suite, Work
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.t5_config import MODES, PRESETS
from sda_fast.hierarchy import Hierarchy
from sda_fast.shapes import random_weights

TEXT, SAID = 32, 24
"""Tokens of an instruction as it is padded, and those that say something."""
CHECKED = 2
"""Embeddings of a batch that are checked."""
RATIO = 2.0
"""Largest error of what is written over that of one teacher-forced pass in the same dtype."""
EXACT = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
"""What counts as exact for weights of a dtype."""
CONFIGS: dict[str, dict[str, Any]] = {
    **PRESETS,
    "scenes": {
        "channels": 96, "text_features": 96, "width": 192, "num_layers": 4, "num_heads": 6,
        "head_dim": 32, "ff_width": 512,
    },
    "tiny": {
        "channels": 12, "text_features": 20, "width": 16, "num_layers": 2, "num_heads": 2,
        "head_dim": 8, "ff_width": 32,
    },
}  # fmt: skip
"""Editors by name; those of no named width read and write FLUX's 4096 channels."""


@dataclass(frozen=True, slots=True)
class EditSpeedCase:
    """A batch of embeddings to be edited.

    Attributes:
        model: a key of CONFIGS.
        batch: B.
        tree: of the positions.
        dtype: of weights and inputs.
        reps: turns at most.
        repeats: editors that keep no keys and values take part, which may take minutes.
    """

    model: str
    batch: int
    tree: Hierarchy = THREE_LEVELS
    dtype: torch.dtype = torch.bfloat16
    reps: int = 20
    repeats: bool = True

    @property
    def name(self) -> str:
        """What records and options call it."""
        return f"{self.model}-{self.tree.num_tokens}-b{self.batch}"

    @property
    def seq_len(self) -> int:
        """N, positions that are written."""
        return self.tree.num_tokens

    def editors(self, device: torch.device) -> dict[str, EmbeddingEditor]:
        """One a mode, random weights, the same at every call; they share their decoder."""
        found: dict[str, Any] = {}
        for mode in MODES:
            with torch.device("meta"):
                editor: Any = EmbeddingEditor(
                    self.tree.tokens_per_node, mode=mode, **CONFIGS[self.model]
                )
            if found:
                editor.decoder = nn.Module()
            found[mode] = random_weights(editor, self.dtype, device)
            editor.decoder = found[MODES[0]].decoder
        return found

    def inputs(self, device: torch.device) -> list[Tensor]:
        """source [B, N, C], text [B, T, F] and mask [B, T], random, the same at every call."""
        config = {"channels": 4096, "text_features": 4096} | CONFIGS[self.model]
        generator = torch.Generator(device).manual_seed(0)
        draw: Any = {"generator": generator, "dtype": self.dtype, "device": device}
        source = torch.randn(self.batch, self.seq_len, config["channels"], **draw)
        text = torch.randn(self.batch, TEXT, config["text_features"], **draw)
        mask = torch.arange(TEXT, device=device) < SAID
        return [source, text, mask.expand(self.batch, -1).contiguous()]


GOALS = tuple(EditSpeedCase(model, b) for model in ("t5-large", "t5-xxl") for b in (1, 16))
SCENES = Hierarchy((4, 2, 1))
CPU = (
    *(EditSpeedCase("scenes", b, SCENES, torch.float32, 10) for b in (1, 16)),
    *(EditSpeedCase("t5-base", b, dtype=torch.float32, reps=3, repeats=False) for b in (1, 16)),
)
SMALL = (EditSpeedCase("tiny", 2, Hierarchy((3, 2, 1)), torch.float32),)
GROUPS = {"goals": GOALS, "cpu": CPU, "small": SMALL}
CASES = {case.name: case for case in (*GOALS, *CPU, *SMALL)}


@dataclass(frozen=True, slots=True)
class EditSpeedVariant:
    """One way to write an embedding.

    Attributes:
        mode: of the editor.
        cache: keys and values of what is written are kept.
        graph: as CUDA graphs of the editor's own.
    """

    mode: str
    cache: bool = True
    graph: bool = False

    @property
    def name(self) -> str:
        """In records and options."""
        how = "-graph" if self.graph else "" if self.cache else "-no-cache"
        return f"ours-{self.mode}{how}"

    @property
    def label(self) -> str:
        """In tables."""
        how = ", CUDA graph" if self.graph else "" if self.cache else ", nothing kept"
        return f"{self.mode}{how}"

    @property
    def gpu(self) -> bool:
        """Whether it needs one."""
        return self.graph


VARIANTS = {
    variant.name: variant
    for variant in (
        *(EditSpeedVariant(mode, graph=graph) for mode in MODES for graph in (True, False)),
        *(EditSpeedVariant(mode, cache=False) for mode in ("level", "autoregressive")),
    )
}


@dataclass(frozen=True, slots=True)
class OwnWords:
    """What an editor wrote is right if it writes the same after its own words.

    One teacher-forced pass over the result gives it again, however it was written: no error adds up
    over positions. That pass in a wider dtype is exact; in the editor's own it says how close
    rounding lets anybody come.

    Attributes:
        editor: under test.
        exact: the same in a wider dtype.
        inputs: see EditSpeedCase.
        notes: takes "error", relative to the norm of what is exact.
    """

    editor: Any
    exact: Any
    inputs: Sequence[Tensor]
    notes: dict[str, float]

    def faults(self, results: Sequence[Tensor]) -> list[str]:
        """See bench.suite.Ruler."""
        written = [result[:CHECKED] for result in results]
        wanted, usual = (self._pass(editor, written[0]) for editor in (self.exact, self.editor))
        if [list(t.shape) for t in written] != [list(t.shape) for t in wanted]:
            return [f"it gave {[list(t.shape) for t in written]}"]
        found = []
        for name, result, exact, own in zip(
            ("tokens", "gate"), written, wanted, usual, strict=False
        ):
            size, rounding = exact.norm().item(), 4 * torch.finfo(result.dtype).eps
            error, own_error = ((t.to(exact) - exact).norm().item() / size for t in (result, own))
            self.notes.setdefault("error", error)
            limit = RATIO * own_error + rounding
            if not error <= limit:  # NaN is not
                found.append(f"{name} is off by {error:.1e}, allowed {limit:.1e}")
        return found

    @torch.no_grad()
    def _pass(self, editor: Any, written: Tensor) -> list[Tensor]:
        source, text, mask = (t[:CHECKED] for t in self.inputs)
        said = editor(
            source.to(editor.dtype), text.to(editor.dtype), mask, written.to(editor.dtype)
        )
        return [said.tokens] if said.gate is None else [said.tokens, said.gate]


@dataclass(frozen=True, slots=True)
class EditSpeedWork(Work):
    """Work, with the editors of a case.

    Attributes:
        editors: by mode.
        exact: likewise, in a wider dtype.
    """

    editors: dict[str, Any] = field(default_factory=dict)
    exact: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ready:
    """A variant that was set up.

    Attributes:
        write: what is timed.
        notes: takes "error", how far what it wrote is from what is exact.
    """

    write: Step
    notes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EditSpeed(Suite):
    """Embedding and instruction to embedding."""

    def measure(self, case: EditSpeedCase) -> Iterator[Record]:
        """See Suite; a case has a number of turns of its own."""
        yield from Suite.measure(replace(self, reps=min(self.reps, case.reps)), case)

    def competitors(self, case: EditSpeedCase) -> Sequence[EditSpeedVariant]:
        """See Suite."""
        return [v for v in self.variants if v.cache or case.repeats]

    def passes(self) -> Mapping[str, bool]:
        """Forward alone."""
        return {"forward": False}

    def work(self, case: EditSpeedCase) -> EditSpeedWork:
        """Editors and what they edit."""
        editors = case.editors(self.device)
        decoder, wide = editors[MODES[0]].decoder, EXACT[case.dtype]
        shared = nn.Module.to(copy.deepcopy(decoder), wide)
        exact = {
            mode: nn.Module.to(copy.deepcopy(editor, {id(decoder): shared}), wide)
            for mode, editor in editors.items()
        }
        inputs = case.inputs(self.device)
        return EditSpeedWork(inputs, {}, editors=editors, exact=exact)

    def prepare(self, variant: EditSpeedVariant, case: EditSpeedCase, work: EditSpeedWork) -> Ready:
        """See Suite."""
        editor, how = work.editors[variant.mode], {"cache": variant.cache, "graph": variant.graph}

        def write() -> tuple[Tensor, ...]:
            said = editor.generate(*work.inputs, **how)
            return (said.tokens,) if said.gate is None else (said.tokens, said.gate)

        return Ready(write)

    def step(self, ready: Ready, work: Work, backward: bool) -> Step:
        """See Suite."""
        return ready.write

    def ruler(self, variant: EditSpeedVariant, work: Any) -> OwnWords:
        """See Suite."""
        notes = work.ready[variant.name].notes
        return OwnWords(work.editors[variant.mode], work.exact[variant.mode], work.inputs, notes)

    def captures(self, variant: EditSpeedVariant) -> bool:
        """An editor has graphs of its own."""
        return False

    def facts(
        self, case: EditSpeedCase, variant: EditSpeedVariant, ready: Ready | None, backward: bool
    ) -> Record:
        """What was written by what; graphs of its own hide a variant's peak."""
        about = {
            "suite": "edit-speed",
            "op": "edit",
            "model": case.model,
            "mode": variant.mode,
            "batch": case.batch,
            "positions": case.seq_len,
            "dtype": str(case.dtype).removeprefix("torch."),
            "cache": variant.cache,
            "threads": torch.get_num_threads(),
            "error": None if ready is None else ready.notes.get("error"),
        }
        return about | ({"graph": True, "peak_bytes": None} if variant.graph else {})

    def rate(self, record: Record) -> str:
        """Embeddings a second."""
        return f"{1e3 * record['batch'] / record['p50_ms']:9.2f} embeddings/s"


def select_edit_speed(text: str) -> list[EditSpeedCase]:
    """The cases of a list, in its order, each once.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, GROUPS, CASES)


main = command(
    "edit-speed",
    "Time editors, mode beside mode: full size on a GPU, smaller ones on a CPU.",
    EditSpeed,
    VARIANTS,
    select_edit_speed,
    at_home="cpu",
)
