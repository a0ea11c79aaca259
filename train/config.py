"""What a run is made of. A run is a function in train.recipes that returns one of these."""

import json
import types
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One run of any stage; every field is written into the run's folder."""

    name: str
    stage: Literal["text", "clip", "dino", "adapter"]
    steps: int
    batch_size: int = 64
    world: Literal["small", "full"] = "small"
    muon_lr: float = 3e-3
    """For the 2-D weights of the blocks."""
    adamw_lr: float = 1e-3
    """For everything else."""
    weight_decay: float = 0.01
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = 0.998
    seed: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    sheet_every: int = 500
    out_dir: Path = Path("runs")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "sheet_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} exceeds steps {self.steps}")

    @property
    def folder(self) -> Path:
        """Where the run keeps its log, checkpoints, plots and export."""
        return self.out_dir / self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig(TrainConfig):
    """A run of the adapter through the frozen decoder."""

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
    flux: Path | None = None
    """Folder of the frozen decoder; None is what scenes-text exported below out_dir."""
    clip: Path | None = None
    """Likewise, of scenes-clip."""
    dino: Path | None = None
    """Likewise, of scenes-dino."""

    def parent(self, part: Literal["flux", "clip", "dino"]) -> Path:
        """Return the folder of a frozen part; it need not be there."""
        run = "scenes-text" if part == "flux" else f"scenes-{part}"
        return getattr(self, part) or self.out_dir / run / "export" / part


def describe(config: TrainConfig) -> str:
    """Return every field as JSON, as it is written into the run's folder."""
    return json.dumps(asdict(config), default=str, indent=2) + "\n"


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
