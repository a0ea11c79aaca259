"""How well embeddings are edited by words: ``python -m bench edit``.

Unseen scenes with instructions whose outcome is known exactly; every edited picture is parsed and
judged by ``sda_fast.scenes.edit_score``, editors beside other ways to edit and beside the ceilings.
"""

import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from bench.bootstrap import bootstrap
from bench.edit_cases import EditCase, EditSuite, case_names, choose
from bench.edit_report import BASELINES, SHIPPED, edit_tables
from bench.progress import bars
from bench.quality import BATCH, DIGITS, SEED_STEP, Suite
from bench.records import Record, append_record, commit, run_id, versions
from sda_fast.editors.result import Editor
from sda_fast.editors.t5 import EmbeddingEditor
from sda_fast.editors.text import InstructionEncoder
from sda_fast.pipeline import SemanticPipeline
from sda_fast.pipeline_parts import check_editor, open_editor
from sda_fast.scenes.edit_score import EditSums, edit_rates, score_edits
from sda_fast.scenes.edits import OPERATIONS
from sda_fast.weights import digest

INVERTED = 32
"""One scene in so many has the prompts of its pictures inverted."""
CHAINED = 4
"""There is one chain for so many scenes."""


def measure(
    case: EditCase, seeds: int, on_batch: Callable[[int], object]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw, parse and judge a case.

    Args:
        case: what to draw.
        seeds: noise seeds of each scene.
        on_batch: told the number of pictures just judged.

    Returns:
        Metrics of all edits, and {operation: {"n", "metrics"}}. Metrics are those of
        ``edit_rates`` and ``same``, each {"mean", "low", "high"} of a 95 % interval over scenes.
    """
    count = len(case.edits)
    sums = torch.zeros(count, len(astuple(EditSums())), dtype=torch.float64)
    for draw in range(seeds):
        for first in range(0, count, BATCH):
            rows = slice(first, min(first + BATCH, count))
            noise = [draw * SEED_STEP + i for i in range(rows.start, rows.stop)]
            after, before = case.after(rows, noise), case.before(rows, noise)
            scored = score_edits(case.edits[rows], after, before)
            sums[rows] += torch.tensor([astuple(one) for one in scored], dtype=torch.float64)
            on_batch(len(noise))
    same = torch.full((count,), torch.nan) if case.same is None else case.same
    table = torch.cat([sums, (same * seeds)[:, None]], dim=1)
    operations: dict[str, Any] = {}
    for operation in OPERATIONS:
        mine = [i for i, edit in enumerate(case.edits) if edit.operation == operation]
        if mine:
            operations[operation] = {"n": len(mine), "metrics": intervals(table[mine])}
    return intervals(table), operations


def intervals(table: Tensor) -> dict[str, dict[str, float]]:
    """Metrics of edits: [edits, fields of EditSums and the share of same positions] f64."""

    def rates(sums: Any) -> dict[str, float]:
        return edit_rates(EditSums(*sums[:-1])) | {"same": sums[-1] / sums[0]}

    return bootstrap(table, rates)


def run(suite: EditSuite, out: Path) -> list[Record]:
    """Measure every case, appending each record to out as soon as it is there."""
    drawer, adapter = suite.drawer, suite.drawer.pipe.adapter
    # asked once: the results file itself may be tracked
    about = {"versions": versions(), "commit": commit(), "run": run_id()}
    about["decoder"] = digest(drawer.pipe.flux.transformer)[:DIGITS]
    about["reader"] = digest(adapter, adapter.encoder)[:DIGITS]
    about |= {"scenes": drawer.scenes, "seeds": drawer.seeds, "steps": drawer.steps}
    drawer.pipe.flux.set_progress_bar_config(disable=True)
    records = []
    with bars() as progress:
        start = time.perf_counter()
        for case in suite.cases(progress):
            name = f"{case.part}/{case.variant}" + (f" {case.step}" if case.step else "")
            task = progress.add_task(name, total=len(case.edits) * drawer.seeds)
            told = lambda number, task=task: progress.advance(task, number)
            metrics, operations = measure(case, drawer.seeds, told)
            record = {
                "suite": "edit",
                "part": case.part,
                "variant": case.variant,
                "step": case.step,
                "n": len(case.edits),
                "metrics": metrics,
                "operations": operations,
                "seconds": round(time.perf_counter() - start, 1),
                **case.about,
                **about,
            }
            append_record(out, record)
            records.append(record)
            start = time.perf_counter()
    return records


def main(
    model: Annotated[str, typer.Option(help='"scenes", or a pipeline folder.')] = "scenes",
    editor: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of one more editor, instructions/ beside it."),
    ] = None,
    variants: Annotated[
        str, typer.Option(help="Names or patterns of PART/NAME, as caption,test/*,chains/shipped.")
    ] = "all",
    scenes: Annotated[int, typer.Option(min=1, help="Unseen scenes of the test split.")] = 512,
    seeds: Annotated[int, typer.Option(min=1, help="Noise seeds of each scene.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of denoising.")] = 20,
    out: Annotated[Path, typer.Option(help="Records are appended here.")] = Path(
        "bench/results/edit.jsonl"
    ),
) -> None:
    """Edit unseen scenes by words, parse what came out, append one record a part and variant."""
    try:
        pipe = SemanticPipeline.from_pretrained(model)
        drawer = Suite(pipe, None, scenes, seeds, steps, max(1, scenes // INVERTED))
        drawer.check()
        editors = load_editors(editor or [], pipe)
        chosen = choose(variants, case_names(editors))
    except (OSError, ValueError) as error:
        print(f"bench edit: {error}")
        raise typer.Exit(2) from error
    suite = EditSuite(drawer, editors, chosen, max(1, scenes // CHAINED))
    print(edit_tables(run(suite, out)))


def load_editors(given: list[str], pipe: SemanticPipeline) -> dict[str, Editor]:
    """The pipeline's own editor, if it has one, and those of a list, by name.

    Instructions are read by what lies in ``instructions/`` beside a folder; without that, by what
    reads for the pipeline's own editor; without one, by the decoder's text encoder.

    Args:
        given: NAME=FOLDER each.
        pipe: that they must fit.

    Raises:
        ValueError: a part is no NAME=FOLDER, a name is taken, or an editor does not fit.
        OSError: a folder is not there.
    """
    own, flux = pipe.editor, pipe.flux
    editors: dict[str, Editor] = {} if own is None else {SHIPPED: own}
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path or "/" in name or "," in name:
            raise ValueError(f"editor must be NAME=FOLDER, got {text!r}")
        if name in {*editors, *BASELINES, SHIPPED}:
            raise ValueError(f"editor must have a name of its own, got {name!r} again")
        found = open_editor(path)
        if isinstance(found, EmbeddingEditor):
            beside: Any = Path(path).parent / "instructions"
            reader = getattr(own, "text_encoder", None)
            if beside.is_dir():
                reader = InstructionEncoder.from_pretrained(beside)
            reader = reader or InstructionEncoder(flux.tokenizer_2, flux.text_encoder_2)
            found.set_text_encoder(reader)
        check_editor(found, pipe.adapter)
        editors[name] = found
    return editors
