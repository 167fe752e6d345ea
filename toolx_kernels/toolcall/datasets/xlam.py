"""Rows of xLAM-function-calling-60k."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.type_names import flat_schema, unread_types_told
from toolx_kernels.toolcall.rows import json_value, short


def from_xlam(raws: Sequence, where: str) -> list[dict]:
    """Converts rows of xLAM's format to ours.

    There ``parameters`` is flat: name -> ``{"type": a Python annotation, "description", "default"?, "required"?}``;
    ``flat_schema`` says which are required, and the tool itself may list them in ``required``. Types that cannot be
    read may be anything and are counted in a warning.

    Raises InputError, naming the row, if one is not in that format.
    """
    with unread_types_told(where):
        return [_row(raw, f"{where}:{n}") for n, raw in enumerate(raws)]


def _row(raw: Any, place: str) -> dict:
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{place}: a row in xLAM's format is an object with query, tools and answers, not {short(raw)}."
        )
    tools, answer = raw.get("tools"), raw.get("answers")
    if isinstance(tools, str):
        tools = json_value(tools, f"{place}: field 'tools'", "write it as a list")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{place}: field 'tools' must be a list of functions, as in xLAM's format.")
    return {
        **{key: value for key, value in raw.items() if key not in ("query", "answers")},
        "prompt": raw.get("query"),
        "tools": [_tool(tool, place) for tool in tools],
        "answer": answer,
    }


def _tool(tool: Mapping, place: str) -> dict:
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions.")
    return {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": flat_schema(parameters, tool.get("required")),
    }
