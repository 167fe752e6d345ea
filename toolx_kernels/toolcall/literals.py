"""Java and JavaScript literals, as in BFCL's two language categories.

There every argument is a string that holds a literal of the language (``"42L"``, ``"new int[]{1, 2}"``), and BFCL's
checker reads it with a fixed set of patterns. ``read_literal`` follows those patterns, quirks included, so that scores
agree with BFCL's; ``write_literal`` writes a value so that they read it back. Text that no pattern matches stays text.
"""

import re
from typing import Any

JAVA_TYPES = {
    "byte": int, "short": int, "integer": int, "long": int, "float": float, "double": float, "boolean": bool,
    "char": str, "String": str, "any": str, "Array": list, "ArrayList": list, "HashMap": dict,
}  # fmt: skip
JAVASCRIPT_TYPES = {
    "integer": int, "Bigint": int, "float": float, "Boolean": bool, "String": str, "any": str, "array": list,
    "dict": dict,
}  # fmt: skip
TYPES = {"java": JAVA_TYPES, "javascript": JAVASCRIPT_TYPES}
# The patterns take quadratic time at worst, and no literal in BFCL has more than a few hundred characters.
MAX_LENGTH = 4000

_INTEGER = re.compile(r"^-?\d+$")
_DECIMAL = re.compile(r"^-?\d+(\.\d+)?$")
_JAVA_LONG = re.compile(r"^-?\d+[lL]$")
_JAVA_DOUBLE = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?$")
_JAVA_FLOAT = re.compile(r"^-?\d+(\.\d+)?([eE][+-]?\d+)?[fF]$")
_JAVA_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_JAVA_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_JAVA_ADDS = re.compile(r"new\s+ArrayList<\w*>\(\)\s*\{\{(.+?)\}\}", re.DOTALL)
_JAVA_EMPTY_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_JAVA_MAP = re.compile(r"new\s+HashMap<[^(){}]*>\s*\(\)\s*(?:\{\s*\{?([^}]*)\})?")
_JAVA_PUT = re.compile(r'put\("(.*?)",\s*(.*?)\)')
_JAVASCRIPT_BIGINT = re.compile(r"^-?\d+n$")
_JAVASCRIPT_ARRAY = re.compile(r"\[(.*?)\]|\bnew\s+Array\((.*?)\)")
_JAVASCRIPT_OBJECT = re.compile(r"\{(.*?)\}")
_JAVASCRIPT_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")


def split_type(name: str) -> tuple[str, str | None]:
    """``"ArrayList<long>"`` gives ``("ArrayList", "long")``, ``"boolean"`` gives ``("boolean", None)``."""
    outer, _, item = name.partition("<")
    return outer, item[:-1] or None


def read_literal(text: str, language: str, name: str) -> Any:
    """The value that BFCL's checker reads from ``text`` as a ``language`` literal of type ``name``
    (``"ArrayList<long>"``); ``text`` itself if it is not such a literal, is longer than ``MAX_LENGTH``, or contains a
    number too long to convert."""
    if len(text) > MAX_LENGTH:
        return text
    outer, item = split_type(name)
    try:
        return (_read_java if language == "java" else _read_javascript)(text, outer, item)
    except ValueError:
        return text


def write_literal(value: Any, language: str, name: str) -> str:
    """``value`` as a ``language`` literal of type ``name``. A string stays as it is: where ``name`` is another type,
    the string is the name of a variable."""
    if isinstance(value, str):
        return value
    return (_write_java if language == "java" else _write_javascript)(value, *split_type(name))


def _write_java(value: Any, name: str | None, item: str | None) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        puts = (f'put("{key}", {_write_java(each, "any", None)});' for key, each in value.items())
        return f"new HashMap<String, Object>() {{{{ {' '.join(puts)} }}}}"
    if isinstance(value, list):
        # BFCL's reader removes the quotes from strings of an ArrayList but keeps those of an array.
        bare = name == "Array"
        inside = ", ".join(each if bare and isinstance(each, str) else _write_java(each, item, None) for each in value)
        if bare:
            return f"new {'int' if item == 'integer' else item}[]{{{inside}}}"
        return f"new ArrayList<>(Arrays.asList({inside}))" if value else "new ArrayList<>()"
    return _write_plain(value) + {"long": "L", "float": "f"}.get(name or "", "")


def _write_javascript(value: Any, name: str, item: str | None) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, dict):
        members = (f"{key}: {_write_javascript(each, 'any', None)}" for key, each in value.items())
        return f"{{{', '.join(members)}}}"
    if isinstance(value, list):
        return f"[{', '.join(_write_javascript(each, item or 'any', None) for each in value)}]"
    return _write_plain(value) + ("n" if name == "Bigint" else "")


def _write_plain(value: bool | int | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _read_java(text: str, name: str | None, item: str | None) -> Any:
    if name in ("byte", "short", "integer"):
        return int(text) if _INTEGER.match(text) else text
    if name == "long":
        return int(text.rstrip("\n")[:-1]) if _JAVA_LONG.match(text) else text
    if name == "float":
        return float(text.rstrip("\n")[:-1]) if _JAVA_FLOAT.match(text) else text
    if name == "double":
        return float(text) if _JAVA_DOUBLE.match(text) else text
    if name == "boolean":
        return text == "true" if text in ("true", "false") else text
    if name == "Array":
        found = _JAVA_ARRAY.search(text)
        if not found:
            return text
        return [_read_java(part.strip(), item, None) for part in found[1].split(",") if part.strip()]
    if name == "ArrayList":
        return _read_array_list(text, item)
    if name == "HashMap":
        found = _JAVA_MAP.search(text)
        return {key: _read_untyped(each.strip()) for key, each in _JAVA_PUT.findall(found[1] or "")} if found else text
    return text


def _read_array_list(text: str, item: str | None) -> Any:
    if found := _JAVA_AS_LIST.search(text):
        parts = found[1].split(",")
    elif found := _JAVA_ADDS.search(text):
        parts = re.findall(r"add\((.+?)\)", found[1])
    else:
        return [] if _JAVA_EMPTY_LIST.search(text) else text
    parts = [part.strip() for part in parts]
    return [part[1:-1] if item in ("char", "String") else _read_java(part, item, None) for part in parts]


def _read_untyped(text: str) -> Any:
    """A value inside a HashMap, whose type is not stated."""
    if text in ("true", "false"):
        return text == "true"
    if text.startswith('"') and text.endswith('"'):
        return text[1:-1]
    if _JAVA_LONG.match(text):
        return int(text[:-1])
    if _JAVA_FLOAT.match(text):
        return float(text[:-1])
    return _number(text)


def _read_javascript(text: str, name: str, item: str | None) -> Any:
    if name == "String":
        return text[1:-1] if _quoted(text) else text
    if name == "integer":
        return int(text) if _INTEGER.match(text) else text
    if name == "float":
        return float(text) if _DECIMAL.match(text) else text
    if name == "Bigint":
        return int(text[:-1]) if _JAVASCRIPT_BIGINT.match(text) else text
    if name == "Boolean":
        return text == "true" if text in ("true", "false") else text
    if name == "array":
        return _read_array(text.strip(), item)
    if name == "dict":
        return _read_object(text.strip())
    return text


def _read_array(text: str, item: str | None) -> Any:
    found = _JAVASCRIPT_ARRAY.match(text)
    if not found:
        return text
    inside = (found[1] if found[1] is not None else found[2]).strip()
    parts = [part.strip() for part in inside.split(",")] if inside else []
    return [_read_javascript(part, item, None) if item else _read_member(part) for part in parts]


def _read_object(text: str) -> Any:
    if text == "{}":
        return {}
    found = _JAVASCRIPT_OBJECT.match(text)
    if not found:
        return text
    value = {}
    for key, each in _JAVASCRIPT_PAIR.findall(found[1]):
        each = each.strip()
        if each.startswith("[") and each.endswith("]"):
            each = _read_array(each, None)
        elif each.startswith("{") and each.endswith("}"):
            each = _read_object(each)
        else:
            each = _read_member(each.strip("'\""))
        value[key.strip().strip("'\"")] = each
    return value


def _read_member(text: str) -> Any:
    """A value inside an array or object, whose type is not stated."""
    text = text.strip()
    if text in ("true", "false"):
        return text == "true"
    return text[1:-1] if _quoted(text) else _number(text)


def _quoted(text: str) -> bool:
    return any(text.startswith(quote) and text.endswith(quote) for quote in "\"'")


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
