"""Few-shot demonstrations: other samples whose answers use the tools that a row offers."""

from __future__ import annotations

import itertools
import random
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from toolx_kernels.toolcall.bfcl_match import bfcl_match
from toolx_kernels.toolcall.match import loose_key
from toolx_kernels.toolcall.rows import Row


class DemonstrationIndex:
    """An index of ``rows`` by the tools that they use.

    ToolExpander (arXiv 2510.07737) shows a hard sample together with demonstrations of the tools that it offers.
    The tools of its own answer are not preferred: a preference would reveal the right one. No demonstration reveals
    the answer itself. Excluded are samples with the row's user text (ignoring case, white space and Unicode
    compatibility forms), thus the row itself; samples that contain any call of its answer, whether a number in it is
    written 1 or 1.0; and, if the row has ``possible_answers``, samples with a call that BFCL's rules would accept.

    The cost of ``choose`` does not depend on the number of rows, unless nearly all rows reveal the answer.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_tool: dict[str, _Users] = {}
        for row in rows:
            sample = _Sample(row, _folded(row.user_text), _keys(row))
            for name in dict.fromkeys(call["name"] for call in row.answer):
                self._by_tool.setdefault(name, _Users()).add(sample)

    def choose(self, row: Row, rng: random.Random, per_tool: int = 1, limit: int = 3) -> list[Row]:
        """Draws at most ``limit`` demonstrations for ``row``, at most ``per_tool`` for each offered tool, with the
        tools in random order.

        Returns ``[]`` exactly if there are none, or ``limit`` or ``per_tool`` is 0. The same state of ``rng`` gives the
        same choice.
        """
        secret = _Secret(row)
        chosen: dict[str, Row] = {}
        names = list(dict.fromkeys(row.tool_names))
        rng.shuffle(names)
        for name in names:
            enough = min(limit, len(chosen) + per_tool)
            users = self._by_tool.get(name)
            if len(chosen) == enough or users is None or not users.can_show(secret):
                continue
            for sample in _shuffled(users.samples, rng):
                if sample.row.id not in chosen and not secret.is_told_by(sample):
                    chosen[sample.row.id] = sample.row
                    if len(chosen) == enough:
                        break
        return list(chosen.values())

    def possible(self, row: Row) -> bool:
        """Whether ``choose`` finds any demonstration for ``row``."""
        secret = _Secret(row)
        return any(name in self._by_tool and self._by_tool[name].can_show(secret) for name in row.tool_names)


@dataclass(frozen=True, slots=True)
class _Sample:
    row: Row
    text: str  # folded
    keys: frozenset[str]


class _Secret:
    """The text and calls of a row, which its demonstrations must not reveal."""

    def __init__(self, row: Row) -> None:
        self.text, self.keys = _folded(row.user_text), _keys(row)
        self._tools, self._category = row.tools, row.columns.get("category", "")
        self._possible = row.columns.get("possible_answers") or ()

    def is_told_by(self, sample: _Sample) -> bool:
        return sample.text == self.text or self.is_called_by(sample)

    def is_called_by(self, sample: _Sample) -> bool:
        return not self.keys.isdisjoint(sample.keys) or any(
            call["name"] in expected and bfcl_match([call], self._tools, [expected], self._category)
            for expected in self._possible
            for call in sample.row.answer
        )


@dataclass(slots=True)
class _Users:
    """The samples that use one tool, also grouped by answer, so that ``can_show`` need not check each sample."""

    samples: list[_Sample] = field(default_factory=list)
    _by_answer: dict[frozenset[str], list[_Sample]] = field(default_factory=dict)  # at most two, with different texts
    _in_every_answer: frozenset[str] = frozenset()
    _shown_last: Sequence[_Sample] = ()  # tried first, because it probably serves the next row too

    def add(self, sample: _Sample) -> None:
        self._in_every_answer = self._in_every_answer & sample.keys if self.samples else sample.keys
        self.samples.append(sample)
        alike = self._by_answer.setdefault(sample.keys, [])
        if not alike or len(alike) == 1 and alike[0].text != sample.text:
            alike.append(sample)

    def can_show(self, secret: _Secret) -> bool:
        if not self._in_every_answer.isdisjoint(secret.keys):
            return False
        for alike in itertools.chain([self._shown_last], self._by_answer.values()):
            if any(sample.text != secret.text for sample in alike) and not secret.is_called_by(alike[0]):
                self._shown_last = alike
                return True
        return False


def _shuffled(samples: Sequence[_Sample], rng: random.Random) -> Iterator[_Sample]:
    """``samples`` in random order, shuffled one by one as they are taken."""
    moved: dict[int, int] = {}  # position -> index of the sample there now
    for last in range(len(samples) - 1, -1, -1):
        place = rng.randrange(last + 1)
        yield samples[moved.get(place, place)]
        moved[place] = moved.get(last, last)


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _keys(row: Row) -> frozenset[str]:
    return frozenset(map(loose_key, row.answer))
