"""Our cases under pytest-benchmark, to compare commits: ``pytest bench``.

Small cases on a CPU; on a GPU those with goals, too. ``--benchmark-autosave`` keeps a run,
``--benchmark-compare`` sets the next beside it. Competitors and roofs are for ``python -m bench``.
"""

from typing import Any

import pytest
import torch

from bench import qformer_cases, qformer_variants
from bench.cases import GOALS, SMALL, Case
from bench.measure import Graph, Step, attention_step
from bench.qformer import QFormer
from bench.qformer_cases import QFormerCase
from bench.qformer_variants import QFormerVariant, QFormerWork
from bench.suite import PASSES, REFUSALS
from bench.variants import VARIANTS, Ready

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
CASES = (*SMALL, *GOALS) if CUDA else SMALL
OURS = [name for name in VARIANTS if name.startswith("ours")]
OUR_QFORMER = [
    (case, variant)
    for case in (*qformer_cases.SMALL, *(qformer_cases.GOALS if CUDA else ()))
    for name, variant in qformer_variants.VARIANTS.items()
    if name.startswith("ours") and variant.kind == case.kind
]


def time_whole(benchmark: Any, step: Step, case_name: str, pass_name: str) -> None:
    """To the end of what a step launches."""

    def whole() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{case_name}, {pass_name}"
    benchmark(whole)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark: Any, case: Case, variant: str, pass_name: str) -> None:
    """One case of one implementation; what cannot run here is skipped with the reason."""
    inputs = case.inputs(DEVICE)
    try:
        ready: Ready = VARIANTS[variant].prepare(case, inputs[0])
        step = attention_step(ready.attend, inputs, PASSES[pass_name])
        step()
    except REFUSALS as error:
        if variant == "ours-auto":  # that one must run anywhere
            raise
        pytest.skip(str(error))
    time_whole(benchmark, step, case.name, pass_name)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(("case", "variant"), OUR_QFORMER, ids=lambda either: either.name)
def test_our_qformer(
    benchmark: Any, case: QFormerCase, variant: QFormerVariant, pass_name: str
) -> None:
    """One case of rotated attention or of the adapter; these must run anywhere."""
    suite, work = QFormer([variant], DEVICE, 1), qformer_work(case)
    step = suite.step(variant.prepare(case, work), work, PASSES[pass_name])
    step()
    captured = CUDA and suite.captures(variant)
    time_whole(benchmark, Graph(step, None) if captured else step, case.name, pass_name)


def qformer_work(case: QFormerCase) -> QFormerWork:
    """Without the yardstick, which is only for ``python -m bench``."""
    adapter: Any = case.adapter(DEVICE) if case.kind == "adapter" else None
    about = None if adapter is None else adapter.config
    channels = (0, 0) if about is None else (about.in_features, about.out_features)
    inputs = case.inputs(DEVICE, channels)
    return QFormerWork(inputs, {}, places=case.places(DEVICE), adapter=adapter)
