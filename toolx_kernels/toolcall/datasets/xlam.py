"""xLAM's rows."""

from collections.abc import Mapping
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.parse import read_json
from toolx_kernels.toolcall.rows import short
from toolx_kernels.toolcall.schema import annotation_schema


def _parse(text: str, place: str, remedy: str) -> Any:
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); {remedy}") from error


def from_xlam(raw: Any, place: str) -> dict:
    """`parameters` is flat there: name -> `{"type": a Python annotation, "description", "default"?}`; what has a
    default or says "optional" need not be given."""
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{place}: a row in xLAM's format is an object with query, tools and answers, not {short(raw)}"
        )
    tools, answer = raw.get("tools"), raw.get("answers")
    tools = _parse(tools, f"{place}: field 'tools'", "write it as a list") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{place}: field 'tools' must be a list of functions, as in xLAM's format")
    return {
        **{key: value for key, value in raw.items() if key not in ("query", "answers")},
        "prompt": raw.get("query"),
        "tools": [_xlam_tool(tool, place) for tool in tools],
        "answer": answer,
    }


def _xlam_tool(tool: Mapping, place: str) -> dict:
    properties, required = {}, []
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions")
    for name, spec in parameters.items():
        annotation = str(spec.get("type", "any"))
        rest = {key: value for key, value in spec.items() if key not in ("type", "required")}
        properties[name] = {**annotation_schema(annotation), **rest}
        if "default" not in spec and "optional" not in annotation.lower():
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": tool.get("name"), "description": tool.get("description", ""), "parameters": schema}
