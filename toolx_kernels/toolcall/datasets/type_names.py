"""Type names of datasets, read as JSON Schema: in schemas, and in flat parameters as xLAM has them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from toolx_kernels.toolcall.datasets.annotations import NAMES, Annotation, read_annotation

# Keywords that hold schemas.
_SCHEMAS = frozenset({"items", "additionalProperties", "not", "contains"})
_LISTS = frozenset({"anyOf", "oneOf", "allOf", "prefixItems", "items"})
_MAPS = frozenset({"properties", "$defs", "definitions"})
_HOLDING = _SCHEMAS | _LISTS | _MAPS

_unread: ContextVar[list[str] | None] = ContextVar("unread", default=None)
_log = logging.getLogger(__name__)


@contextmanager
def unread_types_told(where: str) -> Iterator[None]:
    """Counts the types that ``flat_schema`` cannot read in the body, and logs them in one line about ``where``."""
    unread: list[str] = []
    token = _unread.set(unread)
    try:
        yield
    finally:
        _unread.reset(token)
    if unread:
        most = ", ".join(f"{name[:40]!r} ({count})" for name, count in Counter(unread).most_common(5))
        _log.warning("%s: %d types of parameters cannot be read and may be anything: %s", where, len(unread), most)


def json_schema(spec: Mapping, unread: list[str] | None = None) -> dict:
    """A copy of ``spec`` with JSON Schema's type names, also in the schemas inside: ``dict`` becomes ``object``,
    ``float`` becomes ``number``, ``list(str)`` becomes an array of strings. ``any`` becomes ``string``, as BFCL's
    checker expects and ToolACE means. Names that cannot be read stay, or with ``unread`` are left out and added to it.

    ``required``, if it is a flag of a property, becomes an entry in the list ``required`` around it.
    """
    schema = {key: _inner(key, value, unread) for key, value in spec.items()}
    if isinstance(properties := spec.get("properties"), Mapping):
        flags = {name: flag for name, inner in properties.items() if (flag := required_flag(inner)) is not None}
        for name in flags:
            del schema["properties"][name]["required"]
        if any(flags.values()) and not isinstance(spec.get("required"), list):
            schema["required"] = [name for name, flag in flags.items() if flag]
    stated = spec.get("type")
    if isinstance(stated, list):
        schema["type"] = [NAMES.get(name.lower(), name) if isinstance(name, str) else name for name in stated]
    elif isinstance(stated, str):
        if named := "string" if stated.lower() == "any" else NAMES.get(stated.lower()):
            schema["type"] = named
        elif not (read := read_annotation(stated)).unread:
            del schema["type"]
            schema = read.schema | schema
        elif unread is not None:
            del schema["type"]
            unread += read.unread
    return schema


def flat_schema(parameters: Mapping[str, Mapping], required: Any) -> dict:
    """The schema of parameters that are described one by one, ``{name: {"type": an annotation, ...}}``. What cannot be
    read may be anything (``unread_types_told``).

    A parameter is required unless it has a default or its annotation says that it is optional. What is stated has
    priority: its flag ``required``, and before that ``required``, a list of names. Where any flag is true, parameters
    without a flag are not required.
    """
    flags = {name: required_flag(spec) for name, spec in parameters.items()}
    properties: dict[str, dict] = {}
    needed: list[str] = []
    unread: list[str] = []
    for name, spec in parameters.items():
        stated = spec.get("type")
        read = Annotation({}, False, ()) if stated is None else read_annotation(str(stated))
        unread += read.unread
        rest = {key: value for key, value in spec.items() if key != "type"}
        if flags[name] is not None:
            del rest["required"]
        properties[name] = {**read.schema, **(rest if _HOLDING.isdisjoint(rest) else json_schema(rest, unread))}
        by_default = "default" not in spec and not read.optional and True not in flags.values()
        if by_default if flags[name] is None else flags[name]:
            needed.append(name)
    if isinstance(required, list):
        needed = required
    if (told := _unread.get()) is not None:
        told += unread
    return {"type": "object", "properties": properties, "required": needed}


def required_flag(spec: Any) -> bool | None:
    """The flag ``required`` of a parameter; None if it has none."""
    flag = spec.get("required") if isinstance(spec, Mapping) else None
    return {"true": True, "false": False}.get(str(flag).lower()) if isinstance(flag, bool | str) else None


def _inner(key: str, value: Any, unread: list[str] | None) -> Any:
    """``value`` of a keyword with JSON Schema's names in the schemas that it holds."""
    if key in _MAPS and isinstance(value, Mapping):
        return {name: _inner("items", inner, unread) for name, inner in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_inner("items", inner, unread) for inner in value]
    return json_schema(value, unread) if key in _SCHEMAS and isinstance(value, Mapping) else value
