"""Tools' schemas: whether they are JSON Schema, what in arguments breaks them, and where numbers are equal."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from typing import Any

from toolx_kernels.toolcall.json_schema.keywords import NEVER, EndlessError, breach, errors, found, validator_of
from toolx_kernels.toolcall.json_schema.validity import FaultError, checked, dialect_of, targets
from toolx_kernels.toolcall.strict_json import MAX_DEPTH, is_shallow

# Keywords whose schemas speak of the same value, some of them by the name of a member.
_BY_NAME = frozenset({"dependentSchemas", "dependencies"})
_IN_PLACE = _BY_NAME | {"allOf", "anyOf", "oneOf", "if", "then", "else"}


def schema_fault(schema: Any, path: str = "") -> str | None:
    """Describes why ``schema``, a JSON value (``json_fault``), is not a JSON schema of arguments, or returns None.
    ``path`` names its place in the tool.

    The draft is the one that ``$schema`` names, else 2020-12. Beyond the draft, texts such as ``description`` may be of
    any type, and OpenAPI's and older drafts' forms are read: ``nullable``, a list as ``items``, and a bool as
    ``exclusiveMinimum`` or ``exclusiveMaximum``; ``required`` may repeat a name. References must stay inside the
    schema; nothing is ever downloaded. Whether a ``pattern`` is a regular expression is not checked.
    """
    if not isinstance(schema, dict):
        return f"{path} is {reprlib.repr(schema)}, which is not of type object"
    read = _read(json.dumps(schema))
    return path + read if isinstance(read, str) else None


def arguments_fault(arguments: dict, parameters: dict) -> str | None:
    """Describes how the arguments of a call break ``parameters``, the checked schema of its tool, or returns None.

    The meaning is JSON Schema's (1.0 is an integer, True is not 1), except that:

    - null is right where the schema says ``nullable``;
    - a name that the schema does not state is a fault, here and in objects inside, unless the schema has
      ``additionalProperties``, ``unevaluatedProperties`` or ``patternProperties``, or states no names at all;
    - formats are not checked, nor is a pattern that is not a regular expression or takes more than ``PATTERN_SECONDS``.
    """
    schema = _schema_of(parameters)
    return schema.fault(arguments) if schema else None


def unknown_argument(arguments: dict, parameters: dict) -> str | None:
    """An argument that ``parameters``, the schema of its tool, does not name, by the rule of ``arguments_fault``. None
    if there is none, or ``parameters`` is not a schema."""
    schema = _schema_of(parameters)
    return next(schema.unknown(arguments), None) if schema else None


def whole_numbers(arguments: dict, parameters: Any) -> dict:
    """``arguments`` with an int for each whole float whose place ``parameters``, the schema of its tool, calls a number
    or an integer, so that 1 and 1.0 are equal there. Unchanged if ``parameters`` is not a schema."""
    schema = _schema_of(parameters)
    return schema.with_whole_numbers(arguments, [schema.root]) if schema else arguments


class _Schema:
    """A valid schema. ``targets`` has what the reference of a node, named by its ``id``, points at."""

    def __init__(self, root: dict, targets: dict[int, list], dialect: Any) -> None:
        self.root, self._targets, self._dialect = root, targets, dialect

    def fault(self, arguments: dict) -> str | None:
        """See ``arguments_fault``."""
        from jsonschema.exceptions import best_match

        try:
            if error := best_match(errors(self._validator, arguments)):
                return _argument_words(error)
        except (RecursionError, EndlessError):
            return "the arguments cannot be checked, as the schema refers to itself without end"
        return next((_no_argument(name) for name in self._all_unknown(arguments, [self.root], "")), None)

    def unknown(self, members: dict, schemas: Iterable[Any] | None = None) -> Iterator[str]:
        """The names of ``members`` that ``schemas``, by default the root, do not state."""
        nodes = self._in_place([self.root] if schemas is None else schemas)
        stated = [node["properties"] for node in nodes if "properties" in node]
        more = ("additionalProperties", "unevaluatedProperties", "patternProperties")
        if stated and not any(node.get(name, False) is not False for node in nodes for name in more):
            yield from (name for name in members if not any(name in names for names in stated))

    def with_whole_numbers(self, value: Any, schemas: Iterable[Any]) -> Any:
        """See ``whole_numbers``; ``schemas`` are those of ``value``."""
        nodes = self._in_place(schemas)
        if not nodes:
            return value
        if isinstance(value, dict):
            return {key: self.with_whole_numbers(item, self._of_member(nodes, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.with_whole_numbers(item, self._of_item(nodes, n)) for n, item in enumerate(value)]
        is_whole = isinstance(value, float) and value.is_integer()
        return int(value) if is_whole and any(map(_says_number, nodes)) else value

    def _all_unknown(self, value: Any, schemas: Iterable[Any], path: str) -> Iterator[str]:
        """The paths of names that the schema does not state, also in objects inside ``value``."""
        nodes = self._in_place(schemas)
        if isinstance(value, dict):
            yield from (path + name for name in self.unknown(value, nodes))
            for key, item in value.items():
                yield from self._all_unknown(item, self._of_member(nodes, key), f"{path}{key}.")
        elif isinstance(value, list):
            for n, item in enumerate(value):
                yield from self._all_unknown(item, self._of_item(nodes, n), f"{path[:-1]}[{n}].")

    def _in_place(self, schemas: Iterable[Any]) -> list[dict]:
        """``schemas`` and the schemas in them that speak of the same value, each once."""
        nodes: dict[int, dict] = {}
        left = list(schemas)
        while left:
            node = left.pop()
            if isinstance(node, dict) and id(node) not in nodes:
                nodes[id(node)] = node
                for name in _IN_PLACE & node.keys():
                    inner = node[name]
                    left += inner if isinstance(inner, list) else inner.values() if name in _BY_NAME else [inner]
                left += self._targets.get(id(node), ())
        return list(nodes.values())

    def _of_member(self, nodes: list[dict], name: str) -> Iterator[Any]:
        for node in nodes:
            stated = [inner for pattern, inner in node.get("patternProperties", {}).items() if found(pattern, name)]
            if name in node.get("properties", {}):
                stated.append(node["properties"][name])
            yield from stated or (node.get(key) for key in ("additionalProperties", "unevaluatedProperties"))

    def _of_item(self, nodes: list[dict], n: int) -> Iterator[Any]:
        for node in nodes:
            first = node.get("prefixItems", node.get("items"))
            if isinstance(first, list) and n < len(first):
                yield first[n]
            else:
                yield from (node.get(key) for key in ("items", "additionalItems", "unevaluatedItems"))

    @cached_property
    def _validator(self) -> Any:
        return validator_of(self.root, self._dialect)


def _says_number(node: dict) -> bool:
    stated = node.get("type", ())
    values = [*node.get("enum", ()), node.get("const")]
    return not {"number", "integer"}.isdisjoint([stated] if isinstance(stated, str) else stated) or any(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def _schema_of(parameters: Any) -> _Schema | None:
    """The schema that ``parameters``, which need not be checked, state; None if they are not a schema."""
    try:
        read = _read(json.dumps(parameters)) if isinstance(parameters, dict) else None
    except (TypeError, ValueError, RecursionError):
        return None
    return read if isinstance(read, _Schema) else None


@lru_cache(maxsize=8192)
def _read(text: str) -> _Schema | str:
    """The schema of a JSON text, or its fault. Rows repeat the schemas of their tools, so they are kept."""
    schema = json.loads(text)
    if not is_shallow(schema):
        return f" is nested deeper than {MAX_DEPTH} levels"
    dialect = dialect_of(schema.get("$schema"))
    try:
        root = checked(schema, "", dialect)
        return _Schema(root, targets(root, dialect), dialect)
    except FaultError as error:
        return str(error)


def _argument_words(error: Any) -> str:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path)[1:]
    if error.validator == "not" and error.schema == NEVER:
        return _no_argument(place)
    if error.validator == "required":
        missing = next(name for name in error.validator_value if name not in error.instance)
        return f"the required argument '{place and place + '.'}{missing}' is missing"
    subject = f"argument '{place}' is" if place else "the arguments are"
    return f"{subject} {reprlib.repr(error.instance)}, {breach(error)}"


def _no_argument(place: str) -> str:
    return f"the schema has no argument '{place}'"
