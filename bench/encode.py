"""From picture to embedding, end to end, and what each stage of it takes.

``python -m bench encode`` on one GPU: the reference adapter behind a CLIP ViT-H/14 and a DINOv2
ViT-L/14 of full size with random weights, from PIL pictures, as ``adapter.encode`` launches it, and
as one CUDA graph. ``--small`` goes through it with tiny ones on a CPU.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from bench.cases import select
from bench.command import command
from bench.measure import Step, quantiles
from bench.plain_adapter import adapter_yardstick
from bench.qformer_cases import QFormerCase
from bench.qformer_report import STAGES
from bench.records import Record
from bench.suite import Suite, Work
from sda_fast.hierarchy import Hierarchy
from sda_fast.images import group_by_size
from sda_fast.shapes import CLIP_VIT_H as CLIP
from sda_fast.shapes import DINOV2_VIT_L as DINO

RUNS = 20
"""Encodings that are taken apart, after those that are timed whole."""
TINY = {
    "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
    "image_size": 32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EncodeCase:
    """Pictures of one size through both encoders and the adapter.

    Attributes:
        adapter: B, patches to a side, dtype and the adapter's configuration.
        size: pixels to a side of the encoders' input.
        picture: height and width of the pictures.
        clip: of a CLIPVisionConfig.
        dino: of a Dinov2Config.
    """

    adapter: QFormerCase
    size: int = 378
    picture: tuple[int, int] = (512, 512)
    clip: dict[str, Any] = field(default_factory=lambda: CLIP, hash=False)
    dino: dict[str, Any] = field(default_factory=lambda: DINO, hash=False)

    @property
    def name(self) -> str:
        """What records and options call it."""
        return f"{self.adapter.size}encode-b{self.adapter.batch}-{self.size}px"

    @property
    def seq_len(self) -> int:
        """S, patches of a picture."""
        return self.adapter.seq_len

    def model(self, device: torch.device) -> Any:
        """The adapter with its encoder, random weights, the same at every call."""
        from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

        from sda_fast.encoders import ImageEncoder

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip = CLIPVisionModel(CLIPVisionConfig(**self.clip))
            dino = Dinov2Model(Dinov2Config(**self.dino))
        adapter: Any = self.adapter.adapter(device)
        encoder = ImageEncoder(clip, dino, self.size).to(device, self.adapter.dtype)
        adapter.set_encoder(encoder)
        return adapter

    def pictures(self) -> list[Image.Image]:
        """RGB noise, the same at every call."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.adapter.batch, *self.picture, 3)
        noise = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        return [Image.fromarray(one.numpy()) for one in noise]


def _small() -> EncodeCase:
    config = {"in_features": 24, "num_layers": 2, "out_features": 20}
    shape = 2, 16, Hierarchy((4, 2)), torch.float32
    tiny = QFormerCase("adapter", 2, 4, *shape, config, "small-")
    clip = TINY | {"intermediate_size": 24}
    return EncodeCase(tiny, 32, (40, 40), clip, TINY | {"mlp_ratio": 2})


GOALS = tuple(EncodeCase(QFormerCase("adapter", batch, 27)) for batch in (1, 16))
SMALL = (_small(),)
GROUPS = {"goals": GOALS, "small": SMALL}
CASES = {case.name: case for case in (*GOALS, *SMALL)}


@dataclass(frozen=True, slots=True)
class EncodeVariant:
    """One way to encode.

    Attributes:
        name: in records and options.
        label: in tables.
        graph: as a CUDA graph of the adapter's own.
        gpu: it needs one.
    """

    name: str
    label: str
    graph: bool = False
    gpu: bool = False


VARIANTS = {
    "ours": EncodeVariant("ours", "**ours**"),
    "ours-graph": EncodeVariant("ours-graph", "**ours, in a CUDA graph**", graph=True, gpu=True),
}
UNSEEN = "it is replayed whole, its stages cannot be told apart"
"""Why there are no stages of a CUDA graph."""


@dataclass(frozen=True, slots=True)
class EncodeWork(Work):
    """Work, with what is encoded by what."""

    adapter: Any = None
    pictures: list[Image.Image] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Encode(Suite):
    """Pictures to embedding."""

    def passes(self) -> Mapping[str, bool]:
        """Forward alone."""
        return {"forward": False}

    def work(self, case: EncodeCase) -> EncodeWork:
        """Pictures and models; the ruler knows the embedding of the encoders' features."""
        adapter, pictures = case.model(self.device), case.pictures()
        ((_, pixels),) = group_by_size(pictures)
        with torch.no_grad():
            features, _ = adapter.encoder(pixels)
        channels = 0, adapter.config.out_features
        _, d_out = case.adapter.inputs(self.device, channels)
        encoder = adapter.encoder
        adapter.set_encoder(None)  # else the yardstick makes a float64 copy of it too
        ruler = adapter_yardstick(adapter, features, d_out, case.adapter.places(self.device))
        adapter.set_encoder(encoder)
        return EncodeWork([features], {True: ruler}, adapter=adapter, pictures=pictures)

    def prepare(self, variant: EncodeVariant, case: EncodeCase, work: EncodeWork) -> "Stages":
        """See Suite."""
        encode = lambda: work.adapter.encode(work.pictures, graph=variant.graph).tokens
        return Stages(work.adapter, encode, self.device)

    def step(self, ready: "Stages", work: EncodeWork, backward: bool) -> Step:
        """See Suite."""
        return lambda: (ready.encode(),)

    def ruler(self, variant: EncodeVariant, work: Work) -> Any:
        """See Suite."""
        return work.rulers[True]

    def captures(self, variant: EncodeVariant) -> bool:
        """Pictures come from the host; what the adapter captures begins after that."""
        return False

    def facts(
        self, case: EncodeCase, variant: EncodeVariant, ready: "Stages | None", backward: bool
    ) -> Record:
        """What each stage takes, medians in ms; graphs of its own hide a variant's peak."""
        about = {"suite": "encode", "op": "encode", "rotated": True, "bytes": None}
        if variant.graph:
            own = {"graph": True, "peak_bytes": None}
            return about | own | {"stages_ms": None, "stages_reason": UNSEEN}
        stages, why = None, None
        try:
            stages = None if ready is None else ready.measure(min(RUNS, self.reps))
        except (RuntimeError, ValueError) as error:  # as where the encoding itself failed
            why = " ".join(str(error).split())[:400]
        return about | {"stages_ms": stages, "stages_reason": why}

    def rate(self, record: Record) -> str:
        """The stages."""
        stages = record["stages_ms"] or {}
        return ", ".join(f"{name} {ms:.3f}" for name, ms in stages.items())


@dataclass(frozen=True, slots=True)
class Stages:
    """Takes encodings apart at the borders of the modules: STAGES, one after the other.

    Attributes:
        adapter: with its encoder.
        encode: what is taken apart.
        device: where.
    """

    adapter: Any
    encode: Callable[[], Tensor]
    device: torch.device

    def measure(self, runs: int) -> dict[str, float]:
        """Median milliseconds of each of STAGES, resizing for either encoder in "preprocess".

        Raises:
            RuntimeError: the modules were not called one after the other.
        """
        marks: list[tuple[str, Any]] = []
        encoder, qformer = self.adapter.encoder, self.adapter.qformer
        borders = ((encoder.clip, "preprocess", "clip"), (encoder.dino, "preprocess", "dino"))
        hooks = [
            hook
            for module, before, after in (*borders, (qformer, "join + MLP", "qformer"))
            for hook in self._hooks(module, before, after, marks)
        ]
        times: dict[str, list[float]] = {stage: [] for stage in STAGES}
        try:
            for _ in range(runs):
                marks.clear()
                self._mark("start", marks)
                self.encode()
                self._mark("output", marks)
                for stage, ms in self._spans(marks).items():
                    times[stage].append(ms)
        finally:
            for hook in hooks:
                hook.remove()
        return {stage: quantiles(ms)[1] for stage, ms in times.items()}

    def _hooks(
        self, module: nn.Module, before: str, after: str, marks: list[tuple[str, Any]]
    ) -> list[Any]:
        return [
            module.register_forward_pre_hook(lambda *_: self._mark(before, marks)),
            module.register_forward_hook(lambda *_: self._mark(after, marks)),
        ]

    def _mark(self, stage: str, marks: list[tuple[str, Any]]) -> None:
        """The stage that ends here, and the time."""
        if self.device.type == "cuda":
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        marks.append((stage, now))

    def _spans(self, marks: list[tuple[str, Any]]) -> dict[str, float]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        names = [stage for stage, _ in marks[1:]]
        if sorted(set(names)) != sorted(STAGES) or len(names) != len(STAGES) + 1:
            raise RuntimeError(f"stages must be {STAGES}, clip and dino each once, got {names}")
        spans = dict.fromkeys(STAGES, 0.0)
        for (_, begin), (stage, end) in pairwise(marks):
            spans[stage] += begin.elapsed_time(end) if on_gpu else (end - begin) * 1e3
        return spans


def select_encode(text: str) -> list[EncodeCase]:
    """The cases of a list, in its order, each once.

    Raises:
        ValueError: a part fits no case.
    """
    return select(text, GROUPS, CASES)


main = command(
    "encode",
    "Time pictures to embedding, whole and stage by stage; one record a case.",
    Encode,
    VARIANTS,
    select_encode,
)
