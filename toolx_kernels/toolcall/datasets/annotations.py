"""Annotations of parameters, such as Python's, read as JSON Schema."""

from __future__ import annotations

import ast
import copy
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from toolx_kernels.toolcall.strict_json import json_fault

_LONGEST = 1000  # characters of an annotation that is read
_ALIASES = {
    "string": "str char character varchar path bytes",
    "integer": "int long short bigint uint",
    "number": "float double decimal numeric real",
    "boolean": "bool",
    "array": "list tuple set frozenset sequence iterable collection deque vector ndarray",
    "object": "dict dictionary map mapping mutablemapping hashmap ordereddict defaultdict record struct",
    "null": "none nonetype",
}
NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases.split())}
_FORMATS = {"datetime": "date-time", "date": "date", "time": "time", "uuid": "uuid"}
_WRAPPERS = ("annotated", "final", "readonly", "required")
_UNQUOTED = re.compile(r"""("[^"]*"|'[^']*')""")
_OF = re.compile(r"(\w+) of (.+)$")
_DEFAULT = re.compile(r"defaults?\b(?:\s+value)?(?:\s+(?:is|to)\b)?[\s:]*", re.IGNORECASE)


class Annotation(NamedTuple):
    """What the text of a parameter's type says."""

    schema: dict
    optional: bool  # the parameter may be left out
    unread: tuple[str, ...]  # parts without a meaning in JSON Schema, which may be anything


def read_annotation(text: str) -> Annotation:
    """Reads the type of a parameter: Python's annotations (``Optional[List[int]]``, ``dict[str, float] | None``,
    ``Literal["a", "b"]``, ``datetime``), such types with other brackets (``list(str)``, ``array<string>``,
    ``string[]``), alternatives by ``or``, ``list of str``, and remarks after a comma or in parentheses (``optional``,
    ``default=5``).

    A type that may be None is ``nullable``, as transformers writes it, and makes the parameter optional. Classes,
    callables and whatever else JSON Schema has no word for are ``unread``.
    """
    read = _read(text)
    is_flat = all(isinstance(value, str | bool) for value in read.schema.values())
    return read._replace(schema=dict(read.schema) if is_flat else copy.deepcopy(read.schema))


@lru_cache(maxsize=4096)
def _read(text: str) -> Annotation:
    stated, *remarks = _parts(text) or [""]
    head, _, inner = stated.rpartition(" (")
    if head and inner.endswith(")") and _remark(inner[:-1]) is not None:
        stated, remarks = head, [inner[:-1], *remarks]
    reader = _Reader()
    schema = reader.read_text(stated)
    optional = reader.optional or "nullable" in schema
    for remark in remarks:
        said = _remark(remark)
        if said is None:
            if not _Reader.can_read(remark):
                continue  # a hint such as "in days"
            reader.unread, schema = [text], {}
            break
        optional = said.pop("optional", optional)
        schema |= said
    return Annotation(schema, optional, tuple(reader.unread))


def _parts(text: str) -> list[str]:
    """``text`` split at commas, semicolons and equals signs outside brackets and quotes; the last become "default"."""
    parts, depth, quote = [""], 0, ""
    for n, sign in enumerate(text[:_LONGEST]):
        if quote or sign in "'\"":
            quote = "" if sign == quote else quote or sign
        elif sign in "([{<":
            depth += 1
        elif sign in ")]}" or sign == ">" and text[n - 1 : n] != "-":
            depth -= 1
        elif sign in ",;=" and depth == 0:
            parts.append("default " if sign == "=" else "")
            continue
        parts[-1] += sign
    return [part.strip() for part in parts] if len(text) <= _LONGEST else [text]


def _remark(text: str) -> dict | None:
    """What a remark says: ``optional``, and a ``default`` that is a literal. None if it is no such remark."""
    words = text.strip(" .:").lower()
    if words.startswith("optional"):
        return {"optional": True, **(_remark(text.strip()[len("optional") :].strip(" .:;()")) or {})}
    if words == "required":
        return {"optional": False}
    if found := _DEFAULT.match(text.strip()):
        return {"optional": True, **_default(text.strip()[found.end() :].strip())}
    return None


def _default(text: str) -> dict:
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return {} if value is None or json_fault(value, "default") else {"default": value}
    return {}


class _Reader:
    """Reads types, and collects what it cannot read."""

    def __init__(self) -> None:
        self.unread: list[str] = []
        self.optional = False
        self._whole: ast.expr | None = None

    @classmethod
    def can_read(cls, text: str) -> bool:
        reader = cls()
        reader.read_text(text)
        return not reader.unread

    def read_text(self, text: str) -> dict:
        """The schema of a type's text, ``{}`` if it cannot be read."""
        try:
            node = ast.parse(_as_python(text.rstrip("? ")), mode="eval").body
            self._whole = self._whole or node
            schema = self.read(node)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return self._nothing(text)
        return _nullable(schema) if text.endswith("?") else schema

    def read(self, node: ast.expr) -> dict:
        """The schema of an annotation."""
        match node:
            case ast.Constant(value=None):
                return {"type": "null"}
            case ast.Constant(value=str(text)):
                return self.read_text(text)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self._named(name, node)
            case ast.BinOp(op=ast.BitOr() | ast.Div()) | ast.BoolOp(op=ast.Or()):
                return self._union([*_operands(node)])
            case ast.List(elts=[item]):
                return self._array([item])
            case ast.Tuple(elts=items):
                return self._tuple(items)
            case ast.Set(elts=values):
                return self._literal(values, node)
            case ast.Subscript(value=outer, slice=ast.Tuple(elts=inner)):
                return self._generic(outer, inner, node)
            case ast.Subscript(value=outer, slice=inner):
                return self._generic(outer, [inner], node)
            case ast.Call(func=outer, args=inner, keywords=[]):
                return self._generic(outer, inner, node)
        return self._nothing(ast.unparse(node))

    def _nothing(self, text: str) -> dict:
        self.unread.append(text)
        return {}

    def _named(self, name: str, node: ast.expr) -> dict:
        found = _known(name.lower())
        return self._nothing(ast.unparse(node)) if found is None else dict(found)

    def _generic(self, outer: ast.expr, inner: list[ast.expr], node: ast.expr) -> dict:
        name = (outer.id if isinstance(outer, ast.Name) else getattr(outer, "attr", "")).lower()
        if name in ("optional", "union"):
            self.optional |= name == "optional" and node is self._whole
            return self._union([*inner, *([ast.Constant(None)] if name == "optional" else [])])
        if name == "literal":
            return self._literal(inner, node)
        if name in _WRAPPERS and inner:
            return self.read(inner[0])
        kind = (_known(name) or {}).get("type")
        if _is_dots(inner) and kind != "array":  # string[]
            return self._array([outer])
        if kind == "array":
            return self._tuple(inner) if name == "tuple" else self._array(inner)
        if kind == "object":
            values = self.read(inner[1]) if len(inner) == 2 else {}
            return {"type": "object", **({"additionalProperties": values} if values else {})}
        if kind is None:
            return self._nothing(ast.unparse(node))
        if node is self._whole:  # str(optional)
            self.optional |= any(isinstance(each, ast.Name) and each.id.lower() == "optional" for each in inner)
        return self._named(name, outer)  # varchar(255)

    def _array(self, items: list[ast.expr]) -> dict:
        schema = self._union([item for item in items if not _is_dots([item])])
        return {"type": "array", **({"items": schema} if schema else {})}

    def _tuple(self, items: list[ast.expr]) -> dict:
        if not items or _is_dots(items[-1:]):
            return self._array(items)
        schemas = [self.read(item) for item in items]
        return {"type": "array", "prefixItems": schemas, "minItems": len(schemas), "maxItems": len(schemas)}

    def _union(self, nodes: list[ast.expr]) -> dict:
        schemas = [self.read(node) for node in nodes]
        choices = [
            schema for n, schema in enumerate(schemas) if schema != {"type": "null"} and schema not in schemas[:n]
        ]
        if not choices or {} in choices:
            return {"type": "null"} if schemas and not choices else {}
        if len(choices) == 1:
            union = choices[0]
        elif all(choice.keys() == {"type"} for choice in choices):
            union = {"type": [choice["type"] for choice in choices]}
        else:
            union = {"anyOf": choices}
        return union if {"type": "null"} not in schemas else _nullable(union)

    def _literal(self, nodes: list[ast.expr], node: ast.expr) -> dict:
        try:
            values = [each.id if isinstance(each, ast.Name) else ast.literal_eval(each) for each in nodes]
        except (ValueError, TypeError):
            values = [node]
        if json_fault(values, "enum"):
            return self._nothing(ast.unparse(node))
        kinds = {type(value).__name__.lower() for value in values}
        kind = _known(kinds.pop()) if len(kinds) == 1 else None
        return {**(kind or {}), "enum": values}


def _known(name: str) -> dict | None:
    """The schema of a type's name, also of a plural and with a size in bits (``int64``)."""
    if name == "any":
        return {}
    if name in _FORMATS:
        return {"type": "string", "format": _FORMATS[name]}
    plain = name.rstrip("0123456789")
    found = NAMES.get(plain) or NAMES.get(plain.removesuffix("s"))
    return {"type": found} if found else None


def _nullable(schema: dict) -> dict:
    return {**schema, "nullable": True} if schema else schema


def _is_dots(nodes: list[ast.expr]) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], ast.Constant) and nodes[0].value is ...


def _operands(node: ast.expr) -> Iterator[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.Div):
        yield from _operands(node.left)
        yield from _operands(node.right)
    elif isinstance(node, ast.BoolOp):
        yield from node.values
    else:
        yield node


def _as_python(text: str) -> str:
    """``text`` with Python's brackets: ``array<string>`` becomes ``array[string]``, ``string[]`` becomes
    ``string[...]``, ``list of str`` becomes ``list[str]``."""
    parts = _UNQUOTED.split(text)
    parts[::2] = [
        part.replace("->", "-=").replace("<", "[").replace(">", "]").replace("[]", "[...]") for part in parts[::2]
    ]
    text = "".join(parts).strip()
    while found := _OF.search(text):
        text = f"{text[: found.start()]}{found[1]}[{found[2]}]"
    return text
