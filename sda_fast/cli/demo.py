"""The main job in one call: encode, rebuild, interpolate, transplant, and a page to look at."""

import json
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from sda_fast.cli.demo_report import METRICS, Demo, number, write_report
from sda_fast.cli.sheets import (
    Tile,
    contact_sheet,
    draw_hierarchy,
    draw_node,
    enlarge,
    level_legend,
    save_png,
)
from sda_fast.cli.targets import check_folder
from sda_fast.cli.terminal import load_pipeline, progress_on, stderr_console, steps_shown, working
from sda_fast.embedding import SemanticEmbedding
from sda_fast.files import write_whole
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import load_image, to_pil, to_tensor
from sda_fast.scenes.parser import parse
from sda_fast.scenes.render import render
from sda_fast.scenes.score import match, psnr, row, score
from sda_fast.scenes.world import FULL, SMALL, Scene, SceneObject, World, sample_scenes

if TYPE_CHECKING:
    from sda_fast.pipeline import SemanticPipeline

COUNT, FRAMES = 8, 9
QUADRANTS = ("/0", "/1", "/2", "/3")
PIXELS_AT_ONCE = 2**18
"""Pictures of this many pixels together are drawn at once."""
MOST_DB = 80.0
"""Equal pictures have infinite PSNR, which JSON cannot say."""
PACKAGES = ("sda-fast", "torch", "diffusers", "transformers")


def run_demo(
    out: Path,
    model: str = "scenes",
    pictures: Sequence[Path] = (),
    *,
    steps: int | None = None,
    seed: int = 0,
) -> Path:
    """Run the demo and write its results.

    Without pictures of your own it draws unseen scenes (test split) and scores what comes back
    with the scenes world's parser. Your own are cropped to the model's aspect ratio.

    Args:
        out: folder for contact_sheet.png, interpolation.png, transplant.png, metrics.json and
            report.html; made if needed.
        model: of ``SemanticPipeline.from_pretrained``.
        pictures: two or more files, or folders of pictures; empty for scenes.
        steps: denoising steps; None is the model's.
        seed: of the scenes and of the noise.

    Returns:
        The path of report.html.

    Raises:
        ValueError: fewer than two pictures, or one that cannot be read.
        OSError: out cannot be written.
    """
    out = Path(out)
    check_folder(out)
    own = _open_own(pictures)
    console, clock = stderr_console(), _Clock()
    with progress_on(console) as progress:
        with clock.timed("load"):
            pipe = load_pipeline(model, progress)
        subjects = _crops(own, pipe) if own else _scenes(pipe, seed)
        painter = _Painter(pipe, progress, steps or pipe.defaults.steps, seed)
        demo = _make(painter, subjects, clock)
        with clock.timed("score"), working(progress, "reading what came back"):
            scores = _score(demo, subjects.scenes, _world(pipe))
    demo.metrics.update(
        model=model,
        seed=seed,
        steps=painter.steps,
        **scores,
        seconds=clock.seconds | {"total": round(sum(clock.seconds.values()), 3)},
        versions={name: metadata.version(name) for name in PACKAGES},
    )
    out.mkdir(parents=True, exist_ok=True)
    _write_sheets(demo, out)
    text = json.dumps(demo.metrics, indent=2, allow_nan=False)
    write_whole(out / "metrics.json", text + "\n")
    report = write_report(demo, out / "report.html")
    console.print(_summary(demo.metrics))
    return report


@dataclass(frozen=True)
class _Subjects:
    """What is rebuilt: pictures of one size; their scenes, if they are some; A, B and a node."""

    names: list[str]
    sources: list[Image.Image]
    scenes: list[Scene]
    choice: tuple[int, int, str]


def _scenes(pipe: "SemanticPipeline", seed: int) -> _Subjects:
    """Scenes that nothing was trained on."""
    world = _world(pipe)
    scenes = sample_scenes(world, "test", seed, COUNT)
    names = [f"scene {i + 1}" for i in range(COUNT)]
    return _Subjects(names, to_pil(render(scenes, world.size)), scenes, _choose(scenes))


def _crops(own: Sequence[tuple[str, Image.Image]], pipe: "SemanticPipeline") -> _Subjects:
    """Pictures somebody brought, at the size that the model draws."""
    size = pipe.defaults.width, pipe.defaults.height
    sources = [ImageOps.fit(picture, size) for _, picture in own]
    return _Subjects([name for name, _ in own], sources, [], (0, 1, "/1"))


@dataclass(frozen=True)
class _Painter:
    """Draws embeddings, always in the same way, and shows the steps."""

    pipe: "SemanticPipeline"
    progress: Progress
    steps: int
    seed: int

    def draw(self, emb: SemanticEmbedding, size: tuple[int, int], words: str) -> list[Image.Image]:
        """One picture (width, height) each, as many at a time as are cheap to hold."""
        width, height = size
        at_once = max(1, PIXELS_AT_ONCE // (height * width))
        parts = [emb.select(slice(i, i + at_once)) for i in range(0, len(emb), at_once)]
        callback = steps_shown(self.progress, words, self.steps * len(parts))
        drawn: list[Any] = []
        for part in parts:
            drawn += self.pipe.decode(
                part,
                height,
                width,
                steps=self.steps,
                seed=self.seed,
                callback_on_step_end=callback,
            )
        return drawn


@dataclass
class _Clock:
    """Seconds of each part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Generator[None, None, None]:
        """Measure what is done inside."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _make(painter: _Painter, subjects: _Subjects, clock: _Clock) -> Demo:
    """All pictures of the demo; words and metrics are still empty."""
    a, b, path = subjects.choice
    size = width, height = subjects.sources[0].size
    with clock.timed("encode"), working(painter.progress, "encoding"):
        emb = painter.pipe.encode(subjects.sources)
    ends = emb.select(a), emb.select(b)
    way = ends[0].interpolate(ends[1], FRAMES)
    paths = QUADRANTS if emb.tree.num_levels > 1 else ("/",)
    mixed = [ends[0].transplant(ends[1], node) for node in paths]
    with clock.timed("rebuild"):
        rebuilt = painter.draw(emb, size, "rebuilding")
    with clock.timed("interpolate"):
        frames = painter.draw(way, size, "interpolating")
    with clock.timed("transplant"):
        transplants = painter.draw(SemanticEmbedding.cat(mixed), size, "transplanting")
    return Demo(
        names=subjects.names,
        sources=subjects.sources,
        rebuilt=rebuilt,
        embedding=emb,
        words=[[] for _ in subjects.sources],
        ends=(a, b),
        frames=frames,
        transplants=dict(zip(paths, transplants, strict=True)),
        path=path if path in paths else paths[0],
        grid=(height // painter.pipe.patch, width // painter.pipe.patch),
        metrics={},
    )


def _world(pipe: "SemanticPipeline") -> World:
    """The scenes world at the size of the pipeline's pictures."""
    size = min(pipe.defaults.height, pipe.defaults.width)
    return SMALL if size == SMALL.size else replace(FULL, size=size)


def _open_own(paths: Sequence[Path]) -> list[tuple[str, Image.Image]]:
    """(name, picture) of files, and of all pictures in folders."""
    known = Image.registered_extensions()
    files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.iterdir()) if path.is_dir() else [path]
        files += [p for p in inside if p is path or p.suffix.lower() in known]
    if paths and len(files) < 2:
        raise ValueError(
            f"pictures must be two or more, as the demo goes from the first to the second; "
            f"got {len(files)}"
        )
    return [(path.name, load_image(path)) for path in files]


def _choose(scenes: Sequence[Scene]) -> tuple[int, int, str]:
    """A, B and the quadrant where B has whole objects and A has nothing."""

    def fitness(choice: tuple[int, int, str]) -> tuple[int, ...]:
        a, b, path = choice
        own, foreign = (_inside(scenes[i], path) for i in (a, b))
        return foreign[0] - own[1], -foreign[1], len(scenes[a].objects)

    pairs = [(a, b) for a in range(len(scenes)) for b in range(len(scenes)) if a != b]
    return max(((a, b, path) for a, b in pairs for path in QUADRANTS), key=fitness)


def _inside(scene: Scene, path: str) -> tuple[int, int]:
    """How many objects lie wholly in a quadrant, and how many touch it."""
    y0, x0, y1, x1 = Hierarchy((1, 1)).box(path)
    whole = touching = 0
    for o in scene.objects:
        top, left, bottom, right = o.box
        whole += y0 <= top and x0 <= left and bottom <= y1 and right <= x1
        touching += top < y1 and left < x1 and bottom > y0 and right > x0
    return whole, touching


def _write_sheets(demo: Demo, out: Path) -> None:
    """contact_sheet.png, interpolation.png and transplant.png."""
    tree, shown = demo.embedding.tree, [enlarge(p) for p in demo.sources]
    triples = [
        (
            Tile(source, f"{name}: source"),
            Tile(enlarge(rebuilt), _words_under(record)),
            Tile(draw_hierarchy(source, tree), "hierarchy"),
        )
        for source, name, rebuilt, record in zip(
            shown, demo.names, demo.rebuilt, demo.metrics["pictures"], strict=True
        )
    ]
    rows = [[tile for triple in triples[i : i + 2] for tile in triple] for i in _evens(triples)]
    title = f"{len(shown)} pictures, rebuilt from {tree.num_tokens} positions each"
    sheet = contact_sheet(rows, title, level_legend(tree), group=3)
    save_png(sheet, out / "contact_sheet.png")
    last = len(demo.frames) - 1
    strip = [Tile(enlarge(f, 128), f"{i / last:.2f}") for i, f in enumerate(demo.frames)]
    save_png(contact_sheet([strip], "From A to B"), out / "interpolation.png")
    a, b = (enlarge(demo.rebuilt[i]) for i in demo.ends)
    result = enlarge(demo.transplants[demo.path])
    boxed = draw_node(b, tree, demo.path)
    grafted = [Tile(a, "A"), Tile(boxed, f"B, {demo.path} outlined"), Tile(result, "A with it")]
    title = f"A takes the node {demo.path} from B"
    save_png(contact_sheet([grafted], title), out / "transplant.png")


def _evens(items: Sequence[object]) -> range:
    return range(0, len(items), 2)


def _words_under(record: Mapping[str, Any]) -> str:
    if "objects" not in record:
        return f"rebuilt, {record['psnr_db']:.1f} dB"
    return f"rebuilt, {record['objects_right']} of {record['objects']} right"


def _score(demo: Demo, scenes: list[Scene], world: World) -> dict[str, Any]:
    """Records of pictures and means; words for the objects are put into the demo.

    The mean of the rates is over all objects together; ceiling is that of the sources, read by
    the same parser.
    """
    before, after = to_tensor(demo.sources), to_tensor(demo.rebuilt)
    decibels = [round(value, 2) for value in psnr(before, after).clamp_max(MOST_DB).tolist()]
    records: list[dict[str, Any]] = [
        {"name": name, "psnr_db": value} for name, value in zip(demo.names, decibels, strict=True)
    ]
    scores: dict[str, Any] = {"pictures": records}
    scores["mean"] = {"psnr_db": round(sum(decibels) / len(decibels), 2)}
    if not scenes:
        return scores
    parsed = parse(after, world)
    for record, words, found, truth in zip(records, demo.words, parsed, scenes, strict=True):
        words += _compare(found, truth)
        right = sum(good for good, _ in words)
        record |= {"objects": len(truth.objects), "objects_right": right}
        record |= row(score([found], [truth]))
    scores["mean"] |= row(score(parsed, scenes))
    scores["ceiling"] = row(score(parse(before, world), scenes))
    return scores


def _compare(found: Scene, truth: Scene) -> list[tuple[bool, str]]:
    """For each object of the truth whether it came out right, and words; then what is too much."""
    pairs = match(found.objects, truth.objects)
    lines = []
    for wanted in truth.objects:
        came = [_name(p) for p, t in pairs if t is wanted]
        right = came == [_name(wanted)]
        became = "" if right else f", came out as {came[0]}" if came else ", missing"
        lines.append((right, _name(wanted) + became))
    matched = [p for p, _ in pairs]
    extra = [o for o in found.objects if not any(o is p for p in matched)]
    return lines + [(False, f"{_name(o)}, which was not there") for o in extra]


def _name(o: SceneObject) -> str:
    return f"{o.size} {o.color} {o.shape}"


def _summary(metrics: Mapping[str, Any]) -> Table:
    table = Table(title=escape(f"rebuilt by {metrics['model']}"), title_justify="left")
    keys = [key for key in METRICS if key in metrics["mean"]]
    table.add_column("picture")
    for key in keys:
        table.add_column(METRICS[key], justify="right")
    records: list[dict[str, Any]] = [*metrics["pictures"], {"name": "mean", **metrics["mean"]}]
    for record in records:
        table.add_row(escape(record["name"]), *(number(key, record.get(key)) for key in keys))
    return table
