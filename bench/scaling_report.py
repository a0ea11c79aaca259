"""What became of ``bench scaling``: a table, from records alone."""

from collections.abc import Sequence

from bench.records import Record
from bench.sides import number
from bench.tables import table

MB = 1e6


def scaling_tables(records: Sequence[Record]) -> str:
    """Bytes and overlap by number of ranks, in markdown.

    Args:
        records: of suite "scaling", oldest first; the latest of each number of ranks counts.
    """
    timed = {record["ranks"]: record for record in records if record["status"] == "ok"}
    if not timed:
        return (
            "Ranks: not measured, no record in bench/results/scaling.jsonl yet; "
            "`python -m bench scaling` takes them on any machine."
        )
    rows = [_row(timed[ranks]) for ranks in sorted(timed)]
    head = ["ranks, DDP over gloo on a CPU", "MB sent a step", "by the model", "÷ model"]
    head += ["step alone, ms", "all-reduce, ms", "both, ms", "hidden", "by the model"]
    return f"{table(head, rows)}\n\n{_circumstances([timed[r] for r in sorted(timed)])}"


def _row(record: Record) -> list[str]:
    sent, model = record["sent_bytes"], record["sent_model"]
    several = record["ranks"] > 1
    return [
        str(record["ranks"]),
        "not available" if sent is None else f"{sent / MB:.3f}",
        f"{model / MB:.3f}",
        number(None if sent is None or not model else sent / model, 3),
        _ranks(record["rank_alone_ms"]),
        f"{record['reduce_ms']:.0f}" if several else "–",
        _ranks(record["rank_step_ms"]),
        number(record["overlap"], 2),
        number(record["overlap_model"], 2),
    ]


def _ranks(times: Sequence[float]) -> str:
    """Of each rank."""
    return ", ".join(f"{ms:.0f}" for ms in times)


def _circumstances(timed: Sequence[Record]) -> str:
    runs = sorted({(r["run"], r["processor"], r["cores"], r["torch"], r["commit"]) for r in timed})
    own = " and ".join(f"{r['loopback_ms']:.0f} ms for {r['ranks']}" for r in timed[-2:])
    size, parts = timed[0]["gradient_bytes"] / MB, len(timed[0]["bucket_bytes"])
    told = "; ".join(
        f"run {run}: {processor}, {cores} cores, torch {torch}, commit {commit}"
        for run, processor, cores, torch, commit in runs
    )
    return (
        f"A scenes-sized adapter through its frozen decoder, {size:.2f} MB of gradient in {parts} "
        "buckets, every rank a process with one thread; medians, of each rank where there are "
        "several numbers. Bytes are those of the loopback interface, headers and all; the model is "
        "2 (W − 1) times the gradient, of W ranks together. Ranks share cores and loopback is fast "
        f"({own} ranks), so devices and network are paced by waiting: {timed[0]['layer_ms']:.0f} "
        "ms more for the backward of each of four layers, and a link that takes "
        f"{timed[0]['link_ms']:.0f} ms for all buckets. Hidden is (alone + all-reduce − both) ÷ "
        "all-reduce of the slowest rank in each turn; by the model, all but what is left when the "
        "backward ends and each bucket sets out as soon as it is ready. "
        f"{told[0].upper()}{told[1:]}."
    )
