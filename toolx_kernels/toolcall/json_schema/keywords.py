"""The keywords of JSON Schema as the ``jsonschema`` library checks them in an argument, and as we let it."""

from __future__ import annotations

import itertools
import logging
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from fractions import Fraction
from functools import lru_cache
from typing import Any

import regex

NEVER: dict = {"not": {}}  # what False means; the library does not tell the place of a False
PATTERN_SECONDS = 0.1  # a search for a pattern that takes longer ends, and the pattern is not checked again
_STEPS = 100_000  # keywords checked in one value: references can make a short schema endless
_log = logging.getLogger(__name__)
_patterns: dict[str, Any] = {}  # compiled; None for those that are not checked
_steps: ContextVar[Iterator[int]] = ContextVar("steps")


class EndlessError(Exception):
    """A value whose check takes more than ``_STEPS``."""


def validator_of(schema: dict, dialect: Any) -> Any:
    """The library's validator of ``schema``, with the meaning that ``arguments_fault`` describes."""
    from referencing import Registry

    return _lenient(dialect)(schema, registry=Registry())  # a registry that never downloads


def errors(validator: Any, value: Any) -> Iterator[Any]:
    """Yields what in ``value`` breaks the schema of ``validator``. Raises EndlessError or RecursionError if that refers
    to itself without end."""
    _steps.set(itertools.count())
    yield from validator.iter_errors(value)


def breach(error: Any) -> str:
    """What of its schema the value of a validation error breaks, as a relative clause."""
    name, stated = error.validator, error.validator_value
    if name == "type":
        return f"which is not of type {' or '.join([stated] if isinstance(stated, str) else stated)}"
    if name in ("enum", "const"):
        return "which is not a value that the schema lists"
    if name in ("anyOf", "oneOf"):
        return f"which does not fit {'any' if name == 'anyOf' else 'exactly one'} of the schemas in {name}"
    if name is None:
        return "where the schema allows nothing"
    return f"which breaks the rule {name} {reprlib.repr(stated)}"


@lru_cache
def _lenient(dialect: Any) -> Any:
    from jsonschema import Draft4Validator, Draft7Validator, Draft202012Validator
    from jsonschema.validators import extend

    lists, flags, base = Draft7Validator.VALIDATORS, Draft4Validator.VALIDATORS, dialect.VALIDATORS
    own = {name: check for name, check in base.items() if name != "unevaluatedProperties"}
    own |= {"pattern": _pattern, "patternProperties": _pattern_properties, "additionalProperties": _additional}
    own["multipleOf"] = _multiple_of
    for name, check, is_old in (
        ("items", lists, lambda schema: isinstance(schema["items"], list)),
        ("additionalItems", lists, lambda schema: isinstance(schema.get("items"), list)),
        ("minimum", flags, lambda schema: schema.get("exclusiveMinimum") is True),
        ("maximum", flags, lambda schema: schema.get("exclusiveMaximum") is True),
        ("exclusiveMinimum", flags, lambda schema: isinstance(schema["exclusiveMinimum"], bool)),
        ("exclusiveMaximum", flags, lambda schema: isinstance(schema["exclusiveMaximum"], bool)),
    ):
        own[name] = _either(check.get(name, _nothing), base.get(name, _nothing), is_old)
    checks = {name: _bounded(check) for name, check in own.items()}
    removed = {name: _nothing for name in base if name not in own}
    return extend(dialect, checks | removed, type_checker=Draft202012Validator.TYPE_CHECKER)


def _nothing(validator: Any, value: Any, instance: Any, schema: dict) -> Iterable:
    return ()


def _either(old: Callable, new: Callable, is_old: Callable[[dict], bool]) -> Callable:
    return lambda validator, value, instance, schema: (old if is_old(schema) else new)(
        validator, value, instance, schema
    )


def _bounded(check: Callable) -> Callable:
    """``check`` of a keyword, for a limited number of times and not of a null that is allowed."""

    def bounded(validator: Any, value: Any, instance: Any, schema: dict) -> Iterator:
        if next(_steps.get()) > _STEPS:
            raise EndlessError
        if instance is not None or schema.get("nullable") is not True:
            yield from check(validator, value, instance, schema) or ()

    return bounded


def _multiple_of(validator: Any, factor: float, instance: Any, schema: dict) -> Iterator:
    from jsonschema import ValidationError

    if validator.is_type(instance, "number") and (_as_written(instance) / _as_written(factor)).denominator != 1:
        yield ValidationError("")


def _as_written(number: float) -> Fraction:
    """The number that the digits of a float say: 19.99 is a multiple of 0.01, though as binary fractions it is not."""
    return Fraction(float.__repr__(number)) if isinstance(number, float) else Fraction(number)


def _pattern(validator: Any, pattern: str, instance: Any, schema: dict) -> Iterator:
    from jsonschema import ValidationError

    if isinstance(instance, str) and found(pattern, instance) is False:
        yield ValidationError("")


def _pattern_properties(validator: Any, patterns: dict, instance: Any, schema: dict) -> Iterator:
    for pattern, inner in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if found(pattern, name):
                yield from validator.descend(value, inner, path=name, schema_path=pattern)


def _additional(validator: Any, inner: Any, instance: Any, schema: dict) -> Iterator:
    for name, value in instance.items() if isinstance(instance, dict) else ():
        patterns = schema.get("patternProperties", ())
        if name not in schema.get("properties", ()) and all(found(pattern, name) is False for pattern in patterns):
            yield from validator.descend(value, inner or NEVER if isinstance(inner, bool) else inner, path=name)


def found(pattern: str, text: str) -> bool | None:
    """Whether ``pattern`` occurs in ``text``; None if it is not a regular expression, or takes too long."""
    if pattern not in _patterns:
        try:
            _patterns[pattern] = regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError) as error:
            _not_checked(pattern, f"it is not a regular expression ({error})")
    try:
        return _patterns[pattern] and _patterns[pattern].search(text, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        _not_checked(pattern, f"it takes more than {PATTERN_SECONDS} s")
        return None


def _not_checked(pattern: str, reason: str) -> None:
    _patterns[pattern] = None
    _log.warning("the pattern %s of a schema is not checked: %s", reprlib.repr(pattern), reason)
