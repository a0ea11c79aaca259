"""The operator's cases under pytest-benchmark, to compare commits: ``pytest bench``.

Small cases on a CPU; on a GPU those with goals, too. ``--benchmark-autosave`` keeps a run,
``--benchmark-compare`` sets the next beside it. Competitors and roofs are for ``python -m bench``.
"""

from typing import Any

import pytest
import torch

from bench.cases import GOALS, SMALL, Case
from bench.measure import attention_step
from bench.suite import PASSES, REFUSALS
from bench.variants import VARIANTS, Ready

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
CASES = (*SMALL, *GOALS) if CUDA else SMALL
OURS = [name for name in VARIANTS if name.startswith("ours")]


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("variant", OURS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(benchmark: Any, case: Case, variant: str, pass_name: str) -> None:
    """One case of one implementation; what cannot run here is skipped with the reason."""
    inputs = case.inputs(torch.device("cuda" if CUDA else "cpu"))
    try:
        ready: Ready = VARIANTS[variant].prepare(case, inputs[0])
        step = attention_step(ready.attend, inputs, PASSES[pass_name])
        step()
    except REFUSALS as error:
        if variant == "ours-auto":  # that one must run anywhere
            raise
        pytest.skip(str(error))

    def whole() -> None:
        step()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"{case.name}, {pass_name}"
    benchmark(whole)
