"""Few-shot demonstrations: other samples whose answers use the tools that a row offers."""

import random
from collections import defaultdict
from collections.abc import Iterable

from toolx_kernels.toolcall.match import call_key
from toolx_kernels.toolcall.rows import Row


class DemonstrationIndex:
    """Which of `rows` show the use of which tool.

    ToolExpander (arXiv 2510.07737) shows a hard sample together with demonstrations of the tools it offers. The tools
    of its own answer get no preference: that would tell which of the offered tools is right.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._by_tool: dict[str, list[tuple[Row, frozenset[str]]]] = defaultdict(list)
        for row in rows:
            keys = _answer_keys(row)
            for name in dict.fromkeys(call["name"] for call in row.answer):
                self._by_tool[name].append((row, keys))

    def choose(self, row: Row, rng: random.Random, per_tool: int = 1, limit: int = 3) -> list[Row]:
        """At most `limit` demonstrations for `row`, at most `per_tool` for each offered tool, tools in random order.

        Never a sample with the user text of `row` (so not the row itself), nor one whose answer holds any call of its
        answer. `[]` when there are none. The same state of `rng` gives the same choice.
        """
        own_keys = _answer_keys(row)
        chosen: dict[str, Row] = {}
        names = list(dict.fromkeys(row.tool_names))
        rng.shuffle(names)
        for name in names:
            candidates = self._by_tool.get(name, ())
            found = 0
            for candidate, keys in rng.sample(candidates, len(candidates)):
                if found == per_tool or len(chosen) == limit:
                    break
                reveals = candidate.user_text == row.user_text or not keys.isdisjoint(own_keys)
                if candidate.id not in chosen and not reveals:
                    chosen[candidate.id] = candidate
                    found += 1
        return list(chosen.values())


def _answer_keys(row: Row) -> frozenset[str]:
    return frozenset(map(call_key, row.answer))
