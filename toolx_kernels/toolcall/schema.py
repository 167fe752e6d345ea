"""JSON Schema from the type names that data sets use instead of it."""

import re
from typing import Any

JSON_TYPES = frozenset({"string", "integer", "number", "boolean", "array", "object", "null"})
# BFCL's checker wants a string where its data say "any"; ToolACE follows the same naming.
_NAMES = {
    "dict": "object", "map": "object", "float": "number", "double": "number", "int": "integer", "long": "integer",
    "bool": "boolean", "str": "string", "any": "string", "list": "array", "tuple": "array", "set": "array",
}  # fmt: skip
_OPTIONAL_SUFFIX = re.compile(r",?\s*optional\.?$", re.IGNORECASE)


def json_schema(spec: dict) -> dict:
    """A copy of `spec` whose type names are JSON Schema's, in every property and item: `dict` becomes `object`,
    `float` becomes `number`, `tuple` becomes `array`, `any` becomes `string`. Names it does not know stay."""
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
    """The schema of a Python annotation in words: `"List[int], optional"` gives an array of integers.

    What JSON Schema has no single word for (`Union[...]`, `Any`, a class) is left unconstrained: `{}`.
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


def schema_fault(schema: Any, path: str = "") -> str | None:
    """What keeps `schema` from being a JSON schema, in words, or None. `path` names the place inside the tool."""
    if not isinstance(schema, dict):
        return f"{path} is not an object"
    names = schema.get("type", [])
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or name not in JSON_TYPES:
            return f"{path}.type is {name!r}, which is none of {', '.join(sorted(JSON_TYPES))}"
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        return f"{path}.properties is not an object"
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        return f"{path}.required is not a list of names"
    inner = [(f"{path}.properties.{name}", value) for name, value in properties.items()]
    if isinstance(schema.get("items"), dict):
        inner.append((f"{path}.items", schema["items"]))
    return next((fault for where, value in inner if (fault := schema_fault(value, where))), None)
