"""Rows of xLAM-function-calling-60k, and of datasets that call the same three fields otherwise."""

from collections.abc import Mapping
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.offered import read_tools
from toolx_kernels.toolcall.rows import read_call
from toolx_kernels.toolcall.strict_json import json_value

# the names of each field, the usual one first; a row's first name that is not empty counts
QUERY, TOOLS, ANSWERS = (
    ("query", "question", "instruction"), ("tools", "functions"), ("answers", "answer", "output", "calls"),
)  # fmt: skip


def named(raw: Mapping, names: tuple[str, ...]) -> str | None:
    """The first of ``names`` whose value in ``raw`` is not None; None if there is none."""
    return next((name for name in names if raw.get(name) is not None), None)


def is_query(raw: Mapping) -> bool:
    """Whether ``raw`` has a query, tools and answers, under any of their names."""
    return all(any(name in raw for name in names) for names in (QUERY, TOOLS, ANSWERS))


def from_query(raw: Mapping, place: str) -> dict:
    """Converts a row of xLAM's format to ours. An ``instruction`` continues in ``input``, as Alpaca's rows have it.

    Raises InputError, beginning with ``place``, if the row is not in that format.
    """
    query, tools, answers = (named(raw, names) for names in (QUERY, TOOLS, ANSWERS))
    answer: Any = raw[answers] if answers else None
    if isinstance(answer, str):
        answer = json_value(answer, f"{place}: field {answers!r}", "write it as a list of calls")
    if isinstance(answer, Mapping):
        answer = [answer]
    if isinstance(answer, list):  # what is no call stays, for check_row to refuse
        answer = [read_call(call) or call for call in answer]
    used, prompt = [query, tools, answers], raw[query] if query else None
    if query == "instruction" and raw.get("input") is not None:
        if not isinstance(prompt, str) or not isinstance(raw["input"], str):
            raise InputError(f"{place}: field 'input' continues 'instruction', so both must be texts: fix the row.")
        used.append("input")
        prompt = "\n\n".join(part for part in (prompt, raw["input"]) if part.strip())
    return {
        **{key: value for key, value in raw.items() if key not in used},
        "prompt": prompt,
        "tools": read_tools(raw[tools] if tools else None, place),
        "answer": answer,
    }
