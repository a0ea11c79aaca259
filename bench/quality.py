"""How well the model of a small world rebuilds unseen scenes: ``python -m bench quality``.

Every picture is parsed back into a scene and compared with the scene it should show, so the
parser's own ceiling is measured too, on the same scenes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from bench.bootstrap import bootstrap as intervals
from bench.inversion import invert
from bench.progress import bars
from bench.records import Record, append_record, commit, run_id, versions
from bench.report import quality_tables
from sda_fast.adapter import SemanticAdapter
from sda_fast.embedding import SemanticEmbedding
from sda_fast.hierarchy import Hierarchy
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import SHIPPED
from sda_fast.scenes.captions import caption
from sda_fast.scenes.models import token_ids
from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import Sums, psnr, row, score
from sda_fast.scenes.world import FULL, SMALL, Scene, World, sample_scenes
from sda_fast.weights import digest

SCENE_SEED = 20_000
"""Of the scenes. Training draws from another split, so it has seen none of them."""
SEED_STEP = 100_000
"""Noise seed k of scene i is k * SEED_STEP + i: every variant starts from the same noise."""
BATCH = 64
"""Pictures drawn at once."""
PARSER_NOISE = 0.05
"""Standard deviation of the noise that the parser is measured under."""
INVERSION_STEPS = 400
BASELINE = Path(__file__).parent / "baselines" / "scenes-flat"
"""The flat baseline of the shipped model."""
DIGITS = 12
"""Of a digest of weights, in records."""

Draw = Callable[[slice, list[int]], Tensor]
"""(rows of the case, one noise seed a row) -> pictures [rows, 3, H, W]."""


@dataclass(frozen=True, slots=True)
class Case:
    """One variant, ready to be measured.

    Attributes:
        variant: a key of bench.report.VARIANTS.
        scenes: what its pictures should show.
        draw: makes the pictures.
        seeds: noise seeds of each scene.
        reader: digest of what turns a scene into the txt stream; None where nothing does.
    """

    variant: str
    scenes: list[Scene]
    draw: Draw
    seeds: int
    reader: str | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """The model under test, and how much of it to test.

    Attributes:
        pipe: a pipeline with encoders and with a text encoder that reads captions.
        flat: the baseline adapter with its encoders; None leaves it out.
        scenes: unseen scenes of each variant; half as many of each held-out split.
        seeds: noise seeds of each scene.
        steps: of denoising.
        inversions: scenes whose prompt is inverted; 0 leaves that out.
    """

    pipe: SemanticPipeline
    flat: SemanticAdapter | None
    scenes: int
    seeds: int
    steps: int
    inversions: int

    def check(self) -> None:
        """Refuse a model that cannot be measured.

        Raises:
            ValueError: it has no encoders or no text encoder, or draws another size than a world's.
        """
        flux, adapter = self.pipe.flux, self.pipe.adapter
        if adapter.encoder is None or flux.text_encoder_2 is None or flux.tokenizer_2 is None:
            raise ValueError("model must have encoders, and a text encoder with its tokenizer")
        if self.world.size != self.pipe.defaults.width:
            raise ValueError(f"model must draw square pictures, got {self.pipe.defaults}")

    @property
    def world(self) -> World:
        """The world of the pipeline's pictures, known by its size.

        Raises:
            ValueError: there is none of that size.
        """
        worlds = {world.size: world for world in (SMALL, FULL)}
        size = self.pipe.defaults.height
        if size not in worlds:
            raise ValueError(f"model must draw pictures of {sorted(worlds)} pixels, got {size}")
        return worlds[size]

    def cases(self, progress: Progress) -> Iterator[Case]:
        """Make the cases one after the other; the inversion shows its own progress."""
        world, adapter = self.world, self.pipe.adapter
        scenes = sample_scenes(world, "test", SCENE_SEED, self.scenes)
        pictures = render(scenes, world.size)

        def noisy(rows: slice, seeds: list[int]) -> Tensor:
            noise = [torch.randn(3, world.size, world.size, generator=_seeded(s)) for s in seeds]
            return pictures[rows] + PARSER_NOISE * torch.stack(noise)

        yield Case("parser_clean", scenes, lambda rows, _: pictures[rows], 1)
        yield Case("parser_noise", scenes, noisy, self.seeds)
        text = self.read_captions(scenes)
        reader = digest(self.pipe.flux.text_encoder_2)[:DIGITS]
        yield Case("caption", scenes, self.draw_text(text), self.seeds, reader)
        yield self.rebuilt("reconstruction", scenes, adapter)
        if self.flat is not None:
            yield self.rebuilt("flat", scenes, self.flat)
        for split in ("held_out_pairs", "held_out_count"):
            unseen = sample_scenes(world, split, SCENE_SEED, max(1, self.scenes // 2))
            yield self.rebuilt(split, unseen, adapter)
        if self.inversions:
            few = scenes[: self.inversions]
            emb = self.inverted(pictures[: len(few)], text, progress)
            yield Case("inversion", few, self.draw_embedding(emb), self.seeds)
            yield self.rebuilt("reconstruction_of_inverted", few, adapter)

    def rebuilt(self, variant: str, scenes: list[Scene], adapter: SemanticAdapter) -> Case:
        """Scenes, drawn, read by the adapter and drawn again from their embedding."""
        pictures = render(scenes, self.world.size)
        emb = SemanticEmbedding.cat([adapter.encode(part) for part in pictures.split(BATCH)])
        encoder = adapter.encoder
        reader = digest(adapter, *(() if encoder is None else (encoder,)))[:DIGITS]
        return Case(variant, scenes, self.draw_embedding(emb), self.seeds, reader)

    def draw_embedding(self, emb: SemanticEmbedding) -> Draw:
        """Decode by the overlap rule; a tree of one level is not masked by it anywhere."""

        def draw(rows: slice, seeds: list[int]) -> Tensor:
            drawn = self.pipe.decode(emb.select(rows), steps=self.steps, seed=seeds, output="pt")
            return torch.as_tensor(drawn)

        return draw

    def draw_text(self, text: Tensor) -> Draw:
        """Draw captions as the decoder learned them: no mask, the pooled vector zero."""
        pooled = text.new_zeros(1, self.pipe.flux.transformer.config.pooled_projection_dim)
        return lambda rows, seeds: (
            self.pipe.flux(
                prompt_embeds=text[rows],
                pooled_prompt_embeds=pooled.expand(len(seeds), -1),
                height=self.world.size,
                width=self.world.size,
                num_inference_steps=self.steps,
                generator=[_seeded(seed) for seed in seeds],
                output_type="pt",
            ).images
        )

    @torch.no_grad()
    def read_captions(self, scenes: list[Scene]) -> Tensor:
        """The plain caption of each scene through the text encoder: [B, T, C]."""
        ids = token_ids(self.pipe.flux.tokenizer_2, [caption(scene) for scene in scenes])
        return self.pipe.flux.text_encoder_2(ids).last_hidden_state

    def inverted(self, pictures: Tensor, text: Tensor, progress: Progress) -> SemanticEmbedding:
        """The prompt of each picture, sought from the mean of all captions' vectors on."""
        tree: Hierarchy = self.pipe.adapter.tree
        mean = text.mean((0, 1)).expand(len(pictures), tree.num_tokens, -1)
        # equal positions of a node would stay equal
        jitter = torch.randn(mean.shape, generator=_seeded(SCENE_SEED)) * 0.1 * mean.std()
        pooled = mean.new_zeros(len(mean), self.pipe.flux.transformer.config.pooled_projection_dim)
        task = progress.add_task("inversion, fitting", total=INVERSION_STEPS)
        return invert(
            self.pipe,
            pictures,
            SemanticEmbedding(mean + jitter, tree, pooled),
            INVERSION_STEPS,
            on_step=lambda: progress.advance(task),
        )


def measure(case: Case, world: World, on_batch: Callable[[int], object]) -> dict[str, Any]:
    """Draw, parse and score a case.

    Args:
        case: what to draw.
        world: for the parser.
        on_batch: told the number of pictures just scored.

    Returns:
        For each metric its mean and its 95 % interval over scenes. psnr is in dB, of what was
        drawn against the clean render; it is left out where a picture equals the render.
    """
    truth = render(case.scenes, world.size)
    sums = torch.zeros(len(case.scenes), len(astuple(Sums())), dtype=torch.float64)
    fidelity = torch.zeros(len(case.scenes), dtype=torch.float64)
    for draw in range(case.seeds):
        for first in range(0, len(case.scenes), BATCH):
            rows = slice(first, min(first + BATCH, len(case.scenes)))
            seeds = [draw * SEED_STEP + i for i in range(rows.start, rows.stop)]
            pictures = case.draw(rows, seeds).float()
            parsed = parse(pictures, world)
            pairs = zip(parsed, case.scenes[rows], strict=True)
            sums[rows] += torch.tensor([astuple(score([p], [t])) for p, t in pairs])
            fidelity[rows] += psnr(pictures, truth[rows]) / case.seeds
            on_batch(len(seeds))
    return bootstrap(sums, fidelity)


def bootstrap(sums: Tensor, fidelity: Tensor) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval of every metric; see bench.bootstrap.

    Args:
        sums: [scenes, fields of Sums] f64, added up over noise seeds.
        fidelity: [scenes] f64, PSNR in dB.

    Returns:
        {metric: {"mean", "low", "high"}}; psnr only where it is finite.
    """
    scenes = len(sums)
    rates = lambda v: row(Sums(*v[:-1])) | {"psnr": v[-1] / scenes}
    return intervals(torch.cat([sums, fidelity[:, None]], dim=1), rates)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(suite: Suite, out: Path) -> list[Record]:
    """Measure every case, appending each record to out as soon as it is there."""
    # asked once: the results file itself may be tracked
    about = {"versions": versions(), "commit": commit(), "run": run_id()}
    about["decoder"] = digest(suite.pipe.flux.transformer)[:DIGITS]
    suite.pipe.flux.set_progress_bar_config(disable=True)
    records = []
    with bars() as progress:
        start = time.perf_counter()
        for case in suite.cases(progress):
            total = len(case.scenes) * case.seeds
            task = progress.add_task(case.variant.replace("_", " "), total=total)
            metrics = measure(case, suite.world, lambda n, task=task: progress.advance(task, n))
            record = {
                "suite": "quality",
                "variant": case.variant,
                "n": len(case.scenes),
                "seeds": case.seeds,
                "steps": None if case.variant.startswith("parser") else suite.steps,
                "metrics": metrics,
                "reader": case.reader,
                "seconds": round(time.perf_counter() - start, 1),
                **about,
            }
            append_record(out, record)
            records.append(record)
            start = time.perf_counter()
    return records


def main(
    model: Annotated[str, typer.Option(help='"scenes", or a pipeline folder.')] = "scenes",
    scenes: Annotated[int, typer.Option(min=1, help="Unseen scenes of each variant.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Noise seeds of each scene.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of denoising.")] = 20,
    flat: Annotated[
        Path | None, typer.Option(help="Folder of the flat baseline's adapter.")
    ] = None,
    inversions: Annotated[int, typer.Option(min=0, help="Scenes to invert; 0: none.")] = 16,
    out: Annotated[Path, typer.Option(help="Records are appended here.")] = Path(
        "bench/results/quality.jsonl"
    ),
) -> None:
    """Rebuild unseen scenes, parse what came out, append one record a variant."""
    try:
        pipe = SemanticPipeline.from_pretrained(model)
        if flat is None and model == SHIPPED:
            flat = BASELINE
        suite = Suite(pipe, load_flat(flat, pipe), scenes, seeds, steps, inversions)
        suite.check()
    except (OSError, ValueError) as error:
        print(f"bench quality: {error}")
        raise typer.Exit(2) from error
    print(quality_tables(run(suite, out)))


def load_flat(folder: Path | None, pipe: SemanticPipeline) -> SemanticAdapter | None:
    """The baseline on the pipeline's own encoders.

    Raises:
        ValueError: it has levels, or not as many positions as the pipeline's adapter.
    """
    if folder is None:
        return None
    flat = SemanticAdapter.from_pretrained(folder).eval()
    wanted = Hierarchy((pipe.adapter.tree.num_tokens,))
    if flat.tree != wanted:
        raise ValueError(f"flat must be an adapter of {wanted}, got {flat.tree}")
    flat.set_encoder(pipe.adapter.encoder)
    return flat
