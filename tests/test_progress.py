"""The progress bar on terminals of several widths and in logs."""

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from contextlib import contextmanager
from threading import Thread
from types import SimpleNamespace

import pytest

from toolx_kernels import progress
from toolx_kernels.progress import DELAY, LOG, ProgressBar


class Clock:
    """Stand-in for the module ``time``."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@contextmanager
def terminal(monkeypatch, columns):
    """A terminal as stderr; once it is closed, ``frames`` holds the lines that were drawn over each other."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    seen, received = SimpleNamespace(frames=[], text=""), []

    def read():
        while True:
            try:
                received.append(os.read(reader, 1 << 16))
            except OSError:  # the other end is closed
                return

    thread = Thread(target=read)
    thread.start()
    with open(writer, "w", encoding="utf-8") as screen, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        yield seen
    thread.join()
    os.close(reader)
    seen.text = b"".join(received).decode()
    seen.frames = [frame.rstrip() for frame in re.split("[\r\n]", seen.text) if frame.strip()]


def in_the_34th_step(bar, clock):
    """A run after 33 of 120 steps of 10 seconds each; the rollouts of the next step are 60 % done."""
    for _ in range(33):
        clock.now += 10
        bar.results("reward 0.42", "acc 0.61", "hard 201", "3495 tok/s")
        bar.advance()
    bar.part("rollout", 128)
    for _ in range(77):
        clock.now += 0.2
        bar.advance_part()


@pytest.mark.parametrize(
    ("columns", "right"),
    [
        (110, "14:14 left rollout 60% reward 0.42 acc 0.61 hard 201 3495 tok/s"),
        (80, "14:14 left rollout 60% reward 0.42 acc 0.61 hard 201"),
        (60, "14:14 left rollout 60% reward 0.42"),
        (40, "14:14 left"),
        (24, ""),
    ],
)
def test_a_line_keeps_its_right_end_whatever_the_terminal_holds(columns, right, clock, monkeypatch):
    bar = ProgressBar()
    with terminal(monkeypatch, columns) as seen, bar.stretch("step", 120, 0):
        in_the_34th_step(bar, clock)
    assert max(map(len, seen.frames)) < columns
    for frame in seen.frames[-2:]:  # the last update, and the line that stays at the end
        left, bar, facts = frame.split("|")
        assert (left, facts.strip()) == ("step  33/120 ", right)
        assert bar.startswith("█") and len(bar) >= 5
    assert seen.text.endswith("\n")


def test_the_innermost_stretch_is_shown_with_a_bar_of_its_own(clock, monkeypatch):
    bar = ProgressBar()
    with terminal(monkeypatch, 60) as seen, bar.stretch("step", 120, 40):
        with bar.stretch("evaluation", 480):
            clock.now += DELAY
            for _ in range(240):
                clock.now += 0.1
                bar.advance()
        clock.now += 1
        bar.part("reward")
    assert seen.frames[-3].startswith("step  40/120 evaluation 240/480 |████")
    assert seen.frames[-3].endswith("| 00:26 left") and "left" not in seen.frames[-1]
    assert re.fullmatch(r"step  40/120 \|█+▊? +\| reward", seen.frames[-1])


def test_what_came_before_the_first_step_is_not_part_of_its_pace(clock, monkeypatch):
    bar = ProgressBar()
    with terminal(monkeypatch, 80) as seen, bar.stretch("step", 10):
        with bar.stretch("probe", 5):
            clock.now += 1000
            bar.advance(5)
        clock.now += 10
        bar.advance()
    assert seen.frames[-1].endswith("| 01:30 left")


def test_a_budget_ends_the_run_by_its_share(clock, monkeypatch):
    bar = ProgressBar()
    with terminal(monkeypatch, 80) as seen, bar.stretch("step", None, 3, share=0.5):
        clock.now += 60
        bar.advance(share=0.75)
    assert re.fullmatch(r"step 4 \|█{22}▌ +\| 01:00 left", seen.frames[-1])


def test_a_log_has_a_line_now_and_then(clock, monkeypatch, capsys):
    bar = ProgressBar()
    with bar.stretch("step", 1000, 0):
        for _ in range(1000):
            clock.now += 0.1
            bar.results("reward 0.42")
            bar.advance()
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 1 + 1 + (100 - DELAY) // LOG and lines.pop() == ""
    assert all(re.fullmatch(r"step [ \d]{4}/1000, 0\d:\d\d left, reward 0.42", line) for line in lines)
    with bar.stretch("evaluation", 3):
        clock.now += DELAY / 2
        bar.advance(3)
    assert capsys.readouterr().err == "", "what is done in a moment needs no line"
