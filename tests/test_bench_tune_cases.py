"""Which cases ``bench tune`` takes, by name, group or pattern."""

import pytest
import torch

from bench import tune
from bench.cases import SMALL, select
from bench.tune import chosen

from .test_bench_tune import CPU


def chosen_anywhere(text):
    return select(text, tune.GROUPS, tune.CASES)


def test_the_small_cases_are_one_of_each_operator():
    found = [type(case) for case in chosen_anywhere(tune.SMALL)]
    assert found == list(tune.TUNINGS)


def test_the_interpreter_is_for_float32_on_a_cpu(monkeypatch):
    monkeypatch.setattr(tune, "interpreted", lambda: True)
    with pytest.raises(ValueError, match=r"needs float32 cases, got flux-1024-b1-tree32\.8\.4, op"):
        chosen(tune.DEFAULT, None, CPU)
    with pytest.raises(ValueError, match="TRITON_INTERPRET is set: without it"):
        chosen(tune.DEFAULT, None, torch.device("cuda"))
    cases = chosen("small-?x*", "64,16", CPU)
    assert [c.head_dim for c in cases] == [64] * 2 + [16] * 2
    assert [c.name for c in cases[:2]] == [c.name for c in SMALL[:2]]


def test_the_default_cases_are_flux_s_and_the_adapter_s():
    found = [c.name for c in chosen_anywhere(tune.DEFAULT)]
    assert [name for name in found if name.startswith("flux")] == [
        f"flux-{size}-tree32.8.4" for size in ("1024-b1", "2048-b1", "512-b1", "1024-b4")
    ]
    assert [name for name in found if name.startswith("op")] == [
        "op-b1-s1369", "op-b16-s1369", "op-b16-s4096"
    ]  # fmt: skip
    assert found == tune.DEFAULT.split(",")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("op-b64-*,flux-512-b8-tree16",
         ["op-b64-s729", "op-b64-s1369", "op-b64-s4096", "flux-512-b8-tree16"]),
        ("op", [f"op-b{b}-s{s}" for s in (729, 1369, 4096) for b in (1, 4, 16, 64)]),
        ("small", [*(c.name for c in SMALL), "small-op-b1-s16", "small-op-b2-s36"]),
    ],
)  # fmt: skip
def test_cases_of_both_operators_have_names(text, names):
    assert [c.name for c in chosen_anywhere(text)] == names
    assert {"op-b16-s1369", "flux-1024-b1-tree32.8.4"} < {c.name for c in chosen_anywhere("goals")}
    with pytest.raises(ValueError, match=r"of goals, flux, op, small or names like .*, got 'adapt"):
        chosen_anywhere("adapter-b1-s1369")
