"""What a recipe would take on so many GPUs: from measured records where there are any, else said.

Every number says whether it was measured (by which record), modelled (from what) or assumed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sda_fast.cost import (
    adapter_flops,
    all_reduce_bytes,
    all_reduce_seconds,
    flux_flops,
    vision_flops,
)
from train.batch import micro_batches
from train.config import AdapterConfig, FluxConfig
from train.plan_memory import Models, Part, memory_parts, models_of, side_of, trained_numbers

RESULTS = Path(__file__).parent.parent / "bench" / "results"
PEAK = 989e12
"""Dense bf16 FLOP/s of an H100 SXM. Source: its data sheet."""
LATENCY_S = 10e-6
"""Of a message between two GPUs, assumed."""
BUCKET_BYTES = 25 * 2**20
"""Of gradients that DDP sends together; source: torch's DistributedDataParallel."""
GIB = 2**30
NOT_MEASURED = "not measured: bench/h100.sh training takes it, --mfu 0.5 assumes it"
NOT_TAKEN = "not measured: no benchmark is of scenes, --mfu 0.5 assumes it"


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What a recipe does not say.

    Attributes:
        gpus: how many.
        pictures: to train on; None is all steps of the recipe.
        price: of a GPU hour, in any currency; None leaves costs out.
        memory: of a GPU, GiB.
        mfu: share of PEAK that FLUX's forward and gradient reach over a whole step, where no record
            says it; None assumes nothing.
        bandwidth: GB/s that a GPU sends to the others while it receives as much.

    Raises:
        ValueError: a number that cannot be.
    """

    gpus: int = 1
    pictures: float | None = None
    price: float | None = None
    memory: float = 80.0
    mfu: float | None = None
    bandwidth: float = 50.0

    def __post_init__(self) -> None:
        for name in ("gpus", "pictures", "price", "memory", "mfu", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {value}")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"mfu must be a share of at most 1, got {self.mfu}")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and how it is known.

    Attributes:
        value: in the unit that its name says.
        source: begins with "measured", "modelled" or "assumed".
    """

    value: float
    source: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Of a recipe on some GPUs.

    Attributes:
        config: of the recipe.
        about: what was asked.
        micro: pictures of a micro-batch.
        turns: micro-batches of a step, one after the other.
        parts: of a GPU's memory.
        largest: micro-batch that fits.
        measured: lines on memory that records say.
        one_gpu: pictures a second of one GPU; None where nobody knows.
        sent_bytes: by one GPU in a step.
        exposed_s: seconds of a step that only wait for other GPUs; at most, if speed is unknown.
        pictures_per_s: of all GPUs; None where nobody knows.
    """

    config: AdapterConfig
    about: Assumptions
    micro: int
    turns: int
    parts: list[Part]
    largest: int
    measured: list[str]
    one_gpu: Estimate | None
    sent_bytes: float
    exposed_s: Estimate
    pictures_per_s: Estimate | None

    @property
    def held_bytes(self) -> float:
        """Of a GPU's memory at the peak."""
        return sum(part.fixed + self.micro * part.each for part in self.parts)

    @property
    def pictures(self) -> float:
        """To train on."""
        return self.about.pictures or self.config.steps * self.config.batch_size

    @property
    def hours(self) -> float | None:
        """Until then."""
        speed = self.pictures_per_s
        return None if speed is None else self.pictures / speed.value / 3600


def make_plan(config: AdapterConfig, about: Assumptions, results: Path = RESULTS) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        about: GPUs and what else the config does not say.
        results: folder of the benchmark's records.

    Raises:
        ValueError: the batch cannot be shared out over the GPUs.
    """
    micro = config.micro_batch or max(1, config.batch_size // about.gpus)
    turns = len(micro_batches(config.batch_size, micro, 0, about.gpus))
    models = models_of(config)
    parts = memory_parts(config, models, about.gpus)
    room = about.memory * GIB - sum(part.fixed for part in parts)
    largest = max(0, int(room // sum(part.each for part in parts)))
    speed = one_gpu_speed(config, models, about, results)
    sent, exposed, total = _together(config, models, about, speed, micro * turns)
    lines = [*memory_records(config, results)]
    return Plan(config, about, micro, turns, parts, largest, lines, speed, sent, exposed, total)


def one_gpu_speed(
    config: AdapterConfig, models: Models, about: Assumptions, results: Path
) -> Estimate | None:
    """Pictures a second of one GPU, from the best there is: a step, FLUX alone, an assumption."""
    record = latest(results / "training.jsonl", config, "training")
    if record is not None and record.get("pictures_per_s"):
        return Estimate(record["pictures_per_s"], f"measured: {origin(record)}")
    of_flux = flux_work(config, models)
    record = latest(results / "flux-train.jsonl", config, "flux-train")
    if record is not None:
        flops_per_s = record["flops"] / record["p50_ms"] * 1e3
        source = f"modelled: FLUX as {origin(record)}; encoders and adapter at its FLOP/s"
        speed = flops_per_s / (of_flux + other_work(models))
        return Estimate(speed, f"{source}; without the VAE and the optimizer")
    if about.mfu is None:
        return None
    source = f"modelled: {of_flux / 1e12:.1f} TFLOP a picture through FLUX at {about.mfu:.0%} of "
    return Estimate(about.mfu * PEAK / of_flux, f"{source}{PEAK / 1e12:.0f} TFLOP/s, assumed")


def flux_work(config: AdapterConfig, models: Models) -> float:
    """FLOPs of FLUX's forward and gradient for a square picture."""
    tokens = models.image_tokens(side_of(config))
    return flux_flops(models.transformer.config, models.positions, tokens, backward=True)


def other_work(models: Models) -> float:
    """FLOPs of encoders and adapter for a square picture."""
    towers = [vision_flops(tower, models.patches) for tower in (models.clip, models.dino)]
    return sum(towers) + adapter_flops(models.adapter, models.patches, backward=True)


def _together(
    config: AdapterConfig, models: Models, about: Assumptions, speed: Estimate | None, share: int
) -> tuple[float, Estimate, Estimate | None]:
    """(bytes that a GPU sends in a step, seconds of it that are exposed, pictures/s of all)."""
    gpus, rate = about.gpus, about.bandwidth * 1e9
    payload = 4 * trained_numbers(config, models)
    buckets = -(-payload // BUCKET_BYTES)
    last = all_reduce_seconds(BUCKET_BYTES, gpus, rate, LATENCY_S)
    micro = config.micro_batch or share
    hidden = late = 0.0
    if speed is not None:
        # gradients leave while the adapter's backward, two thirds of its work, goes on
        work = adapter_flops(models.adapter, models.patches, backward=True) * 2 / 3
        hidden = micro * work / (speed.value * flux_work(config, models))
    exposed = max(last, buckets * last - hidden)
    source = (
        f"modelled: ring all-reduce of {payload / 1e9:.2f} GB in {buckets * last * 1e3:.1f} ms at "
        f"{about.bandwidth:g} GB/s, assumed"
    )
    if speed is not None:
        source += f"; {min(hidden, buckets * last) * 1e3:.1f} ms of it behind the backward"
    else:
        source += ", at most: what hides behind the backward is not known"
    # sharded weights come once for the forward and once for the backward of each micro-batch
    gathered = 0.0
    if isinstance(config, FluxConfig) and config.shard_flux:
        gathered = 2 * (gpus - 1) / gpus * models.transformer.nbytes
        late = gathered / rate - (micro / speed.value if speed else 0)
        late = max(0.0, late) * share / micro
        source += f"; {late:.2f} s for FLUX's weights, which come later than they are used"
    sent = all_reduce_bytes(payload, gpus) + share / micro * gathered
    waited = Estimate(exposed + late, source)
    if speed is None:
        return sent, waited, None
    total = gpus * share / (share / speed.value + waited.value)
    return sent, waited, Estimate(total, "modelled: GPUs in step, and what they wait for")


def latest(path: Path, config: AdapterConfig, suite: str) -> dict[str, Any] | None:
    """The last record of ours on a GPU, of pictures of the run's size and its recompute."""
    if not isinstance(config, FluxConfig):
        return None
    found = None
    for record in read_records(path):
        name = str(record.get("variant", ""))
        policy = record.get("recompute") or name.removeprefix("ours-")
        fits = record.get("resolution", _pixels(record)) == config.resolution
        alike = policy in (config.recompute, "ours", "trainer")
        good = record.get("status") == "ok" and record.get("gpu") and record.get("p50_ms")
        mine = name.startswith("ours") and record.get("suite") == suite
        if fits and alike and good and mine:
            found = record
    return found


def _pixels(record: Mapping[str, Any]) -> int | None:
    """Of a case named as ``train-512-b8``."""
    sides = [part for part in str(record.get("case", "")).split("-") if part.isdecimal()]
    return int(sides[0]) if len(sides) == 1 else None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a results file that are JSON objects; none where there is no file."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def memory_records(config: AdapterConfig, results: Path) -> Iterator[str]:
    """What records say of memory, in words."""
    record = latest(results / "training.jsonl", config, "training")
    took = None if record is None else _memory(record)
    if record is not None and took is not None:
        yield f"{took:.1f} GiB at micro-batch {record['batch']}, measured: {origin(record)}"
    found = [
        record
        for record in read_records(results / "flux-train.jsonl")
        if record.get("largest_batch") and _pixels(record) == side_of(config) and record.get("gpu")
    ]
    if found:
        most, by = found[-1]["largest_batch"], found[-1].get("largest_batch_by")
        yield f"largest batch through FLUX alone {most} ({by}), measured: {origin(found[-1])}"


def _memory(record: Mapping[str, Any]) -> float | None:
    """GiB of a whole step: the trainer's own word, or the models' and what a step adds to them."""
    held, peak = record.get("held_bytes"), record.get("peak_bytes")
    if record.get("memory_gib"):
        return record["memory_gib"]
    return None if held is None or peak is None else (held + peak) / GIB


def origin(record: Mapping[str, Any]) -> str:
    """Which record, in words."""
    tokens = record.get("num_txt")
    about = [
        f"{record.get('suite')} {record.get('case')}, {record.get('variant')}",
        *([f"{tokens} positions"] if tokens else []),
        str(record.get("gpu")),
        f"commit {record.get('commit')}",
        str(record.get("run", ""))[:10],
    ]
    return ", ".join(about)


def print_plan(config: AdapterConfig, about: Assumptions, results: Path = RESULTS) -> None:
    """Make a plan and print it; see ``make_plan``."""
    print("\n".join(lines_of(make_plan(config, about, results))))


def lines_of(plan: Plan) -> Iterator[str]:
    """A plan in words."""
    config, about = plan.config, plan.about
    side = side_of(config)
    gpus = "1 GPU" if about.gpus == 1 else f"{about.gpus} GPUs"
    unknown = NOT_MEASURED if isinstance(config, FluxConfig) else NOT_TAKEN
    yield (
        f"{config.name} on {gpus} of {about.memory:g} GiB: {side} x {side} pixels, "
        f"{config.batch_size} pictures a step = {gpus} x {plan.turns} x {plan.micro}"
    )
    yield "\nmemory of a GPU"
    for part in plan.parts:
        held = (part.fixed + plan.micro * part.each) / GIB
        yield _row(part.what, f"{held:.2f} GiB", part.source)
    yield _row("all", f"{plan.held_bytes / GIB:.2f} GiB", "modelled: the sum")
    for line in plan.measured:
        yield f"  {line}"
    fits = "" if plan.micro <= plan.largest else f"; micro-batch {plan.micro} does not fit"
    yield _row("largest micro-batch", str(plan.largest), f"modelled: by the parts above{fits}")
    yield "\nspeed"
    yield _known("alone", plan.one_gpu, "{:.2f} pictures/s", unknown)
    yield _row("sent by a GPU in a step", f"{plan.sent_bytes / 1e9:.2f} GB", "modelled: a ring")
    yield _known("waited for others in a step", plan.exposed_s, "{:.3f} s", unknown)
    yield _known(f"{gpus} together", plan.pictures_per_s, "{:.1f} pictures/s", unknown)
    yield "\ntime and cost"
    given = "asked for" if about.pictures else f"{config.steps:,} steps"
    yield _row("pictures", f"{plan.pictures:,.0f}", given)
    hours = plan.hours
    if hours is None:
        yield _row("hours", "–", unknown)
        return
    yield _row("hours", f"{hours:,.1f}", "modelled: pictures / speed; no evaluation, no restart")
    yield _row("GPU hours", f"{hours * about.gpus:,.0f}", "modelled")
    if about.price is not None:
        cost = hours * about.gpus * about.price
        yield _row("cost", f"{cost:,.0f}", f"modelled: at {about.price:g} a GPU hour")


def _known(what: str, estimate: Estimate | None, form: str, unknown: str) -> str:
    if estimate is None:
        return _row(what, "–", unknown)
    return _row(what, form.format(estimate.value), estimate.source)


def _row(what: str, amount: str, source: str) -> str:
    return f"  {what:49} {amount:>17}  {source}"
