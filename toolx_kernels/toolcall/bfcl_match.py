"""BFCL match: comparison of calls with acceptable answers as the Berkeley Function Calling Leaderboard (BFCL) does."""

import re
from typing import Any

from toolx_kernels.toolcall.literals import TYPES, read_literal, split_type

_PYTHON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
_IGNORED = re.compile(r"[ ,./\-_*^]")


def bfcl_match(calls: list[dict] | None, tools: list[dict], possible_answers: list[dict], category: str) -> bool:
    """Whether BFCL's own AST checker accepts ``calls`` (bfcl-eval, ``ast_checker``).

    ``tools`` and ``possible_answers`` are those of a row from ``read_bfcl``: each possible answer is
    ``{tool name: {argument: [acceptable values]}}``, where "" among the values means that the argument may be left out.

    The rules are that checker's: string comparison ignores case, spaces and the characters ``,./-_*^``; an integer is
    accepted as a number, but not inside a list; parallel calls match in any order, and each expected call takes the
    first call that fits; members of an object, too, have lists of acceptable values; Java and JavaScript arguments are
    literals in strings. Returns False where that checker would crash on a model's output.

    In an irrelevance category the right answer has no call. None (malformed output) is never right.
    """
    if calls is None:
        return False
    if "irrelevance" in category:
        return not calls
    if len(calls) != len(possible_answers):
        return False
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    language = _language(category)
    left = list(calls)
    for expected in possible_answers:
        ((name, acceptable),) = expected.items()
        found = next((n for n, call in enumerate(left) if _fits(call, name, schemas[name], acceptable, language)), None)
        if found is None:
            return False
        del left[found]
    return True


def _language(category: str) -> str:
    return next((name for name in ("javascript", "java") if name in category), "python")


def possible_fault(tools: list[dict], possible_answers: Any, category: str) -> str | None:
    """Describes why ``bfcl_match`` cannot judge by ``possible_answers`` of a row with checked ``tools``; None if it
    can."""
    if not isinstance(possible_answers, list):
        return "it is not a list with one object for each expected call"
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    for n, expected in enumerate(possible_answers):
        acceptable = next(iter(expected.values())) if isinstance(expected, dict) and len(expected) == 1 else None
        if not isinstance(acceptable, dict) or not all(isinstance(options, list) for options in acceptable.values()):
            return f"entry {n} is not {{name: {{argument: [acceptable values]}}}}"
        (name,) = expected
        if name not in schemas:
            return f"entry {n} calls {name!r}, a tool that the row does not offer"
        properties = schemas[name].get("properties", {})
        for key, options in acceptable.items():
            fault = (key in properties and _type_fault(properties[key], _language(category))) or _options_fault(options)
            if fault:
                return f"argument {key!r} of entry {n} {fault}"
    return None


def _type_fault(schema: dict | bool, language: str) -> str | None:
    if isinstance(schema, bool):
        return f"has the schema {schema}, which names no type: BFCL's rules need one"
    if language == "python":
        outer = schema.get("type")
        items = schema.get("items")
        inner = items.get("type") if outer == "array" and isinstance(items, dict) else None
        known, needs_item = _PYTHON_TYPES, outer == "array"
    else:
        stated = schema.get("format")
        outer, inner = split_type(stated) if isinstance(stated, str) else (None, None)
        known, needs_item = TYPES[language], inner is not None
    if not isinstance(outer, str) or outer not in known:
        field = "type" if language == "python" else "format"
        return f"has the {field} {outer!r} in its schema; BFCL's rules accept {', '.join(known)}"
    if needs_item and (not isinstance(inner, str) or inner not in known):
        return f"has items of type {inner!r} in its schema; BFCL's rules accept {', '.join(known)}"
    return None


def _options_fault(options: list) -> str | None:
    """If one option is an object or an array, the others must have its type or be "". Members of objects must be lists
    of values. (A string there, as in one row of BFCL, counts as a list of its characters, as in BFCL's checker.)"""
    stated = [option for option in options if option != ""]
    if any(isinstance(option, dict | list) for option in stated) and len(set(map(type, stated))) > 1:
        return "mixes objects or arrays with values of another type"
    members = [member for option in stated for member in (option if isinstance(option, list) else [option])]
    if not all(isinstance(o, list | str) for member in members if isinstance(member, dict) for o in member.values()):
        return "has an object whose members are not lists of acceptable values"
    return None


def _fits(call: dict, name: str, schema: dict, acceptable: dict[str, list], language: str) -> bool:
    arguments, properties = call["arguments"], schema.get("properties", {})
    if call["name"] != name or any(key not in arguments for key in schema.get("required", ())):
        return False
    if any("" not in values and key not in arguments for key, values in acceptable.items()):
        return False
    return all(
        key in properties and key in acceptable and _is_acceptable(value, properties[key], acceptable[key], language)
        for key, value in arguments.items()
    )


def _is_acceptable(value: Any, schema: dict, acceptable: list, language: str) -> bool:
    if language == "python":
        kind: type[Any] = _PYTHON_TYPES[schema["type"]]
        item: type[Any] | None = _PYTHON_TYPES[schema["items"]["type"]] if kind is list else None
        if kind is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                return False
    else:
        if type(value) is not str:
            return False
        types = TYPES[language]
        outer, inner = split_type(schema["format"])
        kind, item = types[outer], types[inner] if inner else None
        value = read_literal(value, language, schema["format"])

    # Acceptable values whose type differs from the schema's are names of variables and compared unchanged.
    stated = next((type(option) for option in acceptable if option != ""), kind)
    if not _has_type(value, acceptable, kind, item, stated):
        return False
    if stated is kind and type(value) is kind:
        if kind is dict:
            return any(_fits_object(value, option) for option in acceptable)
        if item is dict:
            return any(len(value) == len(option) and all(map(_fits_object, value, option)) for option in acceptable)
        if kind is list:
            return [*map(_fold, value)] in [[*map(_fold, option)] for option in acceptable]
        if kind is str:
            return _fold(value) in [_fold(option) for option in acceptable if type(option) is str]
    return value in acceptable


def _has_type(value: Any, acceptable: list, kind: type[Any], item: type | None, stated: type) -> bool:
    if type(value) is not kind:
        return type(value) is stated
    if item is None:
        return True
    return any(
        type(option) is not list
        or all(type(each) is item or type(each) is next((type(o) for o in option if o != ""), item) for each in value)
        for option in acceptable
    )


def _fits_object(value: Any, option: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(option, dict)
        and all(key in option and _fold(each) in [*map(_fold, option[key])] for key, each in value.items())
        and all(key in value or "" in values for key, values in option.items())
    )


def _fold(value: Any) -> Any:
    """A string as BFCL compares it; any other value unchanged."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
