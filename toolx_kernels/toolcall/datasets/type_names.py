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
_FLAGS = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0"), False),
}
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


def json_schema(spec: Mapping, unread: list[str] | None = None, any_as: str | None = None) -> dict:
    """A copy of ``spec`` with JSON Schema's type names, also in the schemas inside: ``dict`` becomes ``object``,
    ``float`` becomes ``number``, ``list(str)`` becomes an array of strings. ``any`` becomes the type ``any_as``, or
    without it no type. Names that cannot be read stay, or with ``unread`` are left out and added to it.

    A flag ``required`` or ``optional`` of a property becomes an entry in the list ``required`` around it, or none.
    """
    properties, schema = spec.get("properties"), dict(spec)
    if isinstance(properties, Mapping):
        flags = {name: required_flag(inner) for name, inner in properties.items()}
        schema["properties"] = {name: _without_flags(inner) for name, inner in properties.items()}
        if any(flags.values()) and not isinstance(spec.get("required"), list):
            schema["required"] = [name for name, flag in flags.items() if flag]
    schema = {key: _inner(key, value, unread, any_as) for key, value in schema.items()}
    stated = spec.get("type")
    if isinstance(stated, list):
        names = NAMES if any_as is None else {**NAMES, "any": any_as}
        schema["type"] = [names.get(name.lower(), name) if isinstance(name, str) else name for name in stated]
        if any_as is None and "any" in [str(name).lower() for name in stated]:
            del schema["type"]
    elif isinstance(stated, str):
        if named := any_as if stated.lower() == "any" else NAMES.get(stated.lower()):
            schema["type"] = named
        elif not (read := read_annotation(stated)).unread:
            del schema["type"]
            schema = read.schema | schema
        elif unread is not None:
            del schema["type"]
            unread += read.unread
    return schema


def flat_schema(parameters: Mapping[str, Mapping], required: list | None) -> dict:
    """The schema of parameters that are described one by one, ``{name: {"type": an annotation, ...}}``. What cannot be
    read may be anything (``unread_types_told``).

    A parameter is required unless it has a default or its annotation says that it is optional. What is stated has
    priority: its flag (``required_flag``), and before that ``required``, a list of names. Where any flag is true,
    parameters without a flag are not required.
    """
    flags = {name: required_flag(spec) for name, spec in parameters.items()}
    properties: dict[str, dict] = {}
    needed: list[str] = []
    unread: list[str] = []
    for name, spec in parameters.items():
        stated = spec.get("type")
        if isinstance(stated, list):  # as JSON Schema has it
            stated = " | ".join(map(str, stated))
        read = Annotation({}, False, ()) if stated is None else read_annotation(str(stated))
        unread += read.unread
        rest = {key: value for key, value in _without_flags(spec).items() if key != "type"}
        properties[name] = {**read.schema, **(rest if _HOLDING.isdisjoint(rest) else json_schema(rest, unread))}
        by_default = "default" not in spec and not read.optional and True not in flags.values()
        if by_default if flags[name] is None else flags[name]:
            needed.append(name)
    if required is not None:
        needed = required
    if (told := _unread.get()) is not None:
        told += unread
    return {"type": "object", "properties": properties, "required": needed}


def required_flag(spec: Any) -> bool | None:
    """The flag ``required`` of a parameter, or the opposite of its flag ``optional``; None if it has neither."""
    if not isinstance(spec, Mapping):
        return None
    flag, optional = _flag(spec.get("required")), _flag(spec.get("optional"))
    return flag if flag is not None or optional is None else not optional


def _flag(value: Any) -> bool | None:
    """What a flag says, which is a bool, a number or a word; None for what is no flag."""
    return _FLAGS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None


def _without_flags(spec: Any) -> Any:
    if not isinstance(spec, Mapping):
        return spec
    return {key: value for key, value in spec.items() if key not in ("required", "optional") or _flag(value) is None}


def _inner(key: str, value: Any, unread: list[str] | None, any_as: str | None) -> Any:
    """``value`` of a keyword with JSON Schema's names in the schemas that it holds."""
    if key in _MAPS and isinstance(value, Mapping):
        return {name: _inner("items", inner, unread, any_as) for name, inner in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_inner("items", inner, unread, any_as) for inner in value]
    return json_schema(value, unread, any_as) if key in _SCHEMAS and isinstance(value, Mapping) else value
