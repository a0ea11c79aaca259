"""What a run is made of. A run is a function in train.recipes that returns one of these."""

import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

POSITIVE = (
    "steps", "batch_size", "log_every", "checkpoint_every", "eval_every", "keep",
    "nonfinite_limit",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of any stage; every field is written into the run's folder."""

    name: str
    """Of the run's folder; a recipe's own unless it is set."""
    stage: Literal[
        "text", "clip", "dino", "adapter", "flux", "instructions", "edit", "edit-pictures"
    ]
    steps: int
    batch_size: int = 64
    """Pictures of a step, over all ranks."""
    micro_batch: int | None = None
    """Pictures a rank computes on at a time; none: its whole share of a step."""
    world: Literal["small", "full"] = "small"
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of what is computed under autocast; weights that learn are fp32."""
    muon_lr: float = 3e-3
    """For the 2-D weights of the blocks; 0 gives those to AdamW too."""
    adamw_lr: float = 1e-3
    """For everything else."""
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    checkpoint_minutes: float = 15.0
    """Whichever of the two comes first."""
    keep: int = 2
    """Checkpoints beside the best one."""
    eval_every: int = 500
    nonfinite_limit: int = 5
    """Steps in a row without finite numbers that end the run."""
    timeout_s: float = 600.0
    """How long a rank waits for the others."""
    out_dir: Path = Path("runs")

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be none or at least 1, got {self.micro_batch}")
        for name in ("muon_lr", "adamw_lr", "weight_decay", "warmup_steps"):
            _check_not_negative(self, name)
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be 0 or more, below 1, got {self.ema_decay}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")
        for name in ("timeout_s", "checkpoint_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")

    @property
    def folder(self) -> Path:
        """Where the run keeps its log, checkpoints, plots and export."""
        return self.out_dir / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig(TrainConfig):
    """A run of the adapter through a frozen decoder, on scenes."""

    tokens_per_node: tuple[int, ...] = (4, 2, 1)
    rule: Literal["overlap", "local", "isolated", "none"] = "overlap"
    """"none" lets each image token see each position: the flat baseline."""
    rope: bool = True
    """Whether cross-attention rotates q and k by (level, y, x)."""
    width: int = 128
    num_layers: int = 4
    num_heads: int = 4
    penalty: float = 0.01
    """Weight of the cosine penalty."""
    level_dropout: float = 0.0
    """Share of steps that decode from the first levels alone, however many."""
    parent: str | None = None
    """The run that this one goes on from, by --from; none starts anew."""
    decoder: Literal["fast", "stock"] = "stock"
    """FastFlux, or diffusers' own transformer with a dense mask."""
    recompute: Literal["none", "attention-out", "full"] = "none"
    """What a block of the decoder recomputes in the backward."""
    eval_pictures: int = 64
    flux: Path | None = None
    """Folder or hub id of the frozen decoder; none is what scenes-text exported below out_dir."""
    clip: Path | None = None
    """Likewise, of scenes-clip."""
    dino: Path | None = None
    """Likewise, of scenes-dino."""

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if not 0 <= self.level_dropout < 1:
            raise ValueError(f"level_dropout must be 0 or more, below 1, got {self.level_dropout}")
        if self.eval_pictures < 1:
            raise ValueError(f"eval_pictures must be at least 1, got {self.eval_pictures}")
        _check_not_negative(self, "penalty")
        if min(self.width, self.num_layers, self.num_heads) < 1 or self.width % (
            16 * self.num_heads
        ):
            raise ValueError(
                f"width must be a multiple of 16 times num_heads, and num_layers at least 1, got "
                f"{self.width}, {self.num_heads} and {self.num_layers}"
            )

    def part(self, name: Literal["flux", "clip", "dino"]) -> Path:
        """Return the folder of a frozen part; it need not be there."""
        return getattr(self, name) or made_by_scenes(self.out_dir, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxConfig(AdapterConfig):
    """A run of the adapter through the frozen FLUX.1-dev, on pictures."""

    data: Path | None = None
    """A folder of pictures, of tar shards, or of what precompute wrote."""
    resolution: int = 512
    """Side of a square picture; others have about its area."""
    workers: int = 8
    """Processes that read pictures, for each rank."""
    guidance: float = 3.5
    flux_precision: Literal["bf16", "fp8"] = "bf16"
    shard_flux: bool = False
    """Spread the decoder's weights over all ranks (FSDP2); its blocks are then diffusers'."""
    open_layers: int = 0
    """DINOv2's last layers that learn."""
    encoder_lr: float = 1e-5
    """For those."""
    squash: bool = False
    """Squeeze each picture into the encoders' square."""
    encoder_size: int = 378
    """Side in pixels of a square picture, as the encoders see it."""
    rehearsal: Literal["none", "full", "small"] = "none"
    """Random frozen models, of full size or tiny: to try memory, speed and cluster."""

    def __post_init__(self) -> None:
        AdapterConfig.__post_init__(self)
        if self.resolution < 1 or self.resolution % 16:
            raise ValueError(f"resolution must be a multiple of 16, got {self.resolution}")
        if self.shard_flux and self.flux_precision == "fp8":
            raise ValueError("flux_precision must be bf16 where shard_flux is true, got fp8")
        if self.shard_flux and self.decoder == "stock":
            raise ValueError("decoder must be fast where shard_flux is true, got stock")
        if self.flux_precision == "fp8" and self.decoder == "stock":
            raise ValueError("flux_precision must be bf16 where decoder is stock, got fp8")
        for name in ("open_layers", "workers", "encoder_lr", "guidance"):
            _check_not_negative(self, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EditConfig(TrainConfig):
    """A run of an editor behind a frozen adapter, on edits of scenes."""

    mode: Literal["autoregressive", "prefilled", "level", "delta"] = "autoregressive"
    """How positions are written; see sda_fast.editors.t5.EmbeddingEditor."""
    width: int = 192
    num_layers: int = 4
    num_heads: int = 6
    ff_width: int = 512
    flow: float = 0.0
    """Weight of the velocity error of what is written, through the frozen decoder."""
    llm: Path | None = None
    """Folder or hub id of a causal language model to edit by in place of a T5 decoder."""
    lora_rank: int = 16
    """Of what learns of it."""
    decoder: Literal["fast", "stock", "none"] = "stock"
    """As an adapter's; "none" leaves the decoder out: no flow loss, no sheets."""
    rule: Literal["overlap", "local", "isolated"] = "overlap"
    """Mask rule of the decoder."""
    recompute: Literal["none", "attention-out", "full"] = "none"
    eval_pictures: int = 128
    """Edits that are held out."""
    pairs: Path | None = None
    """Folder that precompute-edits wrote; none encodes pictures in every step."""
    adapter: Path | None = None
    """Folder or hub id of the adapter; none is what scenes-adapter exported below out_dir."""
    instructions: Path | None = None
    """Folder of an InstructionEncoder; none is what scenes-instructions exported."""
    flux: Path | None = None
    """As an adapter's run has it, and so the next two."""
    clip: Path | None = None
    dino: Path | None = None

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        _check_not_negative(self, "flow")
        for name in ("num_layers", "ff_width", "lora_rank", "eval_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.width, self.num_heads) < 1 or self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads, got {self.width} and {self.num_heads}"
            )
        if self.flow and self.decoder == "none":
            raise ValueError(f"decoder must be fast or stock where flow is {self.flow}, got none")

    def part(self, name: Literal["flux", "clip", "dino", "adapter", "instructions"]) -> Path:
        """Return the folder of a frozen part; it need not be there."""
        return getattr(self, name) or made_by_scenes(self.out_dir, name)

    def around(self, tokens_per_node: tuple[int, ...]) -> AdapterConfig:
        """A config of the adapter's, that says how decoder and encoders are loaded."""
        return AdapterConfig(stage="adapter", **self._shared(tokens_per_node))

    def _shared(self, tokens_per_node: tuple[int, ...]) -> dict[str, Any]:
        names = ("name", "steps", "warmup_steps", "world", "precision", "out_dir", "rule")
        names += ("recompute", "flux", "clip", "dino")
        decoder = "stock" if self.decoder == "none" else self.decoder
        shared = {name: getattr(self, name) for name in names}
        return {"tokens_per_node": tokens_per_node, "decoder": decoder, **shared}


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureEditConfig(EditConfig):
    """A run of an editor behind a frozen adapter of FLUX.1-dev, on pairs of pictures."""

    data: Path | None = None
    """A file of JSON lines, each with "source", "target" and "instruction"."""
    resolution: int = 512
    """As the adapter's run has it, and so what follows."""
    workers: int = 8
    guidance: float = 3.5
    flux_precision: Literal["bf16", "fp8"] = "bf16"
    squash: bool = False
    encoder_size: int = 378
    rehearsal: Literal["none", "full", "small"] = "none"
    """Decoder and encoders are random, of full size or tiny."""

    def __post_init__(self) -> None:
        EditConfig.__post_init__(self)
        self.around((1,))

    def around(self, tokens_per_node: tuple[int, ...]) -> FluxConfig:
        """See EditConfig."""
        names = ("data", "resolution", "workers", "guidance", "flux_precision", "squash")
        names += ("encoder_size", "rehearsal")
        mine = {name: getattr(self, name) for name in names}
        return FluxConfig(stage="flux", **self._shared(tokens_per_node), **mine)


def made_by_scenes(out_dir: Path, part: str) -> Path:
    """Where a run of scenes leaves what it exports."""
    run = "scenes-text" if part == "flux" else f"scenes-{part}"
    return out_dir / run / "export" / part


def _check_not_negative(config: TrainConfig, name: str) -> None:
    value = getattr(config, name)
    if not 0 <= value < math.inf:  # nor NaN
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


CONFIGS: dict[str, type[TrainConfig]] = {
    "adapter": AdapterConfig,
    "flux": FluxConfig,
    "edit": EditConfig,
    "edit-pictures": PictureEditConfig,
}
"""Of the stages that have more fields than TrainConfig."""


def describe(config: TrainConfig) -> str:
    """Return every field as JSON, as it is written into the run's folder."""
    return json.dumps(asdict(config), default=str, indent=2) + "\n"


def restore(text: str) -> TrainConfig:
    """Return the config that ``describe`` wrote.

    Raises:
        ValueError: it is no such text, or of another version.
    """
    try:
        had = json.loads(text)
        kind = CONFIGS.get(had["stage"], TrainConfig)
        known = get_type_hints(kind)
        return kind(**{key: _restored(value, known[key]) for key, value in had.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"this is no config of a run: {error!r}") from error


def _restored(value: Any, kind: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    paths = kind is Path or Path in get_args(kind)
    return Path(value) if paths and value is not None else value


def differences(
    had: Mapping[str, Any], now: Mapping[str, Any], but: tuple[str, ...] = ()
) -> list[str]:
    """Entries that differ, in words."""
    return [
        f"{key} (was {had.get(key)}, now {now.get(key)})"
        for key in sorted(had.keys() | now.keys())
        if key not in but and had.get(key) != now.get(key)
    ]


def override(config: TrainConfig, assignments: list[str]) -> TrainConfig:
    """Apply ``key=value`` texts to a config.

    Raises:
        ValueError: no "=", an unknown key (the nearest are named), or a value of another type.
    """
    known = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
        if key == "stage":
            raise ValueError(
                f"stage belongs to the recipe; choose another recipe than {config.name}"
            )
        if key not in {f.name for f in fields(config)}:
            near = get_close_matches(key, known) or sorted(known)
            raise ValueError(
                f"unknown key {key!r} of recipe {config.name}; near: {', '.join(near)}"
            )
        changes[key] = _read(key, text, known[key])
    return replace(config, **changes)


def _read(key: str, text: str, kind: Any) -> Any:
    origin = get_origin(kind)
    try:
        if origin is Literal:
            if text not in get_args(kind):
                raise ValueError(f"one of {', '.join(get_args(kind))}")
            return text
        if origin is tuple:
            return tuple(int(part) for part in text.strip("()").split(",") if part.strip())
        if origin is types.UnionType:
            return None if text == "none" else _read(key, text, get_args(kind)[0])
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError) as error:
        wanted = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{key} must be {wanted}, got {text!r}") from error
