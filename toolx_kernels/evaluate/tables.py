"""Text tables: aligned for a terminal, or as Markdown. The first row is the header; the first column is text."""

from __future__ import annotations

from collections.abc import Sequence

from toolx_kernels.evaluate.intervals import Estimate

NOTHING = "–"


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Columns separated by spaces, all but the first aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    )


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table that preserves bars and leading spaces (an indented name) in cells."""
    header, *body = [[_escaped(cell) for cell in row] for row in cells]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *body))


def _escaped(cell: str) -> str:
    name = cell.lstrip(" ")
    return "&nbsp;" * (len(cell) - len(name)) + name.replace("|", "\\|")


def estimate(value: Estimate | None, digits: int, sign: str = "") -> str:
    """``0.512 [0.498, 0.526]``, the value alone if it has no interval, a dash if there is no value."""
    if value is None:
        return NOTHING
    text = f"{value.value:{sign}.{digits}f}"
    return text if value.low is None else f"{text} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"
