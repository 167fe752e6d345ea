"""Rows of xLAM-function-calling-60k."""

from collections.abc import Mapping, Sequence
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.type_names import annotation_schema
from toolx_kernels.toolcall.rows import json_value, short


def from_xlam(raws: Sequence, where: str) -> list[dict]:
    """Converts rows of xLAM's format to ours.

    There ``parameters`` is flat: name -> ``{"type": a Python annotation, "description", "default"?}``; a parameter with
    a default or the word "optional" is not required.

    Raises InputError, naming the row, if one is not in that format.
    """
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
    properties: dict[str, dict] = {}
    required: list[str] = []
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions.")
    for name, spec in parameters.items():
        annotation = str(spec.get("type", "any"))
        rest = {key: value for key, value in spec.items() if key not in ("type", "required")}
        properties[name] = {**annotation_schema(annotation), **rest}
        if "default" not in spec and "optional" not in annotation.lower():
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": tool.get("name"), "description": tool.get("description", ""), "parameters": schema}
