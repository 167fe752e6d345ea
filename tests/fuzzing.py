"""What the fuzzers share: numbered cases that a seed repeats, a limit of time for each, the smallest part that fails.

The suite runs some thousand cases of each fuzzer, ``make soak`` many more:

    python -m tests.toolcall.fuzz --cases 1000000 --seed 1
"""

from __future__ import annotations

import argparse
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

SHRINKING = 3.0  # seconds to look for a smaller part that fails
SHOWN = 2000  # characters of a failing case


class Fuzzer(NamedTuple):
    """``draw`` makes a case: its setting, and a sequence (a text, a list of operations) any part of which would be a
    case too. ``check`` raises an exception if a case fails, else returns counts of what it saw."""

    name: str
    module: str  # whose ``main`` is this fuzzer's
    draw: Callable[[random.Random], tuple[Any, Sequence]]
    check: Callable[[Any, Any], Counter]
    seconds: Callable[[Sequence], float]  # of the processor that a check may take


class TooSlow(AssertionError):
    """A check took more time than its fuzzer allows."""


def fuzz(fuzzer: Fuzzer, cases: int, seed: int = 0, first: int = 0, said: Callable[[str], object] = str) -> Counter:
    """Runs cases from number ``first`` on and returns the sums of their counts; ``said`` gets ten lines of progress.

    Raises AssertionError for a case that fails, with the command that repeats it and a small part that fails too.
    """
    counts: Counter = Counter()
    started = time.monotonic()
    for done in range(1, cases + 1):
        number = first + done - 1
        setting, sequence = fuzzer.draw(random.Random(f"{seed} {number}"))
        try:
            counts.update(_checked(fuzzer, setting, sequence))
        except Exception as error:
            part = shrunk(sequence, lambda part, setting=setting: _fails(fuzzer, setting, part))
            raise AssertionError(
                f"case {number} of seed {seed} fails: {type(error).__name__}: {str(error)[:SHOWN]}\n"
                f"again: python -m {fuzzer.module} --seed {seed} --first {number} --cases 1\n"
                f"setting: {repr(setting)[:SHOWN]}\n"
                f"smallest failing part, {len(part)} of {len(sequence)}: {repr(part)[:SHOWN]}"
            ) from error
        if done % -(-cases // 10) == 0 or done == cases:
            tally = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            said(f"{fuzzer.name}, seed {seed}: {done} of {cases} cases in {time.monotonic() - started:.0f} s; {tally}")
    return counts


def shrunk(sequence: Sequence, fails: Callable[[Sequence], bool]) -> Sequence:
    """The smallest part of ``sequence`` that leaving out runs of items finds within ``SHRINKING`` seconds."""
    ends = time.monotonic() + SHRINKING
    size = len(sequence) // 2
    while size:
        start = 0
        while start < len(sequence):
            if time.monotonic() > ends:
                return sequence
            part = sequence[:start] + sequence[start + size :]
            if fails(part):
                sequence = part
            else:
                start += size
        size //= 2
    return sequence


def main(fuzzer: Fuzzer, description: str) -> None:
    """Reads ``--cases``, ``--seed`` and ``--first`` from the command line and runs the fuzzer."""
    parser = argparse.ArgumentParser(prog=f"python -m {fuzzer.module}", description=description.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    asked = parser.parse_args()
    fuzz(fuzzer, asked.cases, asked.seed, asked.first, said=lambda line: print(line, flush=True))


def _fails(fuzzer: Fuzzer, setting: Any, sequence: Sequence) -> bool:
    try:
        _checked(fuzzer, setting, sequence)
    except Exception:
        return True
    return False


def _checked(fuzzer: Fuzzer, setting: Any, sequence: Sequence) -> Counter:
    with _at_most(fuzzer.seconds(sequence)):
        return fuzzer.check(setting, sequence)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Interrupts the body, also inside a regular expression, after ``seconds`` of its own processor time."""

    def interrupt(*_: object) -> None:
        raise TooSlow(f"it takes more than {seconds:.2f} s of the processor")

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
