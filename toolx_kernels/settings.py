"""Settings: dataclass fields with help and bounds, whose values are checked against their types and bounds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from toolx_kernels.errors import InputError, did_you_mean, short
from toolx_kernels.files import expanded


class Bounds(NamedTuple):
    """The numbers that are allowed, and the end of the sentence "name=value must" for those that are not."""

    words: str
    allow: Callable[[float], bool]


# fp32 holds these numbers and their inverses
TINY, HUGE = 1e-30, 1e30
POSITIVE = Bounds(f"be positive and finite, from {TINY:g} to {HUGE:g}", lambda value: TINY <= value <= HUGE)
NOT_NEGATIVE = Bounds(f"lie in [0, {HUGE:g}]", lambda value: 0 <= value <= HUGE)
FINITE = Bounds(f"be finite, from -{HUGE:g} to {HUGE:g}", lambda value: -HUGE <= value <= HUGE)
SHARE = Bounds("lie in [0, 1]", lambda value: 0 <= value <= 1)
TEMPERATURE = Bounds(f"be 0 (greedy), or from {TINY:g} to {HUGE:g}", lambda value: value == 0 or TINY <= value <= HUGE)
TOP_P = Bounds("lie in (0, 1]", lambda value: 0 < value <= 1)
SECONDS = Bounds("be positive, and at most 1,000,000 seconds", lambda value: 0 < value <= 1e6)
LIMIT = Bounds("be -1 (no limit), or at least 1 and at most 10^18", lambda value: value == -1 or 1 <= value <= 10**18)
COUNT = 10**9  # the most of what is only counted up to


def between(least: int, most: int) -> Bounds:
    """Whole numbers from ``least`` to ``most``."""
    return Bounds(f"be at least {least} and at most {most:,}", lambda value: least <= value <= most)


TOP_K = between(0, COUNT)


def plain_number(value: Any) -> Any:
    """``value`` as an ``int`` or a ``float`` if it is a number of Python's, of NumPy's, or of a class derived from
    these; anything else unchanged, ``bool`` too."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    if isinstance(value, Integral):
        return int(value)
    try:
        return float(value)
    except OverflowError:  # a fraction
        return value


def check_number(name: str, value: Any, bounds: Bounds, *, whole: bool = True) -> Any:
    """The argument ``name`` as a plain number; raises InputError unless it is a number (or a whole one) within its
    bounds."""
    number = plain_number(value)
    if type(number) is not int and (whole or type(number) is not float):
        raise InputError(f"{name}={short(value)} must be a {'whole ' * whole}number.")
    if not bounds.allow(number):
        raise InputError(f"{name}={short(number)} must {bounds.words}.")
    return number


def setting(
    default: Any,
    help: str,
    *,
    least: int | None = None,
    most: int | None = None,
    bounds: Bounds | None = None,
    unbounded: str = "",
) -> Any:
    """A field of ``Settings``. A numeric field has bounds, from ``least`` to ``most`` or ``bounds``, or says why it has
    none. ``least`` is 1 by default and ``most`` is ``COUNT``; a number of which lists or tables are made has a smaller
    one, so that no list of that length exhausts a machine's memory.

    The help of a field with choices names each of them; a default of None is explained in the help, any other is added
    to it."""
    if least is not None or most is not None:
        bounds = between(1 if least is None else least, most or COUNT)
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
            for number in value if isinstance(value, list) else [value]:
                if bounds and number is not None:
                    check_number(each.name, number, bounds, whole=False)


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the field's type, or InputError. Numbers may be text, because YAML reads 5e-4 as text; text may be a
    path, lists may be tuples, and all may be of classes derived from the field's type."""
    if value is None and NoneType in get_args(kind):
        return None
    wanted = without_none(kind)
    if get_origin(wanted) is Literal:
        choices, plain = get_args(wanted), _plain(value, str)
        if plain not in choices:
            remedy = did_you_mean(value, choices, f"choose one of {', '.join(choices)}.")
            raise InputError(f"{name}={short(value)} is unknown: {remedy}")
        return plain
    if get_origin(wanted) is list:
        if not isinstance(value, list | tuple) or not value:
            raise InputError(f"{name}={short(value)} must be a list, one item after the other.")
        return [_of_kind(name, item, get_args(wanted)[0]) for item in value]
    plain = _plain(value, wanted)
    if plain is None:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a JSON object"}
        raise InputError(f"{name}={short(value)} must be {words[wanted]}.")
    if isinstance(plain, str):
        try:
            return expanded(plain)
        except InputError as error:
            raise InputError(f"{name}={error}") from None
    return plain


def _plain(value: Any, wanted: type) -> Any:
    """``value`` as an object of exactly this type; None if it is nothing of the kind."""
    if wanted is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return str.__str__(text) if isinstance(text, str) else None  # str() of a member of an enum is its name
    if wanted is dict:
        return _json_object(value)
    number = plain_number(value)
    if wanted is float and (isinstance(number, str) or type(number) is int):
        try:
            return float(number)
        except (ValueError, OverflowError):
            return None
    return number if type(number) is wanted else None


def _json_object(value: Any) -> dict | None:
    """The mapping, or the JSON text of one from the command line, as plain Python objects; None if it does not survive
    a round trip through JSON, so that no file of a run could hold it."""
    try:
        if isinstance(value, str):
            value = json.loads(value)
        given = dict(value) if isinstance(value, Mapping) else None
        plain = json.loads(json.dumps(given, allow_nan=False))
        return plain if plain == given else None
    except (TypeError, ValueError, RecursionError):
        return None


def without_none(kind: Any) -> Any:
    """``X`` for ``X | None``; any other type unchanged."""
    return next(one for one in get_args(kind) if one is not NoneType) if NoneType in get_args(kind) else kind
