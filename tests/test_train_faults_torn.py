import json
import shutil

import pytest
import torch

from tests.train_processes import (
    Run,
    assert_equal_runs,
    finished,
    losses_of,
    newest,
    run,
    steps_there,
    tree_of,
)
from train.checkpoint import (
    Saver,
    check_checkpoint,
    newest_valid,
    read_meta,
    read_state,
    step_of,
    write_checkpoint,
)
from train.config import AdapterConfig, describe
from train.lineage import check_resume
from train.recipes import RECIPES
from train.report import read_log


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that keeps a checkpoint of each step, and looks at itself every third."""
    return finished(tmp_path_factory.mktemp("unbroken"), "keep=8", "eval_every=3")


def flipped(path):
    """One bit in the middle of the weights is another."""
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(name, share):
    """The end of a file is missing."""

    def tear(path):
        file = next(path.glob(name))
        data = file.read_bytes()
        file.write_bytes(data[: int(share * len(data))])

    return tear


def without(name):
    """A file is missing."""
    return lambda path: next(path.glob(name)).unlink()


def short(path):
    """The manifest has lost all lines but the first."""
    file = path / "SHA256SUMS"
    file.write_text(file.read_text().splitlines(keepends=True)[0])


def empty(path):
    """Nothing is left but the folder."""
    shutil.rmtree(path)
    path.mkdir()


def a_file(path):
    """It is no folder."""
    shutil.rmtree(path)
    path.write_text("not a checkpoint")


TEARS = {
    "a flipped bit": flipped,
    "weights cut off": cut("*.safetensors", 0.9),
    "no weights": without("*.safetensors"),
    "no meta": without("meta.json"),
    "meta cut off": cut("meta.json", 0.5),
    "no manifest": without("SHA256SUMS"),
    "a line of the manifest cut off": cut("SHA256SUMS", 0.6),
    "lines of the manifest lost": short,
    "an empty manifest": cut("SHA256SUMS", 0),
    "an empty folder": empty,
    "a file": a_file,
}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS.keys())
def test_a_torn_checkpoint_is_named_and_passed_over(tear, tmp_path):
    for step in (1, 2):
        write_checkpoint(tmp_path, {"model/a": torch.arange(99.0)}, {"step": step})
    assert newest_valid(tmp_path, pytest.fail).name == "step-000002"
    tear(tmp_path / "step-000002")
    told = []
    assert newest_valid(tmp_path, told.append).name == "step-000001"
    (line,) = told
    assert line.startswith(f"{tmp_path / 'step-000002'} is passed over: ")
    tear(tmp_path / "step-000001")
    assert newest_valid(tmp_path, told.append) is None


def test_a_run_goes_on_from_the_newest_that_is_whole(unbroken, tmp_path):
    folder = tmp_path / "scenes-dino"
    shutil.copytree(unbroken, folder)
    checkpoints = folder / "checkpoints"
    for step, name in ((8, "a flipped bit"), (7, "meta cut off"), (6, "an empty folder")):
        TEARS[name](checkpoints / f"step-{step:06d}")
    foreign = ["step-best", "step-000005.bak", "step-9", "notes.txt"]
    for name in foreign:
        shutil.copytree(checkpoints / "step-000003", checkpoints / name)
    started, codes = run(tmp_path, "keep=2", "eval_every=3")
    assert codes == [0], started.said()
    for name in (*foreign[:-1], "step-000008", "step-000007", "step-000006"):
        assert f"{checkpoints / name} is passed over: " in started.said()
    assert "step-000005 is passed over" not in started.said()
    assert_equal_runs(folder, unbroken)
    # what is not the run's own stays; of its own the last two, and the best one
    assert read_meta(newest(folder))["best"]["step"] == 8
    assert {path.name for path in checkpoints.iterdir()} == {
        *foreign, "best.json", "step-000007", "step-000008",
    }  # fmt: skip


def test_a_run_whose_checkpoints_are_all_torn_is_not_begun_anew_unasked(unbroken, tmp_path):
    folder = tmp_path / "scenes-dino"
    shutil.copytree(unbroken, folder)
    for number, path in enumerate(sorted((folder / "checkpoints").glob("step-*"))):
        list(TEARS.values())[number](path)
    before = tree_of(folder)
    started, codes = run(tmp_path, "keep=8", "eval_every=3")
    assert codes == [1], started.said()
    assert "holds no whole checkpoint to go on from" in started.said()
    assert f"remove {folder} to begin anew" in started.said()
    assert all(f"step-{step:06d} is passed over" in started.said() for step in range(1, 9))
    assert tree_of(folder) == before


def kept(folder):
    return [step_of(path) for path in sorted(folder.glob("step-*"))]


def test_the_newest_and_the_best_stay(tmp_path):
    tensors = {"model/a": torch.zeros(3)}
    with Saver(tmp_path, keep=2) as saver:
        for step in range(1, 8):
            saver.save(step, tensors, {"best": {"step": min(step, 2), "loss": 0.5}}, wait=True)
            assert json.loads((tmp_path / "best.json").read_text())["step"] == min(step, 2)
    assert kept(tmp_path) == [2, 6, 7]
    for path in tmp_path.glob("step-*"):
        check_checkpoint(path)


def test_torn_ones_of_a_time_that_is_over_do_not_push_whole_ones_out(tmp_path):
    for step in (2, 7):
        write_checkpoint(tmp_path, {"model/a": torch.zeros(3)}, {"step": step})
    TEARS["a flipped bit"](tmp_path / "step-000007")
    with Saver(tmp_path, keep=1, since=2) as saver:
        saver.save(4, {"model/a": torch.ones(3)}, {}, wait=True)
        assert newest_valid(tmp_path, lambda _: None).name == "step-000004"
        assert kept(tmp_path) == [4, 7]
        saver.save(8, {"model/a": torch.ones(3)}, {}, wait=True)
        assert kept(tmp_path) == [8]
    with Saver(tmp_path, keep=2, since=8) as saver:
        saver.save(9, {"model/a": torch.ones(3)}, {}, wait=True)
        assert kept(tmp_path) == [8, 9]


def test_what_a_killed_run_left_half_written_or_half_removed_is_cleared(tmp_path):
    write_checkpoint(tmp_path, {"model/a": torch.zeros(3)}, {"step": 2})
    for name in (".part-step-000004", ".old-step-000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    with Saver(tmp_path, keep=2):
        assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_the_best_evaluation_is_noted_and_kept(unbroken):
    losses = {s: r["eval/loss"] for s, r in read_log(unbroken).items() if "eval/loss" in r}
    assert list(losses) == [3, 6, 8]
    best = json.loads((unbroken / "checkpoints/best.json").read_text())
    assert best["step"] == min(losses, key=losses.get)
    assert best["loss"] == pytest.approx(min(losses.values()))
    assert read_meta(newest(unbroken))["best"] == best


def test_minutes_bring_a_checkpoint_too(tmp_path):
    started = Run(tmp_path, "steps=100000", "checkpoint_every=100000", "checkpoint_minutes=0.002")
    started.until_saved(1)
    first = steps_there(started.run_folder)[0]
    started.until_saved(first + 1)
    started.kill()
    state = read_state(newest(started.run_folder), "optim/")
    assert state["head.bias/step"] == step_of(newest(started.run_folder))


def test_a_finished_run_writes_its_export_again_and_nothing_else(unbroken, tmp_path):
    folder = tmp_path / "scenes-dino"
    shutil.copytree(unbroken, folder)
    # it names the folder, which is another here
    (folder / "config.json").unlink()
    before = tree_of(folder)
    shutil.rmtree(folder / "export")
    # as a kill right after the last checkpoint leaves it
    (folder / "checkpoints/best.json").write_text('{"step": 3, "loss": 9.0}\n')
    finished(tmp_path, "keep=8", "eval_every=3")
    after = tree_of(folder)
    assert {name: after.get(name) for name in before} == before
    new = after.keys() - before.keys() - {"config.json"}
    assert all(name.startswith("tensorboard/") for name in new)
    assert losses_of(folder) == losses_of(unbroken)


def test_a_run_of_another_recipe_or_hierarchy_is_refused_and_not_touched(unbroken, tmp_path):
    folder = tmp_path / "scenes-dino"
    shutil.copytree(unbroken, folder)
    before = tree_of(folder)
    assignments = [f"out_dir={tmp_path}", "name=scenes-dino", "steps=9", "warmup_steps=1"]
    arguments = ["scenes-clip", *(f"--set={each}" for each in assignments)]
    started, codes = run(tmp_path, arguments=arguments)
    assert codes == [1], started.said()
    assert f"{folder} holds a run of another config: " in started.said()
    for difference in ("stage (was dino, now clip)", "batch_size (was 4, now 128)"):
        assert difference in started.said()
    assert tree_of(folder) == before

    config = RECIPES["scenes-128"]()
    assert isinstance(config, AdapterConfig)
    about = {"adapter": {"tokens_per_node": [32, 8, 4]}}
    had = json.loads(describe(config))
    meta = {"step": 5, "config": had | {"tokens_per_node": [32, 8]}}
    meta["adapter"] = {"tokens_per_node": [32, 8]}
    with pytest.raises(ValueError, match=r"tokens_per_node \(was \[32, 8\], now \[32, 8, 4\]\)"):
        check_resume(config, about, meta)
