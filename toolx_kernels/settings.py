"""Settings: dataclass fields with their help and bounds, and the check of values against types and bounds."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from toolx_kernels.errors import InputError


class Bounds(NamedTuple):
    """The numbers that a setting may be, and the end of the sentence "name=value must" for those that it may not."""

    words: str
    allow: Callable[[float], bool]


POSITIVE = Bounds("be positive and finite", lambda value: 0 < value < math.inf)
SHARE = Bounds("lie in [0, 1]", lambda value: 0 <= value <= 1)
NO_LIMIT_OR_POSITIVE = Bounds("be -1 (no limit) or at least 1", lambda value: value == -1 or value >= 1)


def setting(
    default: Any, help: str, *, least: int | None = None, bounds: Bounds | None = None, unbounded: str = ""
) -> Any:
    """A field of ``Settings``. A numeric one has bounds, as ``least`` or as ``bounds``, or says why it has none."""
    if least is not None:
        bounds = Bounds(f"be at least {least}" if least else "not be negative", lambda value: value >= least)
    return field(default=default, metadata={"help": help, "bounds": bounds, "unbounded": unbounded})


@dataclass
class Settings:
    """Base of dataclasses of settings: their values have the fields' types and lie within the fields' bounds.

    Raises InputError, naming the setting and its value.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.__dataclass_fields__:  # slots would refuse it too, but cannot be added up
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
    """``value`` as the field's type, or InputError; YAML reads 5e-4 as text, so numbers may be text."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise InputError(f"{name}={value!r} is unknown: choose one of {', '.join(get_args(kind))}.")
        return value
    if value is None and NoneType in get_args(kind):
        return None
    wanted = without_none(kind)
    if get_origin(wanted) is list:
        if not isinstance(value, list) or not value:
            raise InputError(f"{name}={value!r} must be a list, one item after the other.")
        return [_of_kind(name, item, get_args(wanted)[0]) for item in value]
    if wanted is dict and isinstance(value, str):  # on the command line
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
    """Whether JSON gives ``value`` back as it is, so that files of a run can hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False


def without_none(kind: Any) -> Any:
    """``X`` of ``X | None``; another type as it is."""
    return next(one for one in get_args(kind) if one is not NoneType) if NoneType in get_args(kind) else kind
