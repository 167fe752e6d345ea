"""Lines of a run's logs, checked as they are read: curves and comparisons rely on the fields of metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError

PLACED = ("sft", "step", "eval", "probe")  # their steps are the optimizer's; a cold start counts its own
COUNTS = ("round", "tokens", "spent_tokens", "spent_fe")  # never None
PROBED = ("rows", "hard", "relapsed", "round_rows")
VALUES = (
    "accuracy", "reward", "loss", "truncated", "clip_high", "clip_low", "kl", "entropy", "completion_length",
    "grad_norm",
)  # fmt: skip
NEEDED = {"eval": ("accuracy",), "probe": ("hard",)}  # the rest may be None, and is absent from runs of older versions
LARGEST = 1e100  # of a number; beyond float32, and small enough to be drawn


def read_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in ``text``; raises ValueError if there is none."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def read_line(line: bytes) -> dict[str, Any]:
    """The object in a line of metrics.jsonl; raises ValueError if it is no line that a run writes."""
    record = read_object(line)
    event = record.get("event")
    if not isinstance(event, str) or type(record.get("step")) is not int:
        raise ValueError("without an event or step")
    _check("step", record["step"], least=0)
    if event not in PLACED:
        return record
    for name in (*COUNTS, *PROBED, *VALUES):
        if name in record:
            _check(name, record[name], may_be_none=name not in COUNTS, least=-LARGEST if name in VALUES else 0)
    for name in NEEDED.get(event, ()):
        _check(name, record.get(name))
    parts = record.get("parts", {})
    if not isinstance(parts, dict):
        raise ValueError("parts")
    for name, value in parts.items():
        _check(name, value)
    return record


def _check(name: str, value: Any, *, may_be_none: bool = False, least: float = -LARGEST) -> None:
    """Raises ValueError if ``value`` is no number that can be drawn; NaN is none."""
    if not (may_be_none and value is None) and (type(value) not in (int, float) or not least <= value <= LARGEST):
        raise ValueError(f"{name} is no such number")


def readable(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The lines that are not damaged."""
    for line in lines:
        try:
            yield read_line(line)
        except ValueError:
            continue


class Reader:
    """Reads the lines of the log ``path`` in their order, each by ``parse``; ``remedy`` ends the sentence about a
    damaged one."""

    def __init__(self, path: Path, remedy: str, parse: Callable[[bytes], dict[str, Any]] = read_line):
        self.path, self.remedy, self.parse = path, remedy, parse
        self._number, self._step, self._update = 0, 0, 0

    def read(self, line: bytes) -> dict[str, Any]:
        """Returns the next line; raises InputError if it is damaged, repeated or out of order, as where two processes
        wrote to the file."""
        self._number += 1
        try:
            record = self.parse(line)
            if self.parse is read_line and record["event"] in PLACED:
                self._follow(record["event"], record["step"])
        except ValueError:
            raise InputError(f"{self.path}, line {self._number}, is damaged: {self.remedy}.") from None
        return record

    def _follow(self, event: str, step: int) -> None:
        if step < self._step or (event in ("sft", "step") and step <= self._update):
            raise ValueError("out of order")
        self._step = step
        if event in ("sft", "step"):
            self._update = step
