"""Type names of datasets as JSON Schema."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.annotations import read_annotation
from toolx_kernels.toolcall.datasets.read import rows_from
from toolx_kernels.toolcall.datasets.type_names import json_schema
from toolx_kernels.toolcall.schema import arguments_fault, schema_fault

STR, INT, NUM, BOOL = ({"type": name} for name in ("string", "integer", "number", "boolean"))


def listed(items):
    return {"type": "array", "items": items}


def mapped(values):
    return {"type": "object", "additionalProperties": values}


PAIR = {"type": "array", "prefixItems": [INT, STR], "minItems": 2, "maxItems": 2}
READ = {
    "str": STR, "list(str)": listed(STR), "array<string>": listed(STR), "string[]": listed(STR),
    "number[][]": listed(listed(NUM)), "List[Dict[str, int]]": listed(mapped(INT)), "typing.List[int]": listed(INT),
    "Dict[str, float]": mapped(NUM), "Map<string, Array<number>>": mapped(listed(NUM)), "dict": {"type": "object"},
    "Dict[str, Any]": {"type": "object"}, "list": {"type": "array"}, "array[]": {"type": "array"},
    "set": {"type": "array"}, "Set[int]": listed(INT), "Tuple[int, str]": PAIR, "(int, str)": PAIR,
    "tuple(int, str)": PAIR, "Tuple[int, ...]": listed(INT), "[str]": listed(STR), "list of strings": listed(STR),
    "array of arrays of integers": listed(listed(INT)), "Union[int, str]": {"type": ["integer", "string"]},
    "int or str": {"type": ["integer", "string"]}, "int/float": {"type": ["integer", "number"]},
    "List[int | str]": listed({"type": ["integer", "string"]}), "Union[List[int], str]": {"anyOf": [listed(INT), STR]},
    "Union[int, int]": INT, "Union[str, Any]": {}, "Any": {}, "None": {"type": "null"},
    'Literal["a","b"]': {**STR, "enum": ["a", "b"]}, "Literal['a<b', 'x[]']": {**STR, "enum": ["a<b", "x[]"]},
    "Literal[1, -2]": {**INT, "enum": [1, -2]}, "Literal[1, 'a', None]": {"enum": [1, "a", None]},
    "Literal[True]": {**BOOL, "enum": [True]}, "{'auto', 'manual'}": {**STR, "enum": ["auto", "manual"]},
    "datetime": {**STR, "format": "date-time"}, "datetime.date": {**STR, "format": "date"},
    "np.ndarray": {"type": "array"},
    "float64": NUM, "Annotated[int, 'x']": INT, "'int'": INT, 'List["int"]': listed(INT), "varchar(255)": STR,
    "List[Optional[int]]": listed({**INT, "nullable": True}), "str, in ISO format": STR, "str, required": STR,
}  # fmt: skip
OPTIONAL = {
    "Optional[int]": {**INT, "nullable": True}, "int | None": {**INT, "nullable": True},
    "Union[int, str, None]": {"type": ["integer", "string"], "nullable": True},
    "str or None": {**STR, "nullable": True}, "str(optional)": STR,
    "string?": {**STR, "nullable": True}, "Optional(str)": {**STR, "nullable": True}, "Optional[Any]": {},
    "dict[str, list[int]] | None": {**mapped(listed(INT)), "nullable": True}, "int, optional": INT,
    "List[int], optional": listed(INT), "str (optional)": STR,
    "bool, optional, default=True": {**BOOL, "default": True},
    "str, default 'x'": {**STR, "default": "x"}, "int (default: 5)": {**INT, "default": 5},
    "int = 5": {**INT, "default": 5},
    "float, defaults to 0.5": {**NUM, "default": 0.5}, "bool, default: false": {**BOOL, "default": False},
    "str, optional (default: 'a, b')": {**STR, "default": "a, b"}, "str, default None": STR, "str, default now": STR,
    **{f"float, default={value}": NUM for value in ("NaN", "1e400", "-Infinity", "nan", "'\\ud800'")},
    "dict, default={'a': [1, 2]}": {"type": "object", "default": {"a": [1, 2]}},
}  # fmt: skip
UNREAD = {
    "Foo": {}, "List[Foo]": {"type": "array"}, "Union[int, Foo]": {}, "Callable[[int], str]": {}, "complex": {},
    "int, float": {}, "Literal[1j]": {}, "": {}, "[[[": {}, "a\0b": {}, "List[int": {}, "f(x=1)": {}, "[" * 5000: {},
    "Literal[1e400]": {}, r"Literal['\ud800']": {},
    "int" + "|int" * 3000: {},
}  # fmt: skip


@pytest.mark.parametrize(("text", "schema"), (READ | OPTIONAL).items())
def test_types_that_are_read(text, schema):
    assert read_annotation(text) == (schema, text in OPTIONAL, ())
    assert schema_fault({"properties": {"a": schema}}) is None


@pytest.mark.parametrize(("text", "schema"), UNREAD.items())
def test_types_that_are_not_read_are_told(text, schema):
    read = read_annotation(text)
    assert (read.schema, read.optional) == (schema, False) and read.unread


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="aint, |[]()<>.?='\"=of{}:\0\\é", max_size=40))
def test_any_text_gives_a_schema(text):
    assert schema_fault({"properties": {"a": read_annotation(text).schema}}) is None


def flat(parameters, **tool):
    tools = [{"name": "f", "description": "", "parameters": parameters, **tool}]
    (row,) = rows_from([{"query": "q", "tools": tools, "answers": []}])
    return row.tools[0]["function"]["parameters"]


@pytest.mark.parametrize(
    ("parameters", "listed", "required"),
    [
        ({"a": {"type": "str"}, "b": {"type": "str", "default": ""}}, None, ["a"]),
        ({"a": {"type": "str", "required": True}, "b": {"type": "str"}}, None, ["a"]),
        ({"a": {"type": "str"}, "b": {"type": "str", "required": False}}, None, ["a"]),
        ({"a": {"type": "str, optional", "required": True}, "b": {"type": "int", "default": 1}}, None, ["a"]),
        ({"a": {"type": "str", "default": "x", "required": "true"}, "b": {"type": "str"}}, None, ["a"]),
        ({"a": {"type": "str"}, "b": {"type": "str"}}, ["b"], ["b"]),
        ({"a": {"type": "str", "required": True}, "b": {"type": "str"}}, [], []),
        ({"a": {"type": "str", "required": "yes"}, "b": {"type": "str"}}, None, ["a"]),
        ({"a": {"type": "str", "required": 1}, "b": {"type": "str", "required": 0.0}}, None, ["a"]),
        ({"a": {"type": "str"}, "b": {"type": "str", "optional": True}}, None, ["a"]),
        ({"a": {"type": "str", "optional": "no"}, "b": {"type": "str"}}, None, ["a"]),
        ({"a": {"type": "str"}, "b": {"type": "str"}, "c": {"type": "int"}}, "a, c", ["a", "c"]),
        ({"a": {"type": "str"}, "b": {"type": ["string", "null"]}}, None, ["a"]),
        ({"a": {"type": "bool, optional, default=True"}, "b": {"type": "int | None"}, "c": {}}, None, ["c"]),
    ],
)
def test_what_xlam_requires(parameters, listed, required):
    schema = flat(parameters, required=listed)
    assert schema["required"] == required
    assert not any({"required", "optional"} & spec.keys() for spec in schema["properties"].values())


def test_required_parameters_that_a_tool_does_not_have():
    with pytest.raises(InputError, match="field 'required' of tool 'f' is 'a, z': give a list of names"):
        flat({"a": {"type": "str"}}, required="a, z")


def test_a_list_of_types_in_flat_parameters():
    schema = flat({"a": {"type": ["string", "null"]}, "b": {"type": ["int", "list[str]"]}})
    assert schema["properties"]["b"] == {"anyOf": [INT, listed(STR)]}
    assert arguments_fault({"a": None, "b": ["x"]}, schema) is None
    assert arguments_fault({"a": 1, "b": 1}, schema)


def test_schemas_inside_xlam_parameters():
    inner = {"x": {"type": "float", "required": True}, "y": {"type": "list(str)"}}
    parameters = {
        "o": {"type": "dict", "properties": inner, "description": "An object."},
        "p": {"type": "dict", "properties": {"x": {"type": "int"}}, "required": ["x"]},
        "l": {"type": "list", "items": {"type": "str"}},
        "n": {"type": None, "description": "?"},
    }
    properties = flat(parameters)["properties"]
    assert properties["o"] == {
        "type": "object", "properties": {"x": NUM, "y": listed(STR)}, "description": "An object.", "required": ["x"]
    }  # fmt: skip
    assert properties["p"]["required"] == ["x"] and properties["l"] == listed(STR)
    assert properties["n"] == {"description": "?"}
    assert flat(parameters)["required"] == ["o", "p", "l", "n"]


def test_an_optional_argument_may_be_null():
    schema = flat({"a": {"type": "Optional[int]"}, "b": {"type": "Tuple[int, str]"}})
    assert arguments_fault({"a": None, "b": [1, "x"]}, schema) is None
    assert "type integer" in arguments_fault({"a": "x", "b": [1, "x"]}, schema)
    assert "b[1]" in arguments_fault({"b": [1, 2]}, schema) and "minItems" in arguments_fault({"b": [1]}, schema)


def test_types_that_cannot_be_read_are_counted_once(caplog):
    parameters = {
        "a": {"type": "Foo"},
        "b": {"type": "List[Foo]"},
        "c": {"type": "int"},
        "d": {"items": {"type": "Bar"}},
    }
    row = {"query": "q", "tools": [{"name": "f", "parameters": parameters}], "answers": []}
    with caplog.at_level(logging.WARNING):
        rows = rows_from([row, row], "set")
    assert rows[0].tools[0]["function"]["parameters"]["properties"] == {
        "a": {},
        "b": {"type": "array"},
        "c": INT,
        "d": {"items": {}},
    }
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "read and" in message] == [
        "set: 6 types of parameters cannot be read and may be anything: 'Foo' (4), 'Bar' (2)"
    ]


def test_names_in_schemas():
    spec = {"type": "dict", "properties": {"a": {"description": "d", "type": "float"}, "b": {"type": "list(str)"}}}
    assert json_schema(spec) == {
        "type": "object", "properties": {"a": {"description": "d", "type": "number"}, "b": listed(STR)}
    }  # fmt: skip
    assert list(json_schema(spec)["properties"]["a"]) == ["description", "type"], "a prompt shows this order"
    assert json_schema({"type": ["str", "None"]}) == {"type": ["string", "null"]}
    assert json_schema({"anyOf": [{"type": "int"}, {"type": "map"}]}) == {"anyOf": [INT, {"type": "object"}]}
    assert json_schema({"additionalProperties": {"type": "tuple"}, "type": "any"})["additionalProperties"] == {
        "type": "array"
    }
    assert json_schema({"type": "prose"}) == {"type": "prose"}, "refused when the row is checked"
    assert json_schema({"properties": {"x": {"type": "Any"}, "y": {"type": ["any", "null"]}}}) == {
        "properties": {"x": {}, "y": {}}
    }
    any_text = json_schema({"properties": {"x": {"type": "any"}, "y": {"type": ["any", "null"]}}}, any_as="string")
    assert any_text == {"properties": {"x": STR, "y": {"type": ["string", "null"]}}}


def test_flags_of_nested_properties():
    inner = {"b": {"type": "string", "required": True}, "c": {"type": "str", "required": "false"}}
    spec = {"type": "object", "properties": {"a": {"type": "object", "required": True, "properties": inner}}}
    assert json_schema(spec) == {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": STR, "c": STR}, "required": ["b"]}},
        "required": ["a"],
    }
    listing = {"type": "object", "optional": True, "properties": {"b": STR}, "required": ["b"]}
    kept = {"type": "object", "properties": {"b": STR}, "required": ["b"]}
    assert json_schema({"properties": {"a": listing}}) == {"properties": {"a": kept}}
