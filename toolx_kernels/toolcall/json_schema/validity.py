"""Validity of JSON schemas, by the ``jsonschema`` library."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from toolx_kernels.toolcall.json_schema.keywords import NEVER, breach

JSON_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
# Keywords that hold schemas: by name, in a list, or one.
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
_SINGLE = frozenset({
    "items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "not", "if", "then", "else", "contentSchema",
})  # fmt: skip
# Datasets write what they like there, and it constrains nothing.
_NOTES = frozenset({
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly",
    "nullable", "const", "$schema",
})  # fmt: skip


class FaultError(Exception):
    """What is wrong with a schema, and where."""


def dialect_of(named: Any) -> Any:
    """The library's validator of the draft that a schema names; without a known name that of 2020-12."""
    from jsonschema import Draft4Validator, Draft6Validator, Draft7Validator, Draft201909Validator, Draft202012Validator

    drafts = (Draft4Validator, Draft6Validator, Draft7Validator, Draft201909Validator)
    address = named.rstrip("#") if isinstance(named, str) else ""
    found = (draft for draft in drafts if draft.META_SCHEMA["$schema"].rstrip("#") == address)
    return next(found, Draft202012Validator)


def checked(node: Any, path: str, dialect: Any) -> Any:
    """A copy of the schema ``node`` in the words of ``dialect``. Raises FaultError if it is not valid."""
    if fault := _node_fault(json.dumps(_outline(node)), dialect):
        raise FaultError(path + fault)
    if isinstance(node, bool):
        return node or NEVER
    copy: dict[str, Any] = {}
    for key, value in node.items():
        if (key in _MAPS or key in _LISTS - {"items"}) and not isinstance(value, dict if key in _MAPS else list):
            raise FaultError(f"{path}.{key} is {reprlib.repr(value)}, which holds no schemas")  # unknown to the draft
        if key in _MAPS:
            copy[key] = {
                name: inner
                if isinstance(inner, list) and key == "dependencies"
                else checked(inner, f"{path}.{key}.{name}", dialect)
                for name, inner in value.items()
            }
        elif key in _LISTS and isinstance(value, list):
            copy[key] = [checked(inner, f"{path}.{key}[{n}]", dialect) for n, inner in enumerate(value)]
        elif key in _SINGLE and not isinstance(value, bool):
            copy[key] = checked(value, f"{path}.{key}", dialect)
        elif key != "$schema":  # the library would change the dialect there, and lose our keywords
            copy[key] = value
    return copy


def _outline(node: Any) -> Any:
    """``node`` without what is checked elsewhere or needs no check, so that few outlines differ."""
    if not isinstance(node, dict):
        return node
    outline: dict[str, Any] = {}
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            outline[key] = {}
        elif key in _LISTS and isinstance(value, list):
            outline[key] = {} if key == "items" else [{}] * min(len(value), 1)
        elif key in _SINGLE and isinstance(value, dict | bool):
            outline[key] = {}
        elif key == "required" and isinstance(value, list) and all(isinstance(name, str) for name in value):
            outline[key] = [""]
        elif key == "enum" and isinstance(value, list):
            outline[key] = [None]
        elif key in ("pattern", "format", *_REFERENCES) and isinstance(value, str):
            outline[key] = ""
        elif key not in _NOTES and not (key in ("exclusiveMinimum", "exclusiveMaximum") and isinstance(value, bool)):
            outline[key] = value
    return outline


@lru_cache(maxsize=4096)
def _node_fault(outline: str, dialect: Any) -> str | None:
    from jsonschema.exceptions import SchemaError

    try:
        dialect.check_schema(json.loads(outline), format_checker=None)
    except SchemaError as error:
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)
        if error.absolute_path and error.absolute_path[0] == "type":
            return f"{place} is {reprlib.repr(error.instance)}, not one of {', '.join(JSON_TYPES)}"
        return f"{place} is {reprlib.repr(error.instance)}, {breach(error)}"
    return None


def targets(root: dict, dialect: Any) -> dict[int, list]:
    """What the references in ``root`` point at, by the ``id`` of the node that has the reference. Raises FaultError
    for one that points at no schema inside ``root``."""
    text = json.dumps(root)
    if dialect.META_SCHEMA["$schema"].endswith("2020-12/schema") and not any(
        f'"{n}"' in text for n in ("$id", *_REFERENCES)
    ):
        return {}
    from referencing import Registry
    from referencing.jsonschema import specification_with

    specification = specification_with(dialect.META_SCHEMA["$schema"])
    schemas: dict[int, tuple] = {}
    left = [("", root, Registry().resolver_with_root(specification.create_resource(root)))]
    while left:
        path, node, resolver = left.pop()
        if isinstance(node, dict):
            schemas[id(node)] = path, node, resolver
            for place, inner in _inner(node):
                if not isinstance(inner, dict):
                    continue
                try:
                    left.append((path + place, inner, resolver.in_subresource(specification.create_resource(inner))))
                except ValueError as error:  # an address that is none
                    raise FaultError(f"{path + place}.$id is no address ({error})") from error
    found: dict[int, list] = {}
    for path, node, resolver in schemas.values():
        for name in _REFERENCES:
            if not isinstance(reference := node.get(name), str):
                continue
            try:
                target = resolver.lookup(reference).contents
            except Exception:  # of the library, or whatever an odd address raises in it
                target = None
            if not isinstance(target, bool) and id(target) not in schemas:
                raise FaultError(
                    f"{path}.{name} is {reprlib.repr(reference)}, which is no schema inside this one, and nothing is"
                    " downloaded"
                )
            found.setdefault(id(node), []).append(target)
    return found


def _inner(node: dict) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside ``node``, with their places."""
    for key, value in node.items():
        if key in _MAPS:
            yield from ((f".{key}.{name}", inner) for name, inner in value.items())
        elif key in _LISTS and isinstance(value, list):
            yield from ((f".{key}[{n}]", inner) for n, inner in enumerate(value))
        elif key in _SINGLE:
            yield f".{key}", value
