"""Progress bar of a run or an evaluation: the current phase, its progress, the time left and the last results."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

DELAY = 2.0  # seconds until the first line; shorter work needs none
SCREEN, LOG = 0.1, 30.0  # seconds between two lines, on a terminal and elsewhere
NARROW, WIDE = 5, 30  # characters of the bar alone


@dataclass(slots=True)
class _Stretch:
    """Work that the bar measures, e.g. ``evaluation  96/480``; of an unknown ``total`` the ``share`` is given."""

    name: str
    total: int | None
    done: float
    share: float

    first: float  # its share when it began
    started: float  # seconds on the clock, as is ``moved``
    moved: float
    part: str = ""
    part_total: int = 0
    part_done: int = 0
    results: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        done = int(self.done + 1e-6)  # of fractions that add up to a whole number
        if self.total is None:
            return f"{self.name} {done}"
        return f"{self.name} {done:>{len(str(self.total))}}/{self.total}"

    @property
    def part_label(self) -> str:
        return f"{self.part} {self.part_done / self.part_total:3.0%}" if self.part_total else self.part

    def left(self, now: float) -> str:
        """The time left at the pace so far; empty before the first advance and at the end."""
        if not self.first < self.share < 1:
            return ""
        left = (self.moved - self.started) / (self.share - self.first) * (1 - self.share) - (now - self.moved)
        return f"{tqdm.format_interval(max(0.0, left))} left"


class ProgressBar:
    """One line, drawn anew ten times a second on a terminal, and printed twice a minute where stderr is none.

    It shows the innermost stretch of work that is open:

        step  40/120 evaluation  96/480 |██████              | 00:03 left
        step  33/120 |█████▌              | 05:20 left rollout 60% reward 0.42 acc 0.61 hard 201

    What does not fit the terminal is left out from the end.
    """

    def __init__(self, shown: bool = True):
        self.shown = shown
        self._stretches: list[_Stretch] = []
        self._bar: tqdm | None = None
        self._drawn = 0.0  # seconds on the clock

    @contextmanager
    def stretch(self, name: str, total: int | None, done: float = 0, share: float | None = None) -> Iterator[None]:
        """Shows work of ``total`` units, of which ``done`` are done, until the context ends.

        Where the total is None, or is not what ends the work, ``share`` (0 to 1) says how much of it is done.
        """
        now = time.monotonic()
        if not self._stretches:
            self._drawn = now + DELAY - self._pause
        share = done / total if share is None and total else share or 0.0
        stretch = _Stretch(name, total, done, share, share, now, now)
        self._stretches.append(stretch)
        try:
            yield
        finally:
            if len(self._stretches) == 1:
                self._close()
            self._stretches.pop()
            for outer in self._stretches[-1:]:
                if outer.share == outer.first:  # the time before the first unit is no measure of its pace
                    outer.started = time.monotonic()

    def advance(self, amount: float = 1, share: float | None = None) -> None:
        """Moves the innermost stretch on by ``amount`` units; the part of the one that is done ends."""
        if not self._stretches:
            return
        stretch = self._stretches[-1]
        stretch.done += amount
        stretch.share = min(1.0, share if share is not None else stretch.done / (stretch.total or 1))
        stretch.moved, stretch.part, stretch.part_total = time.monotonic(), "", 0
        self._draw()

    def results(self, *results: str) -> None:
        """Shows the latest results of the innermost stretch, the most important first."""
        if self._stretches:
            self._stretches[-1].results = results

    def part(self, name: str, total: int = 0) -> None:
        """Begins a part, of ``total`` units, of the unit that the innermost stretch is at, e.g. a step's rollouts."""
        if self._stretches:
            stretch = self._stretches[-1]
            stretch.part, stretch.part_total, stretch.part_done = name, total, 0
            self._draw()

    def advance_part(self) -> None:
        if self._stretches:
            self._stretches[-1].part_done += 1
            self._draw()

    @staticmethod
    def write(line: str) -> None:
        """Prints a line to stdout, above the bar."""
        tqdm.write(line)

    # ---- drawing

    @property
    def _pause(self) -> float:
        return SCREEN if sys.stderr.isatty() else LOG

    def _draw(self) -> None:
        now = time.monotonic()
        if not self.shown or now - self._drawn < self._pause:
            return
        self._drawn = now
        if not sys.stderr.isatty():
            print(self._log_line(now), file=sys.stderr, flush=True)
            return
        if self._bar is None:
            # the format is set at each drawing; there is nothing for tqdm's monitor to do
            self._bar = tqdm(total=1, bar_format=" ", dynamic_ncols=True)
        self._set_bar(now)
        self._bar.refresh()

    def _set_bar(self, now: float) -> None:
        assert self._bar is not None
        columns = (self._bar.format_dict["ncols"] or 80) - 1  # a full line may wrap
        self._bar.n = self._stretches[-1].share
        self._bar.bar_format = self._format(columns, now)

    def _format(self, columns: int, now: float) -> str:
        """The line for tqdm, its bar as ``{bar:width}``, with as many of the facts as fit."""
        label, facts = self._label(), self._facts(now)
        while True:
            right = " ".join(facts)
            room = columns - len(f"{label} ||{' ' * bool(right)}{right}")
            if room >= NARROW or not facts:
                break
            facts.pop()
        label, right = (text.replace("{", "{{").replace("}", "}}") for text in (label, right))
        return f"{label} |{{bar:{max(NARROW, min(room, WIDE))}}}| {right}".rstrip()

    def _log_line(self, now: float) -> str:
        return ", ".join([self._label(), *self._facts(now)])

    def _label(self) -> str:
        return " ".join(stretch.label for stretch in self._stretches)

    def _facts(self, now: float) -> list[str]:
        stretch = self._stretches[-1]
        return [fact for fact in (stretch.left(now), stretch.part_label, *stretch.results) if fact]

    def _close(self) -> None:
        if self._bar is not None:  # its last state stays
            self._set_bar(time.monotonic())
            self._bar.close()
            self._bar = None
