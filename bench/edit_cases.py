"""What ``bench edit`` compares: ways to edit unseen scenes, split by split and in chains.

Every way draws two pictures of a scene from the same noise, edited and unedited, so that what an
edit does is told apart from what its decoder gets wrong anyhow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from bench.edit_report import BASELINES, CHAINS, LENGTH, SPLITS
from bench.quality import BATCH, DIGITS, INVERSION_STEPS, SCENE_SEED, Draw, Suite
from bench.records import Record
from bench.rf_inversion import RFInversion
from sda_fast.editors.result import Editor, EditResult
from sda_fast.embedding import SemanticEmbedding
from sda_fast.scenes.edit_score import Shown
from sda_fast.scenes.edits import Edit, EditSplit, sample_chains, sample_edits
from sda_fast.scenes.models import token_ids
from sda_fast.scenes.render import render
from sda_fast.scenes.world import Scene
from sda_fast.weights import digest

Look = Callable[[slice, list[int]], Shown]
"""(rows of the case, one noise seed a row) -> pictures, parsed."""


@dataclass(frozen=True, slots=True)
class EditCase:
    """One way to edit the scenes of a part, ready to be measured.

    Attributes:
        part: of bench.edit_report.SPLITS, or CHAINS.
        variant: of bench.edit_report.BASELINES, or an editor's name.
        edits: what is wanted.
        after: the edited pictures.
        before: those that the same noise gives without the edit.
        step: which edit of a chain it is, from 1; 0 where there is no chain.
        same: [edits] f64, share of positions that came out bit for bit; None where an edit is not
            made in the embedding.
        about: fields of its record.
    """

    part: str
    variant: str
    edits: Sequence[Edit]
    after: Look
    before: Look
    step: int = 0
    same: Tensor | None = None
    about: Record = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scope:
    """The edits of a split, with what its variants share.

    Attributes:
        split: see sample_edits.
        edits: of it.
        sources: embeddings of the sources, rebuilt by the adapter.
        unedited: their pictures.
    """

    split: EditSplit
    edits: list[Edit]
    sources: SemanticEmbedding
    unedited: Look


@dataclass(frozen=True, slots=True)
class EditSuite:
    """The model and the editors under test.

    Attributes:
        drawer: the model, numbers of scenes, of noise seeds and of steps.
        editors: by the names of their variants.
        chosen: names of the cases that are measured, see ``case_names``.
        chains: how many chains.
    """

    drawer: Suite
    editors: Mapping[str, Editor]
    chosen: Sequence[str]
    chains: int

    def cases(self, progress: Progress) -> Iterator[EditCase]:
        """Make the chosen cases one after the other, part by part."""
        for split in SPLITS:
            variants = self._variants(split)
            if not variants:
                continue
            scope = self._scope(split)
            for variant in variants:
                yield self._case(scope, variant, progress)
        for variant in self._variants(CHAINS):
            yield from self._chain(variant)

    def _variants(self, part: str) -> list[str]:
        named = [name.partition("/") for name in self.chosen]
        return [variant for of, _, variant in named if of == part]

    def _scope(self, split: EditSplit) -> Scope:
        scenes = self.drawer.scenes
        number = scenes if split == "test" else max(1, scenes // 2)
        edits = sample_edits(self.drawer.world, split, SCENE_SEED, number)
        sources = self.encoded([edit.source for edit in edits])
        return Scope(split, edits, sources, self.look(self.drawer.draw_embedding(sources)))

    def _case(self, scope: Scope, variant: str, progress: Progress) -> EditCase:
        if variant in self.editors:
            return self._edited(scope, variant)
        if variant == "source":
            every = torch.ones(len(scope.edits), dtype=torch.float64)
            return self._of(scope, variant, scope.unedited, same=every)
        if variant == "target":
            emb = self.encoded([edit.target for edit in scope.edits])
            return self._of(scope, variant, self.look(self.drawer.draw_embedding(emb)))
        if variant == "caption":
            after, before = (self.look(self.drawer.draw_text(t)) for t in self._captions(scope))
            return self._of(scope, variant, after, before)
        return self._rf(scope) if variant == "rf-inversion" else self._inverted(scope, progress)

    def _of(
        self, scope: Scope, variant: str, after: Look, before: Look | None = None, **more: Any
    ) -> EditCase:
        return EditCase(scope.split, variant, scope.edits, after, before or scope.unedited, **more)

    def _edited(self, scope: Scope, variant: str) -> EditCase:
        editor = self.editors[variant]
        result = editor.edit(scope.sources, [edit.instruction for edit in scope.edits])
        after = self.look(self.drawer.draw_embedding(result.embedding))
        return self._of(scope, variant, after, same=unchanged(result), about=describe(editor))

    def _rf(self, scope: Scope) -> EditCase:
        """Inverted by no caption; with the source's own it stands for the unedited picture."""
        rf = RFInversion(self.drawer.pipe, self.drawer.steps)
        pictures = render([edit.source for edit in scope.edits], self.drawer.world.size)
        target, source = self._captions(scope)
        flux: Any = self.drawer.pipe.flux
        with torch.no_grad():
            nothing = flux.text_encoder_2(token_ids(flux.tokenizer_2, [""])).last_hidden_state
        noise = remembered(lambda rows, seeds: rf.invert(pictures[rows], nothing, seeds))

        def drawn_by(text: Tensor) -> Look:
            return self.look(
                lambda rows, seeds: rf.draw(noise(rows, seeds), pictures[rows], text[rows])
            )

        about = {"control": asdict(rf.control)}
        return self._of(scope, "rf-inversion", drawn_by(target), drawn_by(source), about=about)

    def _inverted(self, scope: Scope, progress: Progress) -> EditCase:
        """Of a few scenes: it takes hundreds of steps for each picture, source and target."""
        few, size = scope.edits[: self.drawer.inversions], self.drawer.world.size
        scenes = [edit.target for edit in few] + [edit.source for edit in few]
        text = self.drawer.read_captions(scenes)
        emb = self.drawer.inverted(render(scenes, size), text, progress)
        halves = slice(0, len(few)), slice(len(few), None)
        after, before = (self.look(self.drawer.draw_embedding(emb.select(h))) for h in halves)
        about = {"fitting_steps": INVERSION_STEPS}
        return EditCase(scope.split, "inversion", few, after, before, about=about)

    def _chain(self, variant: str) -> Iterator[EditCase]:
        """A case for each edit; the unedited picture is the one that the edit before it gave."""
        world, editor = self.drawer.world, self.editors.get(variant)
        chains = sample_chains(world, "test", SCENE_SEED, self.chains, LENGTH)
        known: Any = self.encoded([chain[0].source for chain in chains])
        before = self.look(self.drawer.draw_embedding(known))
        about = {} if editor is None else describe(editor)
        for step, edits in enumerate(zip(*chains, strict=True), 1):
            same = None
            if editor is None:
                known = self.encoded([edit.target for edit in edits])
            else:
                known = editor.edit(known, [edit.instruction for edit in edits])
                same = unchanged(known)
            emb = known.embedding if isinstance(known, EditResult) else known
            after = self.look(self.drawer.draw_embedding(emb))
            yield EditCase(CHAINS, variant, edits, after, before, step, same, about)
            before = after

    def encoded(self, scenes: list[Scene]) -> SemanticEmbedding:
        """Scenes, drawn and read by the adapter."""
        parts = render(scenes, self.drawer.world.size).split(BATCH)
        return SemanticEmbedding.cat([self.drawer.pipe.encode(part) for part in parts])

    def look(self, draw: Draw) -> Look:
        """Draw and parse, each batch once."""
        world = self.drawer.world
        return remembered(lambda rows, seeds: Shown.of(draw(rows, seeds).float(), world))

    def _captions(self, scope: Scope) -> tuple[Tensor, Tensor]:
        """[B, T, C] of the targets, and of the sources."""
        read = self.drawer.read_captions
        return read([edit.target for edit in scope.edits]), read([e.source for e in scope.edits])


def remembered(make: Callable[[slice, list[int]], Any]) -> Callable[[slice, list[int]], Any]:
    """The same function, called once for the same rows and seeds."""
    known: dict[tuple, Any] = {}

    def call(rows: slice, seeds: list[int]) -> Any:
        key = rows.start, rows.stop, *seeds
        if key not in known:
            known[key] = make(rows, seeds)
        return known[key]

    return call


def unchanged(result: EditResult) -> Tensor:
    """[B] f64: share of positions that are bit for bit those of the source."""
    return (result.change == 0).double().mean(1).cpu()


def describe(editor: Any) -> Record:
    """What a record says of an editor: its mode and a digest of all that it computes with."""
    reader = getattr(editor, "text_encoder", None)
    modules = (editor,) if reader is None else (editor, reader.model)
    return {"mode": getattr(editor, "mode", "llm"), "editor": digest(*modules)[:DIGITS]}


def case_names(editors: Iterable[str]) -> list[str]:
    """PART/VARIANT of every case there is, in their order.

    Prompt inversion is for the test split alone; chains are for editors, and for the targets' own
    embeddings as their ceiling.
    """
    editors = list(editors)
    names = [
        f"{split}/{variant}"
        for split in SPLITS
        for variant in (*BASELINES, *editors)
        if split == "test" or variant != "inversion"
    ]
    return names + [f"{CHAINS}/{variant}" for variant in ("target", *editors)]


def choose(text: str, names: Sequence[str]) -> list[str]:
    """Names of cases that a list like ``caption,test/*`` is for, in their own order.

    Args:
        text: variants, names and patterns of names (``*``, ``?``), separated by commas; or "all".
        names: all there are.

    Raises:
        ValueError: a part fits none.
    """
    if text == "all":
        return list(names)
    chosen = set()
    for part in text.split(","):
        pattern = part if "/" in part else f"*/{part}"
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise ValueError(f"variants must be of {', '.join(names)}, got {part!r}")
        chosen.update(found)
    return [name for name in names if name in chosen]
