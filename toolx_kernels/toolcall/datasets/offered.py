"""Offered tools as datasets publish them: OpenAI's, bare JSON schemas, and xLAM's flat parameters."""

from collections.abc import Iterable, Mapping
from typing import Any

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.type_names import flat_schema, json_schema
from toolx_kernels.toolcall.pythonic import read_value
from toolx_kernels.toolcall.strict_json import MAX_DEPTH, is_shallow, json_at, json_value, skip_space


class LeftOutError(Exception):
    """A valid row that cannot be used; the text is the reason, as a noun."""


def read_tools(value: Any, place: str) -> list[dict]:
    """The functions ``{"name", "description"?, "parameters"}`` in ``value``: a list of tools, or text of one.

    A tool is bare, or in OpenAI's form, ``{"type": "function", "function": {...}}``. Its parameters are a JSON schema,
    in which type names of Python are translated; or flat, as xLAM's (``_flat_tool``); or absent, if it takes none.

    A tool that occurs twice is offered once.

    Raises:
        InputError: beginning with ``place``, for what is no list of functions.
        LeftOutError: two tools of one name differ, so a call of it could be of either.
    """
    if isinstance(value, str):
        found = values_in(value)
        value = json_value(value, f"{place}: field 'tools'", "write it as a list") if found is None else found
    if not isinstance(value, list):
        raise InputError(f"{place}: field 'tools' must be a list of functions, not {short(value)}.")
    return each_once(_tool(tool, place, n) for n, tool in enumerate(value))


def each_once(tools: Iterable[dict]) -> list[dict]:
    """Functions without those that occur before. Raises LeftOutError if two of one name differ."""
    once: list[dict] = []
    for tool in tools:
        if tool not in once:
            once.append(tool)
    if len({tool["name"] for tool in once}) < len(once):
        raise LeftOutError("two different tools of one name")
    return once


def values_in(text: str) -> list[Any] | None:
    """The values in a text, in JSON or Python's notation: the items of one list, or one value after another. None if it
    holds anything else."""
    values: list[Any] = []
    at = skip_space(text, 0)
    while at < len(text):
        try:
            value, at = json_at(text, at) or read_value(text, at)
        except ValueError:
            return None
        values += value if isinstance(value, list) else [value]
        at = skip_space(text, at)
        at = skip_space(text, at + text.startswith(",", at))
    return values


def _tool(tool: Any, place: str, n: int) -> dict:
    written = tool
    if isinstance(tool, str):  # TRL keeps a schema that Arrow would fill with nulls as text
        tool = _object_in(tool, f"{place}: tool {n} of field 'tools'")
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InputError(f"{place}: field 'tools' must be a list of functions, and tool {n} is {short(written)}.")
    if not isinstance(function.get("name"), str):
        raise InputError(
            f"{place}: tool {n} of field 'tools' must be a function with 'name' and 'parameters', not {short(written)}."
        )
    function = {key: value for key, value in function.items() if value is not None and key != "type"}
    parameters: Any = function.get("parameters")
    if isinstance(parameters, str) and parameters.strip():
        parameters = _object_in(parameters, f"{place}: field 'parameters' of tool {function['name']!r}")
        function["parameters"] = parameters
    if not _is_schema(parameters):
        return _flat_tool(function, place)
    properties = parameters.get("properties")
    if isinstance(properties, Mapping) and any(map(_is_annotated, [parameters, *properties.values()])):
        listed = {"parameters": properties, "required": parameters.get("required", function.get("required"))}
        schema = {**parameters, **_flat_tool({**function, **listed}, place)["parameters"]}
    else:
        schema = json_schema(parameters)
    return {**function, "parameters": schema}


def _flat_tool(tool: Mapping, place: str) -> dict:
    """Converts a tool whose ``parameters`` are flat: name -> ``{"type": a Python annotation, "description", "default"?,
    "required"?}``; ``flat_schema`` says which are required, and the tool itself may list them in ``required``, also in
    a text, separated by commas.

    Raises InputError, beginning with ``place``, for parameters of another form.
    """
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions.")
    required = tool.get("required")
    if isinstance(required, str):
        required = [name.strip() for name in required.split(",") if name.strip()]
        if not set(required) <= parameters.keys():
            raise InputError(
                f"{place}: field 'required' of tool {tool.get('name')!r} is {short(tool['required'])}: give a list of"
                " names of its parameters."
            )
    return {
        "name": tool.get("name"),
        "description": tool.get("description", ""),
        "parameters": flat_schema(parameters, required if isinstance(required, list) else None),
    }


def _object_in(text: str, name: str) -> Any:
    """The value that a text holds, which should be an object."""
    if (found := values_in(text)) and len(found) == 1:
        return found[0]
    value = json_value(text, name, "write it as an object")
    if isinstance(value, list | dict) and not is_shallow(value):
        raise InputError(f"{name} is nested deeper than {MAX_DEPTH} levels: leave the row out.")
    return value


def _is_schema(parameters: Any) -> bool:
    """Whether parameters are a JSON schema, not a flat mapping of names, which may be "type" and "properties" too."""
    if not isinstance(parameters, Mapping):
        return False
    properties = parameters.get("properties")
    nested = isinstance(properties, Mapping) and all(isinstance(spec, Mapping) for spec in properties.values())
    return isinstance(parameters.get("type"), str | list) or nested


def _is_annotated(spec: Any) -> bool:
    """Whether a type is Python's: ``dict`` around properties that xLAM would list flat, or more than a name."""
    stated = spec.get("type") if isinstance(spec, Mapping) else None
    return isinstance(stated, str) and (stated == "dict" or not stated.isidentifier())
