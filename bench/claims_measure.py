"""What the claims are measured by: pictures of adapters and of the shipped model, parsed back."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.claims_training import Plan
from bench.quality import BATCH, SCENE_SEED, SEED_STEP
from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.losses import effective_rank, mean_cosine
from sda_fast.pipeline import SemanticPipeline
from sda_fast.scenes.captions import SYNONYMS, caption
from sda_fast.scenes.edits import Edit, sample_edits
from sda_fast.scenes.models import token_ids
from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import Sums, match, score
from sda_fast.scenes.world import COLORS, SHAPES, Scene, World, sample_scenes

Columns = dict[str, list[float]]
"""Sums of a record, one number a scene; metrics are made of them."""
FRAMES = 7
"""Of an interpolation, both ends included."""
ATTRIBUTES = {
    "place": "matched", "color": "color", "shape": "shape", "size": "size",
    "background": "background",
}  # fmt: skip
"""Of a frame, by the field of Sums that counts those it shares with a scene."""
PROBE_CAPTIONS = 512
PROBE_DECAY = 1e-4
PROBE_STEPS = 100
SCARCE = 12
"""So many times as many scenes are drawn as are kept: of one object, or with an edit "add"."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Measures a pipeline of a world of scenes.

    Attributes:
        pipe: the shipped model: its decoder, encoders and text encoder are all variants'.
        world: of its pictures.
        plan: says on how many scenes.
    """

    pipe: SemanticPipeline
    world: World
    plan: Plan

    def adapter(self, adapter: SemanticAdapter, seed: int) -> Columns:
        """Unseen scenes through an adapter with its encoders, and how its positions spread."""
        scenes = self.scenes()
        emb = self._read(scenes, adapter)
        spread = {
            name: [measure(row).item() for row in emb.tokens.split(1)]
            for name, measure in (("mean_cosine", mean_cosine), ("rank", effective_rank))
        }
        return self._scored(self._decode(emb, seed), scenes) | spread

    def rules(self, seed: int) -> dict[str, Columns]:
        """The shipped adapter, decoded by each mask rule."""
        scenes = self.scenes()
        emb = self._read(scenes)
        return {
            rule: self._scored(self._decode(emb, seed, rule=rule), scenes)
            for rule in ("overlap", "local", "isolated")
        }

    def interpolation(self, seed: int) -> dict[str, Columns]:
        """From each scene of a half to one of the other half."""
        scenes = self.scenes()
        half = len(scenes) // 2
        ends = scenes[:half], scenes[half : 2 * half]
        a, b = (self._read(end) for end in ends)
        weights = [i / (FRAMES - 1) for i in range(FRAMES)]
        frames = [self._decode(a.slerp(b, weight), seed) for weight in weights]
        faded = [torch.lerp(frames[0], frames[-1], weight) for weight in weights]
        way, fading = (self._shared(some, ends) for some in (frames, faded))
        orders = torch.rand(half, FRAMES - 2, generator=_seeded(seed)).argsort(1) + 1
        places = F.pad(F.pad(orders, (1, 0)), (0, 1), value=FRAMES - 1)
        index = places.T[:, :, None, None].expand_as(way)
        return {
            "way": right_changes(way),
            "way_whole": whole_ways(way),
            "way_shuffled": right_changes(way.gather(0, index)),
            "way_faded": right_changes(fading),
        }

    def probe(self, seed: int) -> dict[str, Columns]:
        """Positions read by a probe of the text encoder's tokens."""
        drawn = sample_scenes(self.world, "test", SCENE_SEED, SCARCE * self.plan.scenes)
        scenes = [scene for scene in drawn if len(scene.objects) == 1][: self.plan.scenes]
        texts = sample_scenes(self.world, "train", seed, PROBE_CAPTIONS)
        rng = np.random.default_rng(seed)
        tokens, ids = self.text([caption(scene, rng) for scene in texts])
        plain, plain_ids = self.text([caption(scene) for scene in scenes])
        # padding says nothing
        pad: int = self.pipe.flux.tokenizer_2.pad_token_id
        positions = self._read(scenes).tokens.float().cpu()
        found: dict[str, Columns] = {"probe": {}, "probe_chance": {}, "probe_text": {}}
        for name, words in (("color", list(COLORS)), ("shape", SHAPES[: self.world.shapes])):
            labels = self._labels(words)
            truth = torch.tensor([words.index(getattr(s.objects[0], name)) for s in scenes])
            reader = fit_probe(tokens[ids != pad], labels[ids[ids != pad]], len(words), seed)
            seen = answers(reader(positions))
            said = answers(reader(plain), plain_ids != pad)
            for variant, hits in (
                ("probe", seen == truth),
                ("probe_chance", seen == truth.roll(1)),
                ("probe_text", said == truth),
            ):
                found[variant] |= {name: hits.double().tolist(), f"{name}_of": [1.0] * len(scenes)}
        return found

    def mixing(self, seed: int) -> dict[str, Columns]:
        """Embeddings of scenes with the caption of an object that they have not."""
        drawn = sample_edits(self.world, "test", SCENE_SEED, SCARCE * self.plan.scenes)
        edits = [edit for edit in drawn if edit.operation == "add"][: self.plan.scenes]
        emb = self._read([edit.source for edit in edits])
        alone = [
            replace(edit.target, objects=(edit.target.objects[edit.object_index],))
            for edit in edits
        ]
        texts = {
            "mix_none": None,
            "mix_new": [caption(scene) for scene in alone],
            "mix_whole": [caption(edit.target) for edit in edits],
        }
        return {
            variant: self._mixed(edits, self._decode(emb, seed, text))
            for variant, text in texts.items()
        }

    def scenes(self) -> list[Scene]:
        """Unseen ones, the same for all variants and seeds."""
        return sample_scenes(self.world, "test", SCENE_SEED, self.plan.scenes)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions through the text encoder: ([B, T, C] f32, ids [B, T]) on the CPU."""
        encoder: Any = self.pipe.flux.text_encoder_2
        ids = token_ids(self.pipe.flux.tokenizer_2, list(captions))
        return encoder(ids.to(encoder.device)).last_hidden_state.float().cpu(), ids

    def _read(
        self, scenes: Sequence[Scene], adapter: SemanticAdapter | None = None
    ) -> SemanticEmbedding:
        pictures = render(list(scenes), self.world.size).split(BATCH)
        read = (self.pipe.adapter if adapter is None else adapter).encode
        return SemanticEmbedding.cat([read(part) for part in pictures])

    def _decode(
        self,
        emb: SemanticEmbedding,
        seed: int,
        captions: Sequence[str] | None = None,
        rule: str = "overlap",
    ) -> Tensor:
        """[B, 3, H, W] f32 on the CPU; the noise is the seed's, the same for all variants."""
        text = None if captions is None else self.text(captions)[0].to(emb.tokens)
        parts = []
        for first in range(0, len(emb), BATCH):
            rows = slice(first, min(first + BATCH, len(emb)))
            seeds = [seed * SEED_STEP + i for i in range(rows.start, rows.stop)]
            how: dict[str, Any] = {"steps": self.plan.denoise, "output": "pt", "rule": rule}
            how["text"] = None if text is None else text[rows]
            drawn = self.pipe.decode(emb.select(rows), seed=seeds, **how)
            parts.append(torch.as_tensor(drawn).float().cpu())
        return torch.cat(parts)

    def _scored(self, pictures: Tensor, scenes: Sequence[Scene]) -> Columns:
        pairs = zip(parse(pictures, self.world), scenes, strict=True)
        rows = zip(*(astuple(score([p], [t])) for p, t in pairs), strict=True)
        names = [field.name for field in fields(Sums)]
        return {
            name: [round(float(v), 4) for v in row] for name, row in zip(names, rows, strict=True)
        }

    def _shared(self, frames: Sequence[Tensor], ends: tuple[list[Scene], ...]) -> Tensor:
        """What frames share with either end: [FRAMES, pairs, 2, ATTRIBUTES] f64."""
        found = []
        for frame in frames:
            both = [self._scored(frame, scenes) for scenes in ends]
            shared = [[columns[field] for field in ATTRIBUTES.values()] for columns in both]
            found.append(torch.tensor(shared, dtype=torch.float64).permute(2, 0, 1))
        return torch.stack(found)

    def _mixed(self, edits: Sequence[Edit], pictures: Tensor) -> Columns:
        """Whether the new object of each edit was drawn, and how many of the others."""
        columns: Columns = {"new": [], "scenes": [], "stayed": [], "old": []}
        for edit, scene in zip(edits, parse(pictures, self.world), strict=True):
            added = edit.target.objects[edit.object_index]
            found = [true for _, true in match(scene.objects, edit.target.objects)]
            new = sum(true is added for true in found)
            row = new, 1, len(found) - new, len(edit.source.objects)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(float(value))
        return columns

    def _labels(self, words: Sequence[str]) -> Tensor:
        """For each word of the tokenizer the place of what it names in words, or their number."""
        known = self.pipe.flux.tokenizer_2.get_vocab()
        labels = torch.full((max(known.values()) + 1,), len(words))
        for place, word in enumerate(words):
            for name in SYNONYMS.get(word, (word,)):
                labels[known[name]] = place
        return labels


def right_changes(shared: Tensor) -> Columns:
    """Of the changes from frame to frame those that lead from the first end to the second.

    Args:
        shared: [frames, pairs, 2 ends, attributes], what a frame shares with an end.

    Returns:
        For each attribute of ATTRIBUTES, "NAME" of "NAME_of" changes.
    """
    steps = _towards(shared)
    return _named(steps.clamp_min(0).sum((0, 2)), steps.abs().sum((0, 2)))


def whole_ways(shared: Tensor) -> Columns:
    """As ``right_changes``, but of ways: those without a single change that leads back."""
    right = (_towards(shared) >= 0).all(2).all(0).double()
    return _named(right, torch.ones_like(right))


def _towards(shared: Tensor) -> Tensor:
    """Changes of each step, positive where it leads from the first end to the second."""
    return shared.diff(dim=0) * torch.tensor([-1.0, 1.0])[:, None]


def _named(top: Tensor, bottom: Tensor) -> Columns:
    """[pairs, attributes] twice -> columns."""
    found: Columns = {}
    for name, tops, bottoms in zip(ATTRIBUTES, top.T.tolist(), bottom.T.tolist(), strict=True):
        found |= {name: tops, f"{name}_of": bottoms}
    return found


def fit_probe(tokens: Tensor, named: Tensor, classes: int, seed: int) -> nn.Linear:
    """Logistic regression of tokens on what their words name.

    Args:
        tokens: [n, C] f32, of captions.
        named: int64 [n], the class that each one's word names, or ``classes`` for none.
        classes: how many.
        seed: of the first weights.

    Returns:
        [..., C] -> [..., classes + 1] logits; frozen.
    """
    probe = nn.Linear(tokens.shape[-1], classes + 1)
    with torch.no_grad():
        probe.weight.copy_(torch.randn(probe.weight.shape, generator=_seeded(seed)) * 0.01)
        probe.bias.zero_()
    fitting = torch.optim.LBFGS(
        probe.parameters(), max_iter=PROBE_STEPS, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        fitting.zero_grad()
        value = F.cross_entropy(probe(tokens), named)
        value = value + PROBE_DECAY * probe.weight.square().sum()
        value.backward()
        return value

    fitting.step(loss)
    return probe.requires_grad_(False)


def answers(logits: Tensor, keep: Tensor | None = None) -> Tensor:
    """The class that a sequence says most, the last one, "none", aside.

    Args:
        logits: [B, N, classes + 1].
        keep: bool [B, N], what counts; None: all does.

    Returns:
        int64 [B].
    """
    said = logits.softmax(-1)[..., :-1]
    if keep is not None:
        said = said * keep[..., None]
    return said.sum(1).argmax(-1)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
