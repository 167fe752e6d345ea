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
        self._by_tool: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            for name in dict.fromkeys(call["name"] for call in row.answer):
                self._by_tool[name].append(row)

    def choose(self, row: Row, rng: random.Random, per_tool: int = 1, limit: int = 3) -> list[Row]:
        """At most `limit` demonstrations for `row`, at most `per_tool` for each offered tool, tools in random order.

        Never a sample with the user text of `row` (so not the row itself) or with its answer. `[]` when there are
        none. The same state of `rng` gives the same choice.
        """
        own_answer = _answer_key(row)
        chosen: dict[str, Row] = {}
        names = list(dict.fromkeys(row.tool_names))
        rng.shuffle(names)
        for name in names:
            candidates = self._by_tool.get(name, ())
            found = 0
            for candidate in rng.sample(candidates, len(candidates)):
                if found == per_tool or len(chosen) == limit:
                    break
                if (
                    candidate.id not in chosen
                    and candidate.user_text != row.user_text
                    and _answer_key(candidate) != own_answer
                ):
                    chosen[candidate.id] = candidate
                    found += 1
        return list(chosen.values())


def _answer_key(row: Row) -> list[str]:
    return sorted(map(call_key, row.answer))
