"""What became of ``bench qformer`` and ``bench encode``: goals and tables, from records alone."""

from collections.abc import Callable, Iterable, Sequence

from bench.records import Record
from bench.sides import (
    MIB,
    PASSES,
    Goal,
    Side,
    Sides,
    amount,
    left_out,
    not_measured,
    number,
    run_line,
    sides,
)
from bench.tables import table

OURS, OUR_ADAPTER = "ours", "ours-adapter"
ENCODING = (OURS, "ours-graph")
TURNED = ("eager", "eager-tables", "compiled", "compiled-tables")
"""RoPE and SDPA, however RoPE is written."""
COMPILED = ("compiled", "compiled-tables")
BOUNDS = ("sdpa", "sdpa-cudnn", "sdpa-flash")
"""SDPA without RoPE, by whichever backend is the fastest."""
ADAPTER = "adapter-b1-s1369"
STAGES = ("preprocess", "clip", "dino", "join + MLP", "qformer", "output")


class QFormerSide(Side):
    """Beside what others make of rotated attention, or of the adapter."""

    def best(self, variants: Sequence[str], pass_name: str, what: str = "p50_ms") -> float | None:
        """The least of a field of those variants that were timed."""
        timed = [self.of(variant, pass_name) for variant in variants]
        return min((r[what] for r in timed if r is not None and r[what] is not None), default=None)

    def over_ours(
        self, variants: Sequence[str], pass_name: str, what: str = "p50_ms"
    ) -> float | None:
        """The least of the others' ÷ ours."""
        ours = OURS if self.case.startswith("op-") else OUR_ADAPTER
        theirs, mine = self.best(variants, pass_name, what), self.best([ours], pass_name, what)
        return None if theirs is None or not mine else theirs / mine


Measure = Callable[[QFormerSide], float | None]


def _at(case: str, measure: Measure) -> Callable[[Sides], float | None]:
    return lambda found: measure(found[case]) if case in found else None


def _bound(side: QFormerSide) -> float | None:
    inverse = side.over_ours(BOUNDS, "forward")
    return None if inverse is None else 1 / inverse


def _goals() -> Iterable[Goal]:
    cases = ("op-b1-s1369", "op-b16-s1369", "op-b16-s4096")
    leads = {"forward": (2.0, 1.5, 1.3), "forward+backward": (1.7, 1.4, 1.3)}
    for name, bounds in leads.items():
        lead = lambda side, name=name: side.over_ours(TURNED, name)
        for case, least in zip(cases, bounds, strict=True):
            text = f"{name}: best of eager and compiled RoPE + SDPA ÷ ours"
            yield Goal(text, case, least, False, _at(case, lead), digits=1)
    for case, most in zip(cases, (0.7, 1.05, 1.0), strict=True):
        yield Goal("forward ÷ SDPA without RoPE", case, most, True, _at(case, _bound))
    for case in cases:
        peak = lambda side: side.over_ours(COMPILED, "forward+backward", "peak_bytes")
        text = "peak memory of forward+backward: compiled ÷ ours"
        yield Goal(text, case, 1.5, False, _at(case, peak), digits=1)
    took = lambda side: side.best([OUR_ADAPTER], "forward")
    text = "12 layers, features to embedding, in a CUDA graph"
    yield Goal(text, ADAPTER, 0.6, True, _at(ADAPTER, took), " ms", digits=1)
    for text, other, least in (
        ("eager reference ÷ ours", "eager-adapter", 3.0),
        ("torch.compile with CUDA graphs ÷ ours", "compiled-adapter", 1.5),
    ):
        lead = lambda side, other=other: side.over_ours([other], "forward")
        yield Goal(f"12 layers: {text}", ADAPTER, least, False, _at(ADAPTER, lead), digits=1)


GOALS = tuple(_goals())


def qformer_tables(records: Sequence[Record]) -> str:
    """Goals, times, memory and what they were measured on, in markdown.

    Args:
        records: of suites "qformer" and "encode", oldest first; the latest run of each case counts.
    """
    found = sides([r for r in records if r["suite"] == "qformer"], QFormerSide, [OURS, OUR_ADAPTER])
    whole = sides([r for r in records if r["suite"] == "encode"], QFormerSide, ENCODING)
    if not found and not whole:
        return not_measured(records, "qformer", "qformer encode")
    parts = [table(["goal", "case", "wanted", "measured", ""], [g.row(found) for g in GOALS])]
    parts += [_measurements(side) for side in found.values()]
    parts += [_stages(whole.values())] if whole else []
    everything = [*found.values(), *whole.values()]
    return "\n\n".join([*parts, left_out(everything), *_circumstances(everything)])


def _measurements(side: QFormerSide) -> str:
    labels = {name: record["label"] for (name, _), record in side.records.items()}
    free = {name for (name, _), record in side.records.items() if not record["rotated"]}
    rows = [
        [f"*{label}*" if name in free else label]
        + [cell for pass_name in PASSES for cell in _cells(side, name, pass_name)]
        for name, label in labels.items()
        if any(side.of(name, pass_name) for pass_name in PASSES)
    ]
    head = [f"`{side.case}`"]
    for short in ("fwd", "fwd+bwd"):
        head += [f"{short}, ms", "TB/s", "÷ ours", "peak, MiB"]
    return table(head, rows)


def _cells(side: QFormerSide, name: str, pass_name: str) -> list[str]:
    record = side.of(name, pass_name)
    if record is None:
        return ["–"] * 4
    moved, took = record["bytes"], record["p50_ms"]
    return [
        f"{took:.4f}",
        number(None if moved is None else moved / took / 1e9, 2),
        number(side.over_ours([name], pass_name), 2),
        amount(record["peak_bytes"], MIB),
    ]


def _stages(whole: Iterable[QFormerSide]) -> str:
    """Where the time goes from picture to embedding, and why that is not known of some."""
    rows, unknown = [], []
    for side in whole:
        for record in (side.of(name, "forward") for name in ENCODING):
            if record is None:
                continue
            shares = [_share(record["stages_ms"], stage) for stage in STAGES]
            took, peak = f"{record['p50_ms']:.2f}", amount(record["peak_bytes"], MIB)
            rows.append([f"`{side.case}`", record["label"], took, *shares, peak])
            if record["stages_reason"]:
                unknown.append(f"{record['label'].strip('*')}: {record['stages_reason']}.")
    head = ["picture to embedding", "", "ms", *STAGES, "peak, MiB"]
    return "\n\n".join([table(head, rows), *dict.fromkeys(unknown)])


def _share(stages: dict[str, float] | None, stage: str) -> str:
    if stages is None:
        return "–"
    return f"{stages[stage]:.2f} ({100 * stages[stage] / sum(stages.values()):.0f} %)"


def _circumstances(found: Iterable[Side]) -> list[str]:
    by_run = {side.run: next(iter(side.records.values())) for side in found}
    how = (
        "Medians of interleaved runs; attention alone and our adapter as a CUDA graph where it can "
        "be captured, the eager adapter launched anew. TB/s counts q, k, v and out (and their "
        "gradients) once; peak is above the inputs; without RoPE in italics."
    )
    return [how, *(run_line(record) for _, record in sorted(by_run.items()))]
