"""The claims of the work, tested in the world of scenes: ``python -m bench claims``.

Some claims want adapters that are trained for them, others ask the shipped model alone. Every
record holds one variant and seed, with numbers of each scene; bench.claims_report makes verdicts of
all records that fit together, so that later runs extend earlier ones.
"""

import json
import math
import time
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.circumstances import circumstances
from bench.claims_list import CLAIMS
from bench.claims_measure import Columns, Measure
from bench.claims_report import verdict_lines
from bench.claims_training import BLIND, PLANS, TRAINED, Plan, Trainer, blinded, save_blind_dino
from bench.command import current_device
from bench.measure import Deadline
from bench.quality import DIGITS, Suite
from bench.records import Record, append_record, read_records
from sda_fast.adapter import SemanticAdapter
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_folder import find_root
from sda_fast.weights import digest

PROTOCOL = 1
"""Counted up when records of what is measured no longer go with those of before."""
SHIPPED = {
    "rules": "rules",
    "interpolation": "interpolation",
    "text-space": "probe",
    "mixing": "mixing",
}
"""Claims that ask the shipped model alone, by the method of Measure that does."""
RESERVE_S = 60.0
"""Kept of the time for what follows a training: it is measured."""


@dataclass(frozen=True, slots=True)
class Bench:
    """The shipped model, how much is done with it, and where it goes.

    Attributes:
        measure: of the model.
        root: folder of the model.
        work: folder of trainings.
        file: of the records.
        about: circumstances of the run.
    """

    measure: Measure
    root: Path
    work: Path
    file: Path
    about: Record

    @property
    def plan(self) -> Plan:
        """How much is trained and measured."""
        return self.measure.plan

    def setting(self, trained: bool) -> Record:
        """What records must share to be compared."""
        pipe, plan = self.measure.pipe, self.plan
        models = [pipe.adapter.encoder]
        models += [] if trained else [pipe.adapter, pipe.flux.text_encoder_2]
        shared = {
            "protocol": PROTOCOL,
            "decoder": digest(pipe.flux.transformer)[:DIGITS],
            "reader": digest(*models)[:DIGITS],
            "scenes": plan.scenes,
            "denoise": plan.denoise,
        }
        return shared | ({"steps": plan.steps, "batch": plan.batch} if trained else {})

    def record(self, variant: str, seed: int, columns: Columns, began: float) -> Record:
        """Append what was measured since a moment of time.perf_counter."""
        record = {
            "suite": "claims",
            "variant": variant,
            "seed": seed,
            "setting": self.setting(variant in TRAINED),
            "scenes": columns,
            "seconds": round(time.perf_counter() - began, 1),
            **self.about,
        }
        append_record(self.file, record)
        print(f"{variant}, seed {seed}: {record['seconds']:.0f} s", flush=True)
        return record

    def done(self) -> set[tuple[str, int]]:
        """Variants and seeds that there are records of already."""
        records = read_records(self.file) if self.file.is_file() else []
        settings = [_key(self.setting(trained)) for trained in (True, False)]
        return {(r["variant"], r["seed"]) for r in records if _key(r["setting"]) in settings}


def run(bench: Bench, claims: list[str], deadline: Deadline) -> list[str]:
    """Measure what claims need and is not there yet, a seed of everything before the next.

    Returns:
        What was not measured, and why.
    """
    bench.measure.pipe.flux.set_progress_bar_config(disable=True)
    done = bench.done()
    seeds = range(bench.plan.seeds)
    wanted = dict.fromkeys(v for name in claims for v in CLAIMS[name].variants if v in TRAINED)
    missing = [(v, seed) for seed in seeds for v in wanted if (v, seed) not in done]
    faults = []
    with _trainer(bench, deadline, blind=(BLIND in wanted)) as trainer:
        trainings = {trainer.train(*job): job for job in missing}
        for seed in seeds:
            for name in claims:
                variants = CLAIMS[name].variants
                if name not in SHIPPED or all((v, seed) in done for v in variants):
                    continue
                if deadline.left() <= 0:
                    faults.append(f"{name}, seed {seed}: no time was left")
                    continue
                began = time.perf_counter()
                found = getattr(bench.measure, SHIPPED[name])(seed)
                for variant, columns in found.items():
                    bench.record(variant, seed, columns, began)
        for training in as_completed(trainings):
            try:
                _measure_trained(bench, *trainings[training], training.result())
            except (OSError, RuntimeError, ValueError) as error:
                variant, seed = trainings[training]
                faults.append(f"{variant}, seed {seed}: {error}")
    return faults


def _measure_trained(bench: Bench, variant: str, seed: int, folder: Path) -> None:
    began = time.perf_counter()
    shipped = bench.measure.pipe.adapter
    adapter: Any = SemanticAdapter.from_pretrained(folder).eval()
    encoder = blinded(shipped.encoder) if variant == BLIND else shipped.encoder
    adapter.set_encoder(encoder)
    adapter.to(shipped.device)
    bench.record(variant, seed, bench.measure.adapter(adapter, seed), began)


def _trainer(bench: Bench, deadline: Deadline, blind: bool) -> Trainer:
    """Trainings in a folder of their own for each model and plan."""
    plan, pipe = bench.plan, bench.measure.pipe
    name = f"{bench.setting(trained=True)['decoder']}-{plan.steps}x{plan.batch}"
    parts = {part: bench.root / part for part in ("flux", "clip", "dino")}
    if blind:
        parts["blind"] = save_blind_dino(pipe.adapter.encoder, bench.work / name / "blind")
    early = Deadline(deadline.end - RESERVE_S)
    return Trainer(plan, parts, bench.work / name, pipe.adapter.device, early)


def choose(text: str) -> list[str]:
    """Claims by name, separated by commas; all for "all".

    Raises:
        ValueError: there is none of a name.
    """
    chosen = list(CLAIMS) if text == "all" else text.split(",")
    unknown = [name for name in chosen if name not in CLAIMS]
    if unknown:
        raise ValueError(f"claims must be of {', '.join(CLAIMS)}, got {', '.join(unknown)}")
    return chosen


def _key(setting: Record) -> str:
    return json.dumps(setting, sort_keys=True)


def main(
    claims: Annotated[str, typer.Option(help=f"Of {', '.join(CLAIMS)}; or all.")] = "all",
    budget: Annotated[float, typer.Option(help="Of steps; below 1 of scenes, too.")] = 1.0,
    seeds: Annotated[int, typer.Option(help="Of each variant; more are added later.")] = 3,
    model: Annotated[str, typer.Option(help='"scenes", or a pipeline folder.')] = "scenes",
    work: Annotated[Path, typer.Option(help="Folder of trainings.")] = Path("out/claims"),
    out: Annotated[Path, typer.Option(help="Folder; records go to claims.jsonl in it.")] = Path(
        "bench/results"
    ),
    limit_s: Annotated[
        float, typer.Option(help="Stop after so many seconds; the same command goes on.")
    ] = math.inf,
    commit: Annotated[str, typer.Option(help="Of the code, where git cannot tell.")] = "",
) -> None:
    """Answer each claim by what was measured: on a CPU in an hour, on an H100 in nine minutes."""
    deadline = Deadline.after(limit_s)
    device = current_device()
    try:
        chosen = choose(claims)
        plan = PLANS[device.type].scaled(budget, seeds)
        root = find_root(model).absolute()
        pipe = SemanticPipeline.from_pretrained(model).to(device)
        suite = Suite(pipe, None, plan.scenes, plan.seeds, plan.denoise, 0)
        suite.check()
        about = circumstances(device)
        if commit and about["commit"] == "unknown":
            about["commit"] = commit
        measure = Measure(pipe, suite.world, plan)
        bench = Bench(measure, root, work.absolute(), out / "claims.jsonl", about)
        bench.done()  # a torn file is refused before anything is trained
    except (OSError, ValueError) as error:
        print(f"bench claims: {error}")
        raise typer.Exit(2) from error
    print(f"{', '.join(chosen)}: {asdict(plan)}", flush=True)
    faults = run(bench, chosen, deadline)
    records = read_records(bench.file) if bench.file.is_file() else []
    print("\n".join([*verdict_lines(records, chosen), *faults]))
    if faults:
        raise typer.Exit(1)
