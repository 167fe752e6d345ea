"""JSON Schema: conversion of datasets' type names, and faults of schemas, arguments and values."""

import math
import re
import reprlib
from typing import Any

from toolx_kernels.toolcall.strict_json import MAX_DEPTH, is_shallow

JSON_TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})
# BFCL's checker expects a string where its data say "any"; ToolACE uses the same names.
_NAMES = {
    "dict": "object", "map": "object", "float": "number", "double": "number", "int": "integer", "long": "integer",
    "bool": "boolean", "str": "string", "any": "string", "list": "array", "tuple": "array", "set": "array",
}  # fmt: skip
_CLASSES = {
    "string": str, "integer": int, "number": int | float, "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip
_OPTIONAL_SUFFIX = re.compile(r",?\s*optional\.?$", re.IGNORECASE)


def json_schema(spec: dict) -> dict:
    """A copy of ``spec`` with JSON Schema's type names in every property and item: ``dict`` becomes ``object``,
    ``float`` becomes ``number``, ``tuple`` becomes ``array``, ``any`` becomes ``string``. Unknown names stay."""
    schema = dict(spec)
    name = schema.get("type")
    if isinstance(name, str):
        schema["type"] = _NAMES.get(name.lower(), name.lower() if name.lower() in JSON_TYPES else name)
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {
            key: json_schema(value) if isinstance(value, dict) else value for key, value in schema["properties"].items()
        }
    if isinstance(schema.get("items"), dict):
        schema["items"] = json_schema(schema["items"])
    return schema


def annotation_schema(annotation: str) -> dict:
    """The schema of a Python annotation: ``"List[int], optional"`` gives an array of integers.

    Types for which JSON Schema has no single name (``Union[...]``, ``Any``, a class) stay unconstrained: ``{}``.
    """
    annotation = _OPTIONAL_SUFFIX.sub("", annotation.strip())
    head, _, inner = annotation.partition("[")
    head, inner = head.strip().lower(), inner[:-1]
    if head == "optional":
        return annotation_schema(inner)
    if head == "any":
        return {}
    name = _NAMES.get(head, head)
    if name not in JSON_TYPES:
        return {}
    if head == "list" and inner:
        return {"type": "array", "items": annotation_schema(inner)}
    return {"type": name}


def schema_fault(schema: Any, path: str = "") -> str | None:
    """Describes why ``schema``, a JSON value (``json_fault``), is not a JSON schema, or returns None. ``path`` names
    its place in the tool."""
    if not isinstance(schema, dict):
        return f"{path} is not an object"
    names = schema.get("type", [])
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name not in JSON_TYPES:
            return f"{path}.type is {name!r}, not one of {', '.join(sorted(JSON_TYPES))}"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return f"{path}.properties is not an object"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{path}.required is not a list of names"
    if not isinstance(schema.get("enum", []), list):
        return f"{path}.enum is not a list of values"
    inner = [(f"{path}.properties.{name}", value) for name, value in properties.items()]
    if isinstance(schema.get("items"), dict):
        inner.append((f"{path}.items", schema["items"]))
    for name in ("anyOf", "oneOf", "allOf"):
        choices = schema.get(name, [])
        if not isinstance(choices, list):
            return f"{path}.{name} is not a list of schemas"
        inner += [(f"{path}.{name}[{n}]", choice) for n, choice in enumerate(choices)]
    return next((fault for where, value in inner if (fault := schema_fault(value, where))), None)


def arguments_fault(arguments: dict, parameters: dict) -> str | None:
    """Describes how the arguments of a call break ``parameters``, the checked schema of its tool, or returns None.

    Faults are a missing required argument, an argument that the schema does not name, a value of a wrong type and one
    outside its ``enum``; also inside arrays and objects, and by ``anyOf``, ``oneOf`` (treated as ``anyOf``) and
    ``allOf``. As in JSON Schema, an integer is also a number and 1.0 is also an integer; unlike there, a name that is
    not among the ``properties`` is a fault unless the schema has ``additionalProperties``. Patterns, formats and ranges
    are not checked.
    """
    return _members_fault(arguments, parameters, "")


def _members_fault(members: dict, schema: dict, path: str) -> str | None:
    properties = schema.get("properties")
    for name in schema.get("required", ()):
        if name not in members:
            return f"the required argument '{path}{name}' is missing"
    if properties is None:
        return None
    for name, value in members.items():
        if name in properties:
            if fault := _value_fault(value, properties[name], path + name):
                return fault
        elif not schema.get("additionalProperties"):
            return f"the schema has no argument '{path}{name}'"
    return None


def _value_fault(value: Any, schema: dict, path: str) -> str | None:
    stated = schema.get("type", [])
    names = stated if isinstance(stated, list) else [stated]
    if names and not any(_has_type(value, name) for name in names):
        return f"argument '{path}' is {reprlib.repr(value)}, which is not of type {' or '.join(names)}"
    if "enum" in schema and value not in schema["enum"]:
        return f"argument '{path}' is {reprlib.repr(value)}, which is not a value that the schema lists"
    for name in ("anyOf", "oneOf"):
        faults = [_value_fault(value, choice, path) for choice in schema.get(name, ())]
        if faults and None not in faults:
            return faults[0]
    if isinstance(value, dict) and (fault := _members_fault(value, schema, f"{path}.")):
        return fault
    inner = [(choice, value, path) for choice in schema.get("allOf", ())]
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        inner += [(schema["items"], item, f"{path}[{n}]") for n, item in enumerate(value)]
    return next((fault for part, item, where in inner if (fault := _value_fault(item, part, where))), None)


def _has_type(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, _CLASSES[name]) or name == "integer" and isinstance(value, float) and value.is_integer()


def json_fault(value: Any, path: str) -> str | None:
    """Describes why ``value`` is not JSON that a prompt can show, or returns None. Faults are a number that is not
    finite, a key that is not a string, a lone surrogate, a value of another type, and more than ``MAX_DEPTH`` levels.
    ``path`` names the value."""
    if isinstance(value, dict | list | tuple) and not is_shallow(value):
        return f"{path} is nested deeper than {MAX_DEPTH} levels"
    return _json_fault(value, path)


def _json_fault(value: Any, path: str) -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{path} holds the lone surrogate {value[error.start]!r}, which is not a character"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return f"{path} is {value!r}, which is not a JSON number"
    elif isinstance(value, list | tuple):
        inner = ((item, f"{path}[{n}]") for n, item in enumerate(value))
        return next((fault for item, where in inner if (fault := _json_fault(item, where))), None)
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                return f"{path} has the key {key!r}, which is not a string"
            if fault := _json_fault(key, f"a key of {path}") or _json_fault(item, f"{path}.{key}"):
                return fault
    elif value is not None and not isinstance(value, int):
        return f"{path} is of type {type(value).__name__}, which is not JSON"
    return None
