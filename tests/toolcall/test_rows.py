import itertools
import json
import math
import threading

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, bfcl_match, check_row, check_rows
from toolx_kernels.toolcall.rows import chat_message, with_calls

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
    for arguments in (CALL["arguments"], '{"a": 1}'):
        call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        assert check_row({**GOOD, "answer": [call]}, "d", 0) == check_row(GOOD, "d", 0)
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


def test_a_history_with_calls_is_read_as_templates_expect_it():
    """As OpenAI's clients and TRL's datasets have it."""
    call = {"name": "f", "arguments": {"a": 1}}
    listed = [
        {"id": "call_1", "type": "function", "function": {**call, "arguments": '{"a": 1}'}},
        {"type": "function", "function": call},
        call | {"id": None},
    ]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "on"}, {"type": "text", "text": "e"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": listed, "refusal": None},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        {"role": "tool", "content": None, "name": "f"},
        {"role": "tool", "content": {"degrees": 5}},
        {"role": "assistant", "function_call": call, "content": "Well."},
        {"role": "user", "content": "two", "tool_calls": None},
    ]
    row = check_row({**GOOD, "prompt": messages}, "d", 0)
    function = {"type": "function", "function": call}
    assert row.messages == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", **function}, function, function]},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
        {"role": "tool", "content": "null", "name": "f"},
        {"role": "tool", "content": '{"degrees": 5}'},
        {"role": "assistant", "content": "Well.", "tool_calls": [function]},
        {"role": "user", "content": "two"},
    ]
    assert row.user_text == "two" and check_row({**GOOD, "prompt": row.messages}, "d", 0) == row


@pytest.mark.parametrize(
    "calls", ["f", [5], [{"name": "f"}], [{"function": {"name": "f", "arguments": "[1]"}}], [{**CALL, "name": None}]]
)
def test_bad_calls_in_a_history_are_named(calls):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    with pytest.raises(InputError, match=r"d:0 \(id 'r'\): message 1 of field 'prompt' has 'tool_calls' that are not"):
        check_row({**GOOD, "prompt": messages}, "d", 0)


def changed(**fields):
    row = {**GOOD, **fields}
    return {key: value for key, value in row.items() if value is not ...}


def with_parameters(parameters):
    return changed(tools=[{"name": "f", "parameters": parameters}])


def with_argument(value):
    return changed(answer=[{"name": "f", "arguments": {"a": value}}])


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"items": value}
    return value


def judged(possible, schema=None, category="simple_python"):
    schema = {"type": "integer"} if schema is None else schema
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    return changed(tools=[function], answer=[], possible_answers=possible, category=category)


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
        (with_parameters("x"), ["tool 'f'", "parameters is 'x', which is not of type object"]),
        (with_parameters({"type": "dict", "properties": {}}), ["'dict'", "parameters.type"]),
        (with_parameters({"type": "array"}), ["'array'", "not 'object'"]),
        (
            with_parameters({"type": "object", "properties": []}),
            ["parameters.properties is [], which is not of type object"],
        ),
        (with_parameters({"properties": {"a": {"type": "float"}}}), ["parameters.properties.a.type", "'float'"]),
        (with_parameters({"properties": {"a": {"items": {"type": "any"}}}}), ["properties.a.items.type", "'any'"]),
        (with_parameters({"required": "a"}), ["parameters.required"]),
        (changed(answer=...), ["'answer' is missing"]),
        (changed(answer={"name": "f", "arguments": {}}), ["'answer' must be a list"]),
        (changed(answer=[{"name": "f"}]), ["call 0 of field 'answer'"]),
        (changed(answer=[CALL, {"name": "f", "arguments": "{}"}]), ["call 1 of field 'answer'"]),
        (changed(answer=["f"]), ["call 0 of field 'answer'"]),
        (changed(prompts=1), ["'prompts'", "reserved"]),
        (changed(level=nested(900)), ["field 'level'", "level is nested deeper than 64 levels"]),
        (changed() | {1: "a"}, ["column", "not 1"]),
        (changed(level=[threading.Lock()]), ["field 'level' is [<unlocked", "cannot be copied"]),
        (changed(level=(n for n in ())), ["field 'level' is <generator", "cannot be copied"]),
        (with_parameters({"properties": {"a": {"enum": "red"}}}), ["parameters.properties.a.enum is 'red'", "array"]),
        (with_parameters({"properties": {"a": {"anyOf": {"type": "string"}}}}), ["properties.a.anyOf", "array"]),
        (with_parameters({"properties": {"a": {"oneOf": ["string"]}}}), ["properties.a.oneOf[0]", "object"]),
        (with_parameters({"allOf": [{}, {"type": "float"}]}), ["parameters.allOf[1].type", "'float'"]),
        (with_parameters({"properties": {"a": {"default": math.inf}}}), ["tools[0]", "a.default", "inf"]),
        (with_parameters({"properties": {"a": {"enum": [math.nan]}}}), ["a.enum[0]", "nan"]),
        (with_parameters(nested(70)), ["tools is nested deeper than 64 levels"]),
        (with_parameters(nested(3_000)), ["tools is nested deeper than 64 levels"]),
        (with_argument(math.nan), ["answer[0].arguments.a", "nan"]),
        (with_argument([{"b": -math.inf}]), ["answer[0].arguments.a[0].b", "-inf"]),
        (with_argument(nested(70)), ["answer is nested deeper than 64 levels"]),
        (with_argument({1: "x"}), ["arguments.a", "key 1"]),
        (with_argument({1, 2}), ["arguments.a", "type set"]),
        (with_argument("\udfff"), ["arguments.a", "surrogate"]),
        (changed(answer=[{"name": "f", "arguments": {None: 1}}]), ["answer[0].arguments", "key None"]),
        (changed(answer='[{"name": "f", "arguments": {"a": NaN}}]'), ["'answer'", "NaN"]),
        (changed(answer='[{"name": "f", "arguments": {"a": -Infinity}}]'), ["'answer'", "-Infinity"]),
        (changed(answer='[{"name": "f", "arguments": {"a": 1e999}}]'), ["'answer'", "number"]),
        (changed(tools='[{"name": "f", "parameters": {"minimum": 1e999}}]'), ["'tools'", "number"]),
        (changed(answer=[CALL, {"name": "g", "arguments": {}}]), ["call 1", "'g'", "not offer"]),
        (changed(tools=[TOOL, {"name": "g", "parameters": {}}, FUNCTION]), ["'tools'", "'f' twice"]),
        (changed(prompt="a \ud800"), ["prompt", "\\ud800"]),
        (changed(prompt=[{"role": "user", "content": "\udc00"}]), ["prompt[0].content", "\\udc00"]),
        (changed(tier="accuracy"), ["'tier'", "'accuracy'"]),
        (changed(tier=3), ["'tier'", "3"]),
        (changed(category="accuracy"), ["'category'", "'accuracy'"]),
        (changed(category=["multiple"]), ["'category'", "['multiple']"]),
        (changed(possible_answers=[{"f": {"a": [1]}}]), ["'possible_answers'", "'category'"]),
        (judged("f"), ["'possible_answers'", "not a list"]),
        (judged(["f"]), ["'possible_answers'", "entry 0"]),
        (judged([{"f": {"a": [1]}}], True), ["'possible_answers'", "argument 'a' of entry 0", "the schema True"]),
        (judged([{"f": {"a": [1]}, "g": {}}]), ["entry 0"]),
        (judged([{}]), ["entry 0"]),
        (judged([{"f": {"a": [1]}}, {"f": {"a": 1}}]), ["entry 1"]),
        (judged([{"f": [1]}]), ["entry 0"]),
        (judged([{"g": {"a": [1]}}]), ["entry 0", "'g'", "not offer"]),
        (judged([{"f": {"a": [math.nan]}}]), ["possible_answers[0].f.a[0]", "nan"]),
        (judged([{"f": {"a": [[1], 2]}}]), ["'a'", "mixes"]),
        (judged([{"f": {"a": [{"k": 1}]}}]), ["'a'", "members"]),
        (judged([{"f": {"a": [[{"k": 1}]]}}]), ["'a'", "members"]),
        (judged([{"f": {"a": [1]}}], {}), ["'a'", "type None"]),
        (judged([{"f": {"a": [1]}}], {"type": ["integer", "null"]}), ["'a'", "type ['integer', 'null']"]),
        (judged([{"f": {"a": [[1]]}}], {"type": "array"}), ["'a'", "items", "None"]),
        (judged([{"f": {"a": [1]}}], category="simple_java"), ["'a'", "format None"]),
        (judged([{"f": {"a": [1]}}], {"type": "string", "format": "ArrayList<x>"}, "simple_java"), ["'a'", "'x'"]),
    ],
)
def test_bad_rows_are_named(raw, words):
    with pytest.raises(InputError) as error:
        check_row(raw, "data.jsonl", 7)
    message = str(error.value)
    assert "data.jsonl:7" in message and "\n" not in message
    assert isinstance(raw, str) or "'r'" in message
    assert [word for word in words if word not in message] == []


def test_a_bad_id_is_named():
    with pytest.raises(InputError, match=r"data.jsonl:7 \(id '\\ud800'\): id holds the lone surrogate"):
        check_row(changed(id="\ud800"), "data.jsonl", 7)


def test_a_column_may_hold_more_than_json():
    for value in ({1, 2}, math.nan, b"x", {1: "a"}, nested(60)):
        assert check_row(changed(level=value), "d", 0).columns == {"level": value}


def test_good_schemas_and_columns_pass():
    schema = {"anyOf": [{"enum": ["red", 1, None]}, {"oneOf": [{"type": "null"}]}], "allOf": [{}]}
    raw = {**with_parameters({"properties": {"a": schema}}), "tier": "easy", "category": None, "possible_answers": None}
    assert check_row(raw, "d", 0).columns == {"level": 3, "tier": "easy", "category": None, "possible_answers": None}
    assert check_row(with_argument(nested(60)), "d", 0).answer[0]["arguments"] == {"a": nested(60)}
    assert check_row(judged([{"f": {"a": [1, ""]}}]), "d", 0).columns["category"] == "simple_python"
    assert check_row(judged([], category="irrelevance"), "d", 0).columns["possible_answers"] == []


VALUES = [
    None, 1, 1.5, "", "x", "1L", "[1]", '{"k": 1}', {}, {"k": 1}, {"k": [1]}, {"k": ""}, {"k": {}}, [], [1], ["x"],
    [{}], [""], [{"k": [1]}], [{"k": 1}], [{}, {}], [{"k": [1]}, "x"], [[1]],
]  # fmt: skip
SCHEMAS = [
    *({"type": kind} for kind in ("string", "integer", "number", "object", "array", "null")),
    *({"type": "array", "items": {"type": kind}} for kind in ("string", "integer", "object", "array", "null")),
]
FORMATS = ["long", "String", "HashMap", "ArrayList", "ArrayList<HashMap>", "dict", "array", "array<dict>"]


@pytest.mark.parametrize(
    ("schema", "category"),
    [
        *((schema, "multiple") for schema in SCHEMAS),
        *(({"type": "string", "format": f}, f"simple_{name}") for f in FORMATS for name in ("java", "javascript")),
    ],
)
def test_possible_answers_that_pass_can_be_judged_by(schema, category):
    judged_by = 0
    for options in ([], *([value] for value in VALUES), *map(list, itertools.permutations(VALUES, 2))):
        try:
            row = check_row(judged([{"f": {"a": options}}], schema, category), "d", 0)
        except InputError:
            continue
        for arguments in ({}, {"b": 1}, *({"a": value} for value in VALUES)):
            calls = [{"name": "f", "arguments": arguments}]
            assert bfcl_match(calls, row.tools, row.columns["possible_answers"], category) in (True, False)
        judged_by += 1
    assert judged_by == 0 or judged_by > 100


def test_a_tool_without_properties_can_be_judged():
    row = check_row({**judged([{"f": {}}]), "tools": [{"name": "f", "parameters": {}}]}, "d", 0)
    judge = [row.tools, row.columns["possible_answers"], "simple_python"]
    assert bfcl_match([{"name": "f", "arguments": {}}], *judge)
    assert not bfcl_match([{"name": "f", "arguments": {"a": 1}}], *judge)


def test_bad_datasets():
    with pytest.raises(InputError, match="d holds no rows"):
        check_rows([], "d")
    with pytest.raises(InputError, match="'r' occurs twice"):
        check_rows([GOOD, GOOD], "d")
    row = check_row(GOOD, "d", 0)
    assert check_rows([row, {**GOOD, "id": 5}], "d") == [row, Row("5", "p", [TOOL], [CALL], {"level": 3})]


def test_all_rows_that_call_a_tool_they_do_not_offer_are_counted():
    wrong = [{**changed(answer=[CALL, {"name": name, "arguments": {}}]), "id": name} for name in "gh"]
    words = (
        r"^d: the answers of 2 of 4 rows call a tool that the row does not offer; the first: d:1 \(id 'g'\): call 1 .*"
        "'g'"
    )
    with pytest.raises(InputError, match=words):
        check_rows([GOOD, wrong[0], {**GOOD, "id": "ok"}, wrong[1]], "d")
    with pytest.raises(InputError, match="d:2 .*'prompt' is missing"):
        check_rows([GOOD, wrong[0], changed(prompt=...)], "d")
    with pytest.raises(InputError, match="^d:7 .*'g', a tool that the row does not offer"):
        check_row(wrong[0], "d", 7)


def test_rows_with_so_many_calls():
    rows = [check_row(changed(id=str(n), answer=[CALL] * calls), "d", n) for n, calls in enumerate((1, 0, 2, 1))]
    assert [row.id for row in with_calls(rows, 1)] == ["0", "3"] and [row.id for row in with_calls(rows, 0)] == ["1"]
    with pytest.raises(InputError, match=r"none of 4 rows has 3 calls .*, 0 \(1 rows\), 1 \(2 rows\), 2 \(1 rows\)\.$"):
        with_calls(rows, 3)


@pytest.mark.parametrize("write", [json.dumps, str], ids=["JSON", "Python"])
def test_messages_written_as_text(write):
    """As a cell of a CSV file holds them."""
    messages = [{"role": "system", "content": "It's s."}, {"role": "user", "content": "u"}]
    assert check_row({**GOOD, "prompt": f" {write(messages)}\n"}, "d", 0).prompt == messages
    for text in (
        write(messages) + " What is this?",
        write([messages[0], 5]),
        write([{"name": "x"}]),
        "[]",
        "[citation]",
    ):
        assert check_row({**GOOD, "prompt": text}, "d", 0).prompt == text
    with pytest.raises(InputError, match="message 0 of field 'prompt' must have a 'role' and a 'content'"):
        check_row({**GOOD, "prompt": write([{"role": "user"}])}, "d", 0)
    with pytest.raises(InputError, match="lone surrogate"):
        check_row({**GOOD, "prompt": json.dumps([{"role": "user", "content": "\ud800"}])}, "d", 0)


def test_texts_and_calls_of_a_message():
    message = {
        "role": "user",
        "content": [{"type": "text", "text": None}, {"type": "text", "text": "a"}, {"type": "text"}],
    }
    assert chat_message(message, "d")["content"] == "a"
    with pytest.raises(InputError, match="d must have a 'role' and a 'content' that are strings"):
        chat_message({"role": "user", "content": [{"type": "text", "text": 5}]}, "d")
    new, old = CALL, {"name": "g", "arguments": {}}
    for listed, call in (([new], new), ([], old), (None, old)):
        read = chat_message({"role": "assistant", "tool_calls": listed, "function_call": old}, "d")
        assert [each["function"] for each in read["tool_calls"]] == [call]
