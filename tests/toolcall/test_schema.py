"""JSON Schema of tools: what is refused, what breaks it, and bounds on both."""

import logging
import time

import pytest

from toolx_kernels.toolcall.json_schema import keywords
from toolx_kernels.toolcall.schema import arguments_fault, schema_fault, unknown_argument
from toolx_kernels.toolcall.tools import tool_schema

INT, TEXT, NULL = {"type": "integer"}, {"type": "string"}, {"type": "null"}


def fault_of(value, schema, **rest):
    parameters = {"type": "object", "properties": {"a": schema}, **rest}
    assert schema_fault(parameters) is None
    return arguments_fault({"a": value}, parameters)


RIGHT = [
    (None, {**INT, "nullable": True}),
    (None, {**TEXT, "enum": ["x"], "nullable": True}),
    (None, {"anyOf": [INT, TEXT], "nullable": True}),
    (None, {"$ref": "#/$defs/n", "nullable": True}),
    (None, {"anyOf": [INT, {**TEXT, "nullable": True}]}),
    ([1, None], {"type": "array", "items": {**INT, "nullable": True}}),
    ({"b": None}, {"type": "object", "properties": {"b": {**INT, "nullable": True}}, "required": ["b"]}),
    ({"b": [None]}, {"type": "object", "additionalProperties": {"items": {"const": 1, "nullable": True}}}),
    ({"x": 1}, {"type": "object", "properties": {}, "additionalProperties": {}}),
    ({"x": 1}, {"type": "object", "properties": {}, "unevaluatedProperties": INT}),
    (
        {"x_1": 1},
        {"type": "object", "properties": {}, "patternProperties": {"^x_": INT}, "additionalProperties": False},
    ),
    ({"b": 1, "c": "x"}, {"allOf": [{"properties": {"b": INT}}, {"properties": {"c": TEXT}}]}),
    ({"b": 1}, {"$ref": "#/$defs/o"}),
    ({"b": {"b": {}}}, {"$ref": "#/$defs/tree"}),
    (1.0, {"enum": [1, 2]}),
    (2.0, INT),
    (3, {"type": "integer", "exclusiveMinimum": 2, "maximum": 3}),
    (3, {"type": "integer", "minimum": 2, "exclusiveMinimum": True, "exclusiveMaximum": False, "maximum": 3}),
    ("ab", {"pattern": "^a"}),
    ("é", {"pattern": r"^\p{L}$"}),
    ("no date", {**TEXT, "format": "date"}),
    ([1, "x"], {"type": "array", "items": [INT, TEXT]}),
    ([1, "x", "y"], {"type": "array", "prefixItems": [INT], "items": TEXT}),
    (1, True),
    (1, {"description": None, "title": ["x"], "examples": 3, "example": 1, "default": {}}),
]
WRONG = [
    (True, {"enum": [1, 2]}, "a value that the schema lists"),
    (True, {"const": 1}, "a value that the schema lists"),
    ([False], {"enum": [[0]]}, "a value that the schema lists"),
    (None, {**INT, "nullable": False}, "type integer"),
    ("x", {**INT, "nullable": True}, "type integer"),
    (2, {"exclusiveMinimum": 2}, "breaks the rule exclusiveMinimum 2"),
    (2, {"minimum": 2, "exclusiveMinimum": True}, "breaks the rule minimum 2"),
    (4, {"maximum": 3}, "breaks the rule maximum 3"),
    (19.995, {"multipleOf": 0.01}, "multipleOf"),
    (10**400 + 1, {"multipleOf": 2.0}, "multipleOf"),
    ("b", {"pattern": "^a"}, "breaks the rule pattern '^a'"),
    ("x", {"$ref": "#/$defs/n"}, "argument 'a' is 'x', which is not of type integer"),
    ({"b": {"b": {"c": 1}}}, {"$ref": "#/$defs/tree"}, "the schema has no argument 'a.b.b.c'"),
    ({"d": 1}, {"allOf": [{"properties": {"b": INT}}, {"properties": {"c": TEXT}}]}, "no argument 'a.d'"),
    ([{"d": 1}], {"items": {"properties": {"b": INT}}}, "no argument 'a[0].d'"),
    ({"y": 1}, {"properties": {}, "patternProperties": {"^x_": INT}, "additionalProperties": False}, "argument 'a.y'"),
    ({"x_": "t"}, {"patternProperties": {"^x_": INT}}, "argument 'a.x_' is 't'"),
    ({"y": "t"}, {"additionalProperties": INT}, "argument 'a.y' is 't'"),
    (["x"], {"type": "array", "items": [INT]}, "argument 'a[0]' is 'x'"),
    (1, False, "the schema has no argument 'a'"),
    (1, {"oneOf": [INT, {"type": "number"}]}, "exactly one of the schemas in oneOf"),
    ([1, 1], {"uniqueItems": True}, "breaks the rule uniqueItems"),
]
DEFS = {
    "n": INT,
    "o": {"type": "object", "properties": {"b": INT}},
    "tree": {"type": "object", "properties": {"b": {"$ref": "#/$defs/tree"}}},
}


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        *RIGHT,
        (10**400, {"multipleOf": 0.5}),
        *((value, {"multipleOf": 0.01}) for value in (19.99, -0.07, 1e300, 3, 0.0, True, "x")),
        (0.3, {"multipleOf": 0.1, "$schema": "http://json-schema.org/draft-04/schema#"}),
    ],
)
def test_right_values(value, schema):
    assert fault_of(value, schema, **{"$defs": DEFS}) is None


@pytest.mark.parametrize(("value", "schema", "words"), WRONG)
def test_wrong_values(value, schema, words):
    assert words in fault_of(value, schema, **{"$defs": DEFS})


def test_a_schema_may_name_its_draft():
    old = {"$schema": "http://json-schema.org/draft-07/schema#"}
    pair = {"type": "array", "items": [INT], "additionalItems": TEXT}
    assert fault_of([1, "x"], pair, **old) is None and "a[1]" in fault_of([1, 2], pair, **old)
    assert "is 1" in fault_of(
        1, {"minimum": 1, "exclusiveMinimum": True}, **{"$schema": old["$schema"].replace("7", "4")}
    )
    inner = {**TEXT, "pattern": "^(a+)+$", "nullable": True, **old}  # the library alone would forget our meaning here
    assert fault_of(None, inner) is None
    for unknown in ("https://example.com/mine", "http://[", 5, [1]):
        assert fault_of(1, INT, **{"$schema": unknown}) is None


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"$ref": "https://example.com/s.json"}, ".properties.a.$ref is 'https://example.com/s.json'"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, ".properties.a.$ref"),
        ({"items": {"$ref": "#/$defs/missing"}}, ".properties.a.items.$ref is '#/$defs/missing'"),
        ({"$ref": "file:///etc/passwd"}, ".properties.a.$ref"),
        ({"$ref": "http://["}, ".properties.a.$ref"),
        ({"$ref": "#/type/x"}, ".properties.a.$ref"),
        ({"$ref": "#/required"}, ".properties.a.$ref"),
        ({"$dynamicRef": "#nowhere"}, ".properties.a.$dynamicRef"),
        ({"$id": "https://a.b/c", "items": {"$id": "http://["}}, ".properties.a.items.$id is no address"),
        ({"$ref": 5}, ".properties.a.$ref is 5"),
        ({"minLength": -1}, ".properties.a.minLength is -1, which breaks the rule minimum 0"),
        ({"anyOf": []}, ".properties.a.anyOf"),
        ({"not": {"type": "text"}}, ".properties.a.not.type is 'text', not one of"),
        ({"prefixItems": [{}, {"type": ["string", "x"]}]}, ".properties.a.prefixItems[1].type"),
        ({"additionalProperties": "no"}, ".properties.a.additionalProperties is 'no'"),
        ({"$defs": {"x": {"required": [1]}}}, ".properties.a.$defs.x.required[0] is 1"),
        ({"items": [{"type": "x"}]}, ".properties.a.items[0].type"),
        ({"pattern": 5}, ".properties.a.pattern is 5"),
        (5, ".properties.a is 5"),
        (None, ".properties.a is None"),
    ],
)
def test_what_is_no_schema_is_refused_with_its_place(schema, place, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", None)
    fault = schema_fault({"type": "object", "properties": {"a": schema}, "required": ["a"]}, "parameters")
    assert fault.startswith("parameters" + place) and "\n" not in fault


def test_schemas_with_references_and_addresses_inside_pass():
    inside = {"$id": "https://example.com/s", "properties": {"a": {"$ref": "https://example.com/s#/$defs/n"}}}
    assert schema_fault({**inside, "$defs": {"n": INT}}) is None
    assert (
        arguments_fault({"a": "x"}, {**inside, "$defs": {"n": INT}})
        == "argument 'a' is 'x', which is not of type integer"
    )
    assert schema_fault({"required": ["a", "a"], "properties": {"$ref": TEXT, "nullable": INT}}) is None


@pytest.mark.parametrize("pattern", [r"^(a|aa)+$", r"(", "(" * 3000])
def test_a_pattern_that_is_slow_or_none_constrains_nothing_and_is_told_once(pattern, caplog, monkeypatch):
    monkeypatch.setattr(keywords, "_patterns", {})
    text = "a" * 60 + "b"
    started = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert fault_of(text, {"pattern": pattern}) is None
            assert fault_of({text: 1}, {"patternProperties": {pattern: TEXT}, "additionalProperties": False}) is None
    assert len(caplog.records) == 1 and "is not checked" in caplog.text
    assert time.perf_counter() - started < 5


def test_references_without_end_end(monkeypatch):
    monkeypatch.setattr(keywords, "_STEPS", 1000)
    loop = {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"allOf": [{"$ref": "#/$defs/x"}]}}}
    assert schema_fault(loop) is None and "without end" in arguments_fault({"a": 1}, loop)
    twice = {f"x{n}": {"allOf": [{"$ref": f"#/$defs/x{n + 1}"}] * 2} for n in range(40)} | {"x40": {}}
    wide = {"properties": {"a": {"$ref": "#/$defs/x0"}}, "$defs": twice}
    assert schema_fault(wide) is None and "without end" in arguments_fault({"a": 1}, wide)


def test_deep_schemas_and_values_are_checked():
    schema, value = INT, "x"
    for _ in range(60):
        schema, value = {"type": "array", "items": schema}, [value]
    assert schema_fault({"properties": {"a": schema}}) is None
    assert "which is not of type integer" in arguments_fault({"a": value}, {"properties": {"a": schema}})
    assert "deeper than 64" in schema_fault({"properties": {"a": {"items": {"items": schema}}}, "x": [[[schema]]]})


def test_unknown_arguments():
    assert unknown_argument({"a": 1, "b": 1}, {"properties": {"a": {}}}) == "b"
    assert unknown_argument({"b": {"c": 1}}, {"properties": {"b": {"properties": {}}}}) is None, "only the arguments"
    for open_schema in ({}, {"properties": {}, "additionalProperties": {}}, {"properties": 5}, {"properties": {1j: 2}}):
        assert unknown_argument({"b": 1}, open_schema) is None


def test_the_schema_that_transformers_writes_of_optional_takes_null():
    def pay(amount: float | None = None, notes: list[str | None] | None = None):
        """Pays.

        Args:
            amount: How much.
            notes: What for.
        """

    parameters = tool_schema(pay)["function"]["parameters"]
    assert parameters["properties"]["amount"]["nullable"]
    assert schema_fault(parameters) is None
    for arguments in ({}, {"amount": None, "notes": None}, {"amount": 1, "notes": ["x", None]}):
        assert arguments_fault(arguments, parameters) is None
    assert "type number" in arguments_fault({"amount": "1"}, parameters)
