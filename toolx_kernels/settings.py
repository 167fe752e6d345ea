"""Settings: dataclass fields with help and bounds, whose values are checked against their types and bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from toolx_kernels.errors import InputError, did_you_mean


class Bounds(NamedTuple):
    """The numbers that are allowed, and the end of the sentence "name=value must" for those that are not."""

    words: str
    allow: Callable[[float], bool]


POSITIVE = Bounds("be positive and finite", lambda value: 0 < value < math.inf)
SHARE = Bounds("lie in [0, 1]", lambda value: 0 <= value <= 1)
NO_LIMIT_OR_POSITIVE = Bounds("be -1 (no limit) or at least 1", lambda value: value == -1 or value >= 1)


def setting(
    default: Any, help: str, *, least: int | None = None, bounds: Bounds | None = None, unbounded: str = ""
) -> Any:
    """A field of ``Settings``. A numeric field has bounds, ``least`` or ``bounds``, or says why it has none. The help
    of a field with choices names each of them; a default of None is explained in the help, any other is added to it."""
    if least is not None:
        bounds = Bounds(f"be at least {least}" if least else "not be negative", lambda value: value >= least)
    return field(default=default, metadata={"help": help, "bounds": bounds, "unbounded": unbounded})


@dataclass
class Settings:
    """Base of dataclasses of settings: checks that each value has its field's type and is within its bounds.

    Raises InputError, which names the setting and its value as ``name=value``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:  # slots would refuse it too, but several bases cannot have them
            raise AttributeError(f"{name!r} is not a setting of {type(self).__name__}")
        super().__setattr__(name, value)

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for each in fields(self):
            value = _of_kind(each.name, getattr(self, each.name), kinds[each.name])
            setattr(self, each.name, value)
            bounds = each.metadata["bounds"]
            if bounds and value is not None and not bounds.allow(value):
                raise InputError(f"{each.name}={value} must {bounds.words}.")


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the field's type, or InputError. Numbers may be text, because YAML reads 5e-4 as text."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            choices = get_args(kind)
            remedy = did_you_mean(value, choices, f"choose one of {', '.join(choices)}.")
            raise InputError(f"{name}={value!r} is unknown: {remedy}")
        return value
    if value is None and NoneType in get_args(kind):
        return None
    wanted = without_none(kind)
    if get_origin(wanted) is list:
        if not isinstance(value, list) or not value:
            raise InputError(f"{name}={value!r} must be a list, one item after the other.")
        return [_of_kind(name, item, get_args(wanted)[0]) for item in value]
    if wanted is dict and isinstance(value, str):  # from the command line
        try:
            value = json.loads(value)
        except ValueError:
            pass
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not wanted or (wanted is dict and not _is_json(value)):
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a JSON object"}
        raise InputError(f"{name}={value!r} must be {words[wanted]}.")
    return value


def _is_json(value: Any) -> bool:
    """Whether ``value`` survives a round trip through JSON, so that a run's files can hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


def without_none(kind: Any) -> Any:
    """``X`` for ``X | None``; any other type unchanged."""
    return next(one for one in get_args(kind) if one is not NoneType) if NoneType in get_args(kind) else kind
