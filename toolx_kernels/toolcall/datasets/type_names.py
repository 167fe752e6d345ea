"""Type names of datasets, read as JSON Schema."""

import re

from toolx_kernels.toolcall.json_schema.validity import JSON_TYPES

# BFCL's checker expects a string where its data say "any"; ToolACE uses the same names.
_NAMES = {
    "dict": "object", "map": "object", "float": "number", "double": "number", "int": "integer", "long": "integer",
    "bool": "boolean", "str": "string", "any": "string", "list": "array", "tuple": "array", "set": "array",
}  # fmt: skip
_OPTIONAL_SUFFIX = re.compile(r",?\s*optional\.?$", re.IGNORECASE)


def json_schema(spec: dict) -> dict:
    """A copy of ``spec`` with JSON Schema's type names in every property and item: ``dict`` becomes ``object``,
    ``float`` becomes ``number``, ``tuple`` becomes ``array``, ``any`` becomes ``string``. Unknown names stay."""
    schema = dict(spec)
    name = schema.get("type")
    if isinstance(name, str):
        schema["type"] = _NAMES.get(name.lower(), name.lower() if name.lower() in JSON_TYPES else name)
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {
            key: json_schema(value) if isinstance(value, dict) else value for key, value in schema["properties"].items()
        }
    if isinstance(schema.get("items"), dict):
        schema["items"] = json_schema(schema["items"])
    return schema


def annotation_schema(annotation: str) -> dict:
    """The schema of a Python annotation: ``"List[int], optional"`` gives an array of integers.

    Types for which JSON Schema has no single name (``Union[...]``, ``Any``, a class) stay unconstrained: ``{}``.
    """
    annotation = _OPTIONAL_SUFFIX.sub("", annotation.strip())
    head, _, inner = annotation.partition("[")
    head, inner = head.strip().lower(), inner[:-1]
    if head == "optional":
        return annotation_schema(inner)
    if head == "any":
        return {}
    name = _NAMES.get(head, head)
    if name not in JSON_TYPES:
        return {}
    if head == "list" and inner:
        return {"type": "array", "items": annotation_schema(inner)}
    return {"type": name}
