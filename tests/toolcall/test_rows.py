import json

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, check_row, check_rows

FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"name": "f", "arguments": {"a": 1}}
GOOD = {"id": "r", "prompt": "p", "tools": [TOOL], "answer": [CALL], "level": 3}


def test_a_row():
    row = check_row(GOOD, "data.jsonl", 7)
    assert row == Row("r", "p", [TOOL], [CALL], {"level": 3})
    assert row.messages == [{"role": "user", "content": "p"}] and row.user_text == "p" and row.tool_names == ["f"]


def test_other_spellings_give_the_same_row():
    assert check_row({**GOOD, "tools": [FUNCTION]}, "d", 0) == check_row(GOOD, "d", 0)
    text = {**GOOD, "tools": json.dumps([FUNCTION]), "answer": json.dumps([CALL])}
    assert check_row(text, "d", 0) == check_row(GOOD, "d", 0)


def test_messages_and_default_id():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    row = check_row({"prompt": messages, "tools": [], "answer": []}, "d.jsonl", 4)
    assert row.messages == messages and row.user_text == "three" and row.id == "d.jsonl:4" and row.columns == {}


def changed(**fields):
    row = {**GOOD, **fields}
    return {key: value for key, value in row.items() if value is not ...}


def with_parameters(parameters):
    return changed(tools=[{"name": "f", "parameters": parameters}])


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("text", ["row", "'text'"]),
        (changed(prompt=...), ["'prompt' is missing"]),
        (changed(prompt=""), ["'prompt' is missing or empty"]),
        (changed(prompt=" \n"), ["'prompt' is missing or empty"]),
        (changed(prompt=[]), ["'prompt' is missing or empty"]),
        (changed(prompt=5), ["'prompt'", "5"]),
        (changed(prompt=[{"role": "user"}]), ["message 0", "content"]),
        (changed(prompt=[{"role": "system", "content": "s"}]), ["role 'user'"]),
        (changed(tools=...), ["'tools' is missing"]),
        (changed(tools=None), ["'tools' is missing"]),
        (changed(tools="[{"), ["'tools'", "not JSON"]),
        (changed(tools=TOOL), ["'tools' must be a list"]),
        (changed(tools=["f"]), ["tool 0", "'f'"]),
        (changed(tools=[{"parameters": {}}]), ["tool 0", "'name'"]),
        (changed(tools=[{"name": "f"}]), ["tool 'f'", "'parameters'"]),
        (with_parameters("x"), ["tool 'f'", "parameters is not an object"]),
        (with_parameters({"type": "dict", "properties": {}}), ["'dict'", "parameters.type"]),
        (with_parameters({"type": "array"}), ["'array'", "not 'object'"]),
        (with_parameters({"type": "object", "properties": []}), ["parameters.properties is not an object"]),
        (with_parameters({"properties": {"a": {"type": "float"}}}), ["parameters.properties.a.type", "'float'"]),
        (with_parameters({"properties": {"a": {"items": {"type": "any"}}}}), ["properties.a.items.type", "'any'"]),
        (with_parameters({"required": "a"}), ["parameters.required"]),
        (changed(answer=...), ["'answer' is missing"]),
        (changed(answer={"name": "f", "arguments": {}}), ["'answer' must be a list"]),
        (changed(answer=[{"name": "f"}]), ["call 0 of field 'answer'"]),
        (changed(answer=[CALL, {"name": "f", "arguments": "{}"}]), ["call 1 of field 'answer'"]),
        (changed(answer=["f"]), ["call 0 of field 'answer'"]),
        (changed(prompts=1), ["'prompts'", "reserved"]),
    ],
)
def test_bad_rows_are_named(raw, words):
    with pytest.raises(InputError) as error:
        check_row(raw, "data.jsonl", 7)
    message = str(error.value)
    assert "data.jsonl:7" in message and "\n" not in message
    assert isinstance(raw, str) or "'r'" in message
    assert [word for word in words if word not in message] == []


def test_bad_datasets():
    with pytest.raises(InputError, match="d holds no rows"):
        check_rows([], "d")
    with pytest.raises(InputError, match="'r' occurs twice"):
        check_rows([GOOD, GOOD], "d")
    row = check_row(GOOD, "d", 0)
    assert check_rows([row, {**GOOD, "id": 5}], "d") == [row, Row("5", "p", [TOOL], [CALL], {"level": 3})]
