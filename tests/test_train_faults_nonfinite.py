import json
import math

import pytest
import torch

from tests.train_plants import Loud, Noted, Poisoned, Steep
from tests.train_processes import finished, newest, read_meta, run, tensors_of
from train.checkpoint import step_of
from train.report import read_log

SHARED = ("steps=6", "micro_batch=1", "keep=6")
BAD_STEP, BAD_PLACE = 3, 3
"""With two ranks and micro-batches of one, rank 1 has the places 1 and 3."""


def noted(file):
    """The lines of Noted by step and place, of pictures taken one by one."""
    lines = map(json.loads, file.read_text().splitlines())
    return {(line["step"], int(*line["places"])): line for line in lines}


def replayed(folder, step, *plants):
    started, codes = run(
        folder,
        arguments=["replay", folder / f"scenes-dino/nonfinite/step-{step:06d}.json"],
        plants=plants,
    )
    assert codes == [0], started.said()
    return [json.loads(line) for line in started.said().splitlines() if line[:1] == "{"]


@pytest.mark.parametrize(
    ("fault", "finite_loss"),
    [(Poisoned((BAD_STEP,), BAD_PLACE), False), (Steep(BAD_STEP, BAD_PLACE), True)],
    ids=["picture", "gradient"],
)
def test_no_rank_takes_a_step_that_is_not_finite_on_one(fault, finite_loss, tmp_path):
    files = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    plants = [(fault, Loud(), Noted(file)) for file in files]
    folder = finished(tmp_path, *SHARED, world=2, plants=plants)
    computed = [noted(file) for file in files]
    assert [sorted({place for _, place in lines}) for lines in computed] == [[0, 2], [1, 3]]

    # the weights that each rank begins its steps with
    before = [
        [{line["weights"] for key, line in lines.items() if key[0] == step} for step in range(1, 7)]
        for lines in computed
    ]
    assert before[0] == before[1]
    assert all(len(weights) == 1 for weights in before[0])
    assert before[0][BAD_STEP] == before[0][BAD_STEP - 1]
    assert len(set.union(*before[0])) == 5
    kept = [folder / f"checkpoints/step-{step:06d}" for step in (BAD_STEP - 1, BAD_STEP)]
    a, b = map(tensors_of, kept)
    assert all(torch.equal(a[name], b[name]) for name in a)

    rows = read_log(folder)
    assert [rows[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 1, 1, 1]
    assert ("loss" in rows[BAD_STEP]) == finite_loss
    assert "grad_norm" not in rows[BAD_STEP]
    assert all(math.isfinite(rows[step]["loss"]) for step in (1, 2, 4, 5, 6))

    files = sorted(path.name for path in (folder / "nonfinite").glob("*.json"))
    assert files == [f"step-{BAD_STEP:06d}.json"]
    about = json.loads((folder / "nonfinite" / files[0]).read_text())
    written = {
        (rank["rank"], place): name
        for rank in about["ranks"]
        for micro in rank["micro_batches"]
        for place, name in zip(micro["places"], micro["ids"], strict=True)
    }
    assert written == {
        (rank, place): computed[rank][BAD_STEP, place]["places"][str(place)]
        for rank in (0, 1)
        for place in (rank, rank + 2)
    }

    found = replayed(tmp_path, BAD_STEP, fault, Loud())
    bad = [row for row in found if not row["finite"]]
    assert [(row["rank"], row["ids"]) for row in bad] == [(1, [written[1, BAD_PLACE]])]
    assert math.isfinite(bad[0]["losses"]["loss"]) == finite_loss
    assert not math.isfinite(bad[0]["grad_norm"])
    assert len(found) == 4
    for row in found:
        (place,) = (place for (_, place), name in written.items() if [name] == row["ids"])
        if row["finite"] or finite_loss:
            assert row["losses"] == computed[row["rank"]][BAD_STEP, place]["losses"]


def test_so_many_steps_in_a_row_end_a_run_and_end_it_again(tmp_path):
    fault = Poisoned((2, 4, 5, 6), 1)
    for _ in range(2):
        started, codes = run(tmp_path, *SHARED, "nonfinite_limit=3", plants=(fault,))
        assert codes == [1], started.said()
        assert "3 steps in a row of scenes-dino were not finite, up to step 6" in started.said()
        assert str(tmp_path / "scenes-dino/nonfinite") in started.said()
    folder = started.run_folder
    assert step_of(newest(folder, pytest.fail)) == 5
    assert read_meta(newest(folder))["in_row"] == 2
    written = {path.name for path in (folder / "nonfinite").iterdir()}
    # one state serves those in a row
    assert written == {
        "step-000002", "step-000002.json", "step-000004", "step-000004.json", "step-000005.json",
        "step-000006.json",
    }  # fmt: skip
    (bad,) = (row for row in replayed(tmp_path, 6, fault) if not row["finite"])
    assert len(bad["ids"]) == 1
    # a cure is found: the same run goes on
    started, codes = run(tmp_path, *SHARED, "nonfinite_limit=3")
    assert codes == [0], started.said()
    assert read_log(folder)[6]["skipped"] == 3


def test_a_replay_without_its_state_or_file_says_what_is_missing(tmp_path):
    started, codes = run(tmp_path, arguments=["replay", tmp_path / "none.json"])
    assert codes == [1]
    assert f"{tmp_path}/none.json" in started.said()
