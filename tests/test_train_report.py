"""Where the numbers of a run go: the log, TensorBoard for real, dashboards by stand-ins on disk."""

import json
import math
import sys
from importlib.util import find_spec

import pytest

from train.report import JsonLines, check_report_to, open_reporters, read_log, run_id

STAND_IN = """
import json, pathlib
CALLS = pathlib.Path(__file__).with_suffix(".calls")

def note(*call):
    with CALLS.open("a") as file:
        print(json.dumps(call), file=file)

class Run:
    def __init__(self, **given):
        note("init", given)
        if given["config"].get("refuse"):
            raise RuntimeError("no account")

    def define_metric(self, name, step_metric):
        note("define_metric", name, step_metric)

    def log(self, row, **given):
        note("log", row, given)
        if "train/loss" in row and row["train/loss"] < 0:
            raise ConnectionError("gone")

    def finish(self):
        note("finish")

init = Run
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Packages wandb and trackio that write down what they are told."""
    room = tmp_path / "packages"
    room.mkdir()
    for name in ("wandb", "trackio"):
        (room / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(room)
    yield lambda name: [json.loads(x) for x in (room / f"{name}.calls").read_text().splitlines()]
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def log_all(folder, report_to, rows, config=(), warn=pytest.fail):
    with open_reporters(folder, report_to, dict(config), rows[0]["step"], warn) as reporters:
        for row in rows:
            reporters.log(row)


def test_rows_survive_a_kill_and_the_later_of_two_wins(tmp_path):
    log = JsonLines(tmp_path / "run")
    log.log({"step": 1, "loss": 0.5, "flow": math.nan})
    log.log({"step": 2, "loss": 0.4})
    log.log({"step": 2, "eval/loss": 0.3})
    path = tmp_path / "run" / "log.jsonl"  # flushed: nobody has closed it
    text = path.read_text()
    assert json.loads(text.splitlines()[0])["flow"] is None
    path.write_text(text + '{"step": 9, "lo')
    again = JsonLines(tmp_path / "run")
    again.log({"step": 2, "loss": 0.35})
    again.log({"step": 10, "loss": 0.2})
    again.close()
    assert path.read_text().startswith(text)
    rows = read_log(tmp_path / "run")
    assert list(rows) == [1, 2, 10]
    assert math.isnan(rows[1]["flow"])
    assert rows[2] == {"step": 2, "loss": 0.35, "eval/loss": 0.3}


def test_a_line_is_only_ended_where_it_is_torn(tmp_path):
    for _ in range(2):
        log = JsonLines(tmp_path)
        log.log({"step": 1})
        log.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n' * 2


def test_a_full_disk_ends_the_run(tmp_path):
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    log = JsonLines(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        log.log({"step": 1})


def test_tensorboard_shows_a_resumed_step_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_all(tmp_path, (), [{"step": step, "loss": 1 / step} for step in range(1, 6)])
    log_all(tmp_path, (), [{"step": step, "loss": 2 / step} for step in range(4, 7)])
    log_all(tmp_path, (), [{"step": 7, "eval/loss": 0.5}])
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(e.step, e.value) for e in found.Scalars("train/loss")]
    wanted = [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5), (5, 0.4), (6, 1 / 3)]
    assert scalars == [(step, pytest.approx(value)) for step, value in wanted]
    assert [e.value for e in found.Scalars("eval/loss")] == [0.5]
    assert len(read_log(tmp_path)) == 7


def test_dashboards_get_every_row_and_know_a_run_again(tmp_path, stand_in):
    folder = tmp_path / "phase1-32"
    both = ("wandb", "trackio")
    config = {"steps": 5, "out_dir": tmp_path, "tokens": (1, 2)}
    for rows in ([{"step": 1, "loss": 0.5}], [{"step": 1, "loss": 0.5, "eval/loss": 0.25}]):
        log_all(folder, both, rows, config)
    told = {"steps": 5, "out_dir": str(tmp_path), "tokens": [1, 2]}
    about = {"project": "sda-fast", "config": told, "resume": "allow"}
    known = run_id(folder)
    assert known == (folder / "run-id").read_text().strip()
    one = {"train/loss": 0.5}
    two = one | {"eval/loss": 0.25}
    init = ["init", {**about, "name": "phase1-32", "id": known, "dir": str(folder)}]
    metric = ["define_metric", "*", "step"]
    assert stand_in("wandb") == [
        init, metric, ["log", one | {"step": 1}, {}], ["finish"],
        init, metric, ["log", two | {"step": 1}, {}], ["finish"],
    ]  # fmt: skip
    init = ["init", {**about, "name": f"phase1-32-{known}"}]
    assert stand_in("trackio") == [
        init, ["log", one, {"step": 1}], ["finish"], init, ["log", two, {"step": 1}], ["finish"],
    ]  # fmt: skip


def test_a_broken_dashboard_is_named_once_and_the_run_goes_on(tmp_path, stand_in):
    said = []
    rows = [{"step": step, "loss": -1.0} for step in range(1, 4)]
    log_all(tmp_path / "run", ("trackio",), rows, warn=said.append)
    assert said == ["trackio gets no more rows of this run: ConnectionError('gone')"]
    assert [call[0] for call in stand_in("trackio")] == ["init", "log"]
    assert len(read_log(tmp_path / "run")) == 3
    said.clear()
    log_all(tmp_path / "other", ("wandb",), rows, {"refuse": True}, said.append)
    assert said == ["wandb gets no rows of this run: RuntimeError('no account')"]
    assert len(read_log(tmp_path / "other")) == 3


def test_what_cannot_be_reported_to_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="among wandb, trackio, got 'wandbb'"):
        open_reporters(tmp_path / "run", ["wandbb"], {}, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ValueError, match="not installed: pip install wandb"):
        check_report_to(["wandb"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_package_takes_rows(name, tmp_path, monkeypatch):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first in (1, 3):
        rows = [{"step": step, "loss": 1 / step} for step in range(first, first + 3)]
        log_all(tmp_path / "run", (name,), [*rows, {"step": rows[-1]["step"], "eval/loss": 0.5}])
    if name == "wandb":
        files = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
        runs = {file.name for file in files}
        assert runs == {f"run-{run_id(tmp_path / 'run')}.wandb"}
    else:
        assert [file.name for file in (tmp_path / "trackio").glob("*.db")] == ["sda-fast.db"]
