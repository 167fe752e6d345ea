"""Dataset report before a run: its size, and rows that are valid but unusual."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from toolx_kernels.errors import counted
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.schema import arguments_fault


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """Counts over the rows of a dataset; ``first_...`` is the id of the first row counted, or None.

    >>> report = DatasetReport(3, {0: 1, 2: 2}, 4, 1, "b", 1, "a", "call 1 (f): the required argument 'x' is missing")
    >>> print(*report.lines(), sep="\\n")
    3 rows, 4 tools; rows by calls in the answer: 0 calls: 1, 2 calls: 2
    rows without any possible demonstration, so never shown with one: 1 of 3, first 'b'
    rows whose answer breaks the schema of a tool: 1 of 3, first 'a', call 1 (f): the required argument 'x' is missing
    """

    rows: int
    calls: dict[int, int]  # calls in the answer -> rows, ascending
    tools: int  # different names offered
    without_demonstrations: int  # rows for which ``DemonstrationIndex.possible`` is False
    first_without_demonstrations: str | None
    outside_schema: int  # rows whose answer has a call that breaks its tool's schema (``arguments_fault``)
    first_outside_schema: str | None
    first_fault: str | None  # the call and the fault of that row, in words

    def lines(self) -> list[str]:
        """The report as text: one line on all rows, and one for each kind of unusual rows that occurs."""
        by_calls = ", ".join(f"{counted(calls, 'call')}: {n}" for calls, n in self.calls.items())
        of_all = f"{counted(self.rows, 'row')}, {counted(self.tools, 'tool')}"
        lines = [f"{of_all}; rows by calls in the answer: {by_calls}"]
        if self.without_demonstrations:
            lines.append(
                "rows without any possible demonstration, so never shown with one:"
                f" {self.without_demonstrations} of {self.rows}, first {self.first_without_demonstrations!r}"
            )
        if self.outside_schema:
            lines.append(
                "rows whose answer breaks the schema of a tool:"
                f" {self.outside_schema} of {self.rows}, first {self.first_outside_schema!r}, {self.first_fault}"
            )
        return lines


def dataset_report(rows: Sequence[Row], index: DemonstrationIndex | None = None) -> DatasetReport:
    """Makes the report on checked rows, whose demonstrations come from ``index`` or, by default, from each other. Takes
    time linear in their number."""
    index = index or DemonstrationIndex(rows)
    without = [row.id for row in rows if not index.possible(row)]
    outside = [(row.id, fault) for row in rows if (fault := _answer_fault(row))]
    first_outside_schema, first_fault = outside[0] if outside else (None, None)
    return DatasetReport(
        rows=len(rows),
        calls=dict(sorted(Counter(len(row.answer) for row in rows).items())),
        tools=len({name for row in rows for name in row.tool_names}),
        without_demonstrations=len(without),
        first_without_demonstrations=without[0] if without else None,
        outside_schema=len(outside),
        first_outside_schema=first_outside_schema,
        first_fault=first_fault,
    )


def _answer_fault(row: Row) -> str | None:
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
    for n, call in enumerate(row.answer):
        if fault := arguments_fault(call["arguments"], schemas[call["name"]]):
            return f"call {n} ({call['name']}): {fault}"
    return None
