"""Editors on a GPU: what they write as CUDA graphs is held to the same yardstick as all else."""

from dataclasses import replace

import pytest
import torch

from bench.edit_speed import SMALL, VARIANTS, EditSpeed, EditSpeedCase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "case",
    [replace(SMALL[0], dtype=torch.bfloat16), EditSpeedCase("t5-base", 2)],
    ids=lambda case: case.name,
)
def test_every_way_to_write_is_right(case):
    device = torch.device("cuda", torch.cuda.current_device())
    records = list(EditSpeed(list(VARIANTS.values()), device, 2).measure(case))
    assert [(r["variant"], r["status"], r["reason"]) for r in records] == [
        (name, "ok", None) for name in VARIANTS
    ]
    assert all(r["graph"] == r["variant"].endswith("-graph") for r in records)
