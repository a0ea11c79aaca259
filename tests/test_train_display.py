"""What a person sees of a run: on a real pseudo-terminal, and where there is none."""

import os
import pty
import re
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from train.display import Display, duration

ROW = {
    "step": 120, "loss": 0.4125, "penalty": 0.21, "flow": 0.4104, "grad_norm": 0.811, "lr": 0.93,
    "seconds": 0.5, "pictures_per_s": 412.3, "mfu": 0.571, "memory_gib": 61.24, "data_wait": 0.004,
    "checkpoint_stall": 0.11, "skipped": 0, "broken": 3,
}  # fmt: skip
EVALUATION = {"step": 120, "eval/loss": 0.39, "eval/mean_cosine": 0.12, "eval/effective_rank": 61.3}


class Clock:
    """Goes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def console(terminal):
    return Console(file=StringIO(), force_terminal=terminal, width=110, height=24)


def walk(display, clock):
    for step in range(101, 121):
        clock.now += 0.5
        display.update(step)
    display.update(120, ROW)


def screen(text):
    """What was drawn last, without its colours."""
    drawn = re.split(r"(?:\x1b\[2K|\x1b\[1A|\r)+", text.replace("\r\n", "\n"))[-1]
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)


def test_one_screen_holds_all_there_is_to_know(clock):
    to = console(True)
    with Display("phase1-32", 1000, 100, to, clock) as display:
        walk(display, clock)
        display.update(120, EVALUATION)
        clock.now += 180
    shown = screen(to.file.getvalue())
    for part in (
        "phase1-32", "120 / 1,000  12%", "7 min left", "loss 0.4125   flow 0.4104   penalty 0.2100",
        "gradient norm 0.811", "learning rate factor 0.93", "412.3 pictures/s", "0.5 s a step",
        "MFU 57.1%", "memory 61.2 GiB", "data wait 0.4%", "by 120   3 min ago   waited 0.11 s",
        "at 120   loss 0.39   mean cosine 0.12   effective rank 61.3", "3 broken pictures",
    ):  # fmt: skip
        assert part in shown, part
    assert "not taken" not in shown
    assert len(shown.splitlines()) < 12


def test_a_new_run_and_a_bare_row_show_what_is_known(clock):
    to = console(True)
    with Display("dino", 10, 0, to, clock) as display:
        assert display.seconds_left() is None
        assert "– left" in screen(to.file.getvalue())
        clock.now += 1
        display.update(1, {"step": 1, "loss": 2.0, "skipped": 2})
        assert display.seconds_left() == 9
    shown = screen(to.file.getvalue())
    assert "loss 2.0000" in shown
    assert "2 steps not taken" in shown
    assert "broken" not in shown


def test_without_a_terminal_each_row_is_a_plain_line(clock):
    to = console(False)
    with Display("phase1-32", 1000, 100, to, clock) as display:
        walk(display, clock)
        display.note("a \x1b[31mname\nof [red]two lines")
        display.update(120, EVALUATION)
    lines = to.file.getvalue().splitlines()
    assert lines == [
        "phase1-32 120/1000  loss 0.4125  flow 0.4104  penalty 0.2100  412.3 pictures/s  "
        "0.5 s a step  MFU 57.1%  memory 61.2 GiB  data wait 0.4%  3 broken pictures  7 min left",
        "a ?[31mname",
        "of [red]two lines",
        "phase1-32 120/1000  evaluation  loss 0.39  mean cosine 0.12  effective rank 61.3",
    ]


def test_steps_between_rows_are_drawn_at_most_ten_times_a_second(clock):
    to = console(True)
    with Display("run", 10000, 0, to, clock) as display:
        before = to.file.tell()
        for step in range(1, 1001):
            clock.now += 0.001
            display.update(step)
        drawn = to.file.getvalue()[before:].count("run")
    assert 9 <= drawn <= 11


SCRIPT = """
from train.display import Display
with Display("live", 3, 0) as display:
    for step in (1, 2, 3):
        display.update(step, {"step": step, "loss": 1 / step})
        print("printed", step, flush=True)
    display.note("noted")
"""


def test_a_real_terminal_keeps_notes_and_prints_above_the_screen():
    leader, follower = pty.openpty()
    env = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "24"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=follower, stderr=follower, stdin=follower, env=env
    )
    os.close(follower)
    said = b""
    try:
        while more := os.read(leader, 65536):
            said += more
    except OSError:  # the other end is closed
        pass
    os.close(leader)
    assert process.wait() == 0
    text = said.decode()
    for part in ("printed 1", "printed 3", "noted"):
        assert text.count(part) == 1
    assert "3 / 3  100%" in screen(text)
    assert "noted" not in screen(text)
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_a_real_pipe_gets_no_control_codes():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == "printed 1\nprinted 2\nprinted 3\n"
    assert [line.split("  ")[:2] for line in done.stderr.splitlines()] == [
        *([f"live {step}/3", f"loss {1 / step:.4f}"] for step in (1, 2, 3)), ["noted"],
    ]  # fmt: skip
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"), (59, "59 s"), (59.7, "60 s"), (61, "1 min"), (3599, "1 h 00 min"),
        (11100, "3 h 05 min"), (86399, "1 d 00 h"), (187200, "2 d 04 h"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, words):
    assert duration(seconds) == words
