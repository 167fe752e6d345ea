"""Rows in every form that people have, in every container that they come in."""

import json
import logging
import re

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import read_dataset, read_jsonl, rows_from

WEATHER = {
    "name": "weather",
    "description": "Weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
        "required": ["city"],
    },
}
TAXES = {
    "name": "taxes",
    "description": "Taxes.",
    "parameters": {"type": "object", "properties": {"year": {"type": "integer"}}, "required": ["year"]},
}
OPENAI_TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, TAXES)]
CALLS = [
    [{"name": "weather", "arguments": {"city": "Oslo"}}],
    [{"name": "taxes", "arguments": {"year": 2024}}, {"name": "weather", "arguments": {"city": "Rome", "unit": "C"}}],
    [],
]
ASKED = ["Weather in Oslo?", "Taxes of 2024, weather in Rome?", "Hello!"]
FLAT = [
    {
        "name": "weather",
        "description": "Weather.",
        "parameters": {
            "city": {"type": "str", "description": "Where."},
            "unit": {"type": "str, optional", "description": "C or F."},
        },
    },
    {"name": "taxes", "description": "Taxes.", "parameters": {"year": {"type": "int", "description": "When."}}},
]
SYSTEM = (
    "Call functions. <tools></tools> holds them:\n<tools>\n{}\n</tools>\nAnswer with <tool_call>{{...}}</tool_call>."
)


def text(value):
    return json.dumps(value, ensure_ascii=False)


def openai_turn(calls, as_text=True):
    if not calls:
        return {"role": "assistant", "content": "Hello to you.", "tool_calls": None}
    functions = [{"name": c["name"], "arguments": text(c["arguments"]) if as_text else c["arguments"]} for c in calls]
    listed = [{"id": f"call_{n}", "type": "function", "function": function} for n, function in enumerate(functions)]
    return {"role": "assistant", "content": None, "tool_calls": listed}


def openai(asked, calls, **options):
    return {"messages": [{"role": "user", "content": asked}, openai_turn(calls, **options)], "tools": OPENAI_TOOLS}


def trl(asked, calls):
    return {
        "prompt": [{"role": "user", "content": asked}],
        "completion": [openai_turn(calls, as_text=False)],
        "tools": OPENAI_TOOLS,
    }


def hermes(asked, calls, notation=str, role="gpt"):
    """The published rows write Python's notation, in the tools and in the calls."""
    written = "\n".join(f"<tool_call>\n{notation(call)}\n</tool_call>" for call in calls)
    return {
        "conversations": [
            {"from": "system", "value": SYSTEM.format(notation(OPENAI_TOOLS))},
            {"from": "human", "value": asked},
            {"from": role, "value": written or "Hello to you."},
        ],
        "category": "home",
    }


def sharegpt(asked, calls):
    turn = {"from": "function_call", "value": text(calls)} if calls else {"from": "gpt", "value": "Hello to you."}
    return {"conversations": [{"from": "human", "value": asked}, turn], "tools": text([WEATHER, TAXES]), "system": None}


def toolace(asked, calls):
    names = (", ".join(f"{key}={value!r}" for key, value in call["arguments"].items()) for call in calls)
    written = ", ".join(f"{call['name']}({arguments})" for call, arguments in zip(calls, names, strict=True))
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": f"[{written}]" if calls else "Hello."}]
    return {"system": f"Functions: {text([WEATHER, TAXES])}", "conversations": turns}


FORMS = {
    "toolx": lambda asked, calls: {"prompt": asked, "tools": OPENAI_TOOLS, "answer": calls},
    "OpenAI": openai,
    "OpenAI, arguments in objects": lambda asked, calls: openai(asked, calls, as_text=False),
    "TRL": trl,
    "TRL as text": lambda asked, calls: trl(asked, calls)
    | {"prompt": asked, "completion": hermes(asked, calls)["conversations"][2]["value"], "tools": text(OPENAI_TOOLS)},
    "TRL, messages as text": lambda asked, calls: {
        name: text(value) for name, value in trl(asked, calls).items()
    },
    "xLAM": lambda asked, calls: {"id": asked, "query": asked, "tools": text(FLAT), "answers": text(calls)},
    "xLAM in objects": lambda asked, calls: {"query": asked, "tools": OPENAI_TOOLS, "answers": calls},
    "xLAM, flat in objects": lambda asked, calls: {"query": asked, "tools": FLAT, "answers": calls},
    "xLAM of other names": lambda asked, calls: {"instruction": asked, "functions": text(FLAT), "output": text(calls)},
    "xLAM with OpenAI's calls": lambda asked, calls: {
        "question": asked, "tools": OPENAI_TOOLS, "answers": openai_turn(calls)["tool_calls"] or [],
    },
    "ToolACE": toolace,
    "Hermes": hermes,
    "Hermes in JSON": lambda asked, calls: hermes(asked, calls, text, role="assistant"),
    "ShareGPT": sharegpt,
}  # fmt: skip


def as_lines(rows, folder):
    (folder / "rows.jsonl").write_text("".join(text(row) + "\n" for row in rows))
    return read_dataset(str(folder / "rows.jsonl"))


def as_array(rows, folder):
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    return read_dataset(str(folder / "rows.json"))


def as_arrow(rows, folder):
    return rows_from(datasets().Dataset.from_list(rows))


def as_arrows_lines(rows, folder):
    datasets().Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    return read_jsonl(folder / "rows.jsonl")


def as_splits(rows, folder):
    d = datasets()
    return rows_from(d.DatasetDict(test=d.Dataset.from_list(rows[:1]), train=d.Dataset.from_list(rows)))


def as_stream(rows, folder):
    return rows_from(datasets().IterableDataset.from_generator(lambda: iter(rows)))


def as_frame(rows, folder):
    return rows_from(pytest.importorskip("pandas").DataFrame(rows))


def as_parquet(rows, folder):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_parquet(folder / "rows.parquet")
    read = pandas.read_parquet(folder / "rows.parquet")
    return rows_from(read)


CONTAINERS = {
    "list": lambda rows, folder: rows_from(rows),
    "tuple": lambda rows, folder: rows_from(tuple(rows)),
    "generator": lambda rows, folder: rows_from(row for row in rows),
    "lines": as_lines,
    "array": as_array,
    "Dataset": as_arrow,
    "Dataset.to_json": as_arrows_lines,
    "DatasetDict": as_splits,
    "IterableDataset": as_stream,
    "DataFrame": as_frame,
    "parquet": as_parquet,
}


def datasets():
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_container(form, container, tmp_path):
    rows = CONTAINERS[container](
        [FORMS[form](asked, calls) for asked, calls in zip(ASKED, CALLS, strict=True)], tmp_path
    )
    assert [row.user_text for row in rows] == ASKED
    assert [[message["role"] for message in row.messages] for row in rows] == [["user"]] * 3
    assert [row.answer for row in rows] == CALLS
    for row in rows:
        weather, taxes = (tool["function"] for tool in row.tools)
        assert (weather["name"], taxes["name"]) == ("weather", "taxes")
        assert weather["parameters"]["required"] == ["city"] and taxes["parameters"]["required"] == ["year"]
        assert taxes["parameters"]["properties"]["year"]["type"] == "integer"
        assert None not in weather["parameters"]["properties"].values()
        assert set(weather["parameters"]["properties"]) == {"city", "unit"}


def said(caplog, rows):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        rows_from(rows, "set")
    (message,) = caplog.messages
    return message


def test_the_form_is_said_with_what_was_left_out_and_cut(caplog):
    assert said(caplog, [FORMS["xLAM"](ASKED[0], CALLS[0])]) == "set: 1 row in the form of xLAM (query, tools, answers)"
    assert said(caplog, [FORMS["toolx"]("q", [])]) == "set: 1 row in the form of toolx (prompt, tools, answer)"
    going_on = openai(ASKED[0], CALLS[0])
    going_on["messages"] += [{"role": "tool", "content": {"degrees": 5}}, {"role": "assistant", "content": "5."}]
    unanswered = {"messages": going_on["messages"][:1], "tools": OPENAI_TOOLS}
    assert said(caplog, [going_on, unanswered, FORMS["OpenAI"](ASKED[1], CALLS[1])]) == (
        "set: 2 rows in the form of OpenAI (messages, tools); 1 left out: no turn of the assistant; 1 cut after the"
        " answer"
    )


def left_out(**changes):
    """The reason for which a changed row in OpenAI's form is left out."""
    with pytest.raises(InputError) as error:
        rows_from([FORMS["OpenAI"](ASKED[0], CALLS[0]) | changes], "set")
    message = str(error.value)
    assert message.endswith("give a dataset with at least one (set is read as OpenAI: messages, tools).")
    return message.partition("1 left out: ")[2].partition(")")[0]


def test_rows_that_cannot_be_used_are_left_out():
    user, turn = FORMS["OpenAI"](ASKED[0], CALLS[0])["messages"]
    assert left_out(tools=None) == left_out(tools=[]) == "no tools"
    assert left_out(messages=[user]) == "no turn of the assistant"
    assert left_out(messages=[turn]) == "no turn of the user before the assistant's"
    assert left_out(tools=OPENAI_TOOLS[1:]) == "a call of a tool that the row does not offer"
    assert left_out(tools=[*OPENAI_TOOLS, {**WEATHER, "description": "?"}]) == "two different tools of one name"
    for written in (
        "<tool_call>oops</tool_call>",
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "weather"',
        "<tool_call></tool_call>",
    ):
        assert left_out(messages=[user, {"role": "assistant", "content": written}]) == "calls that cannot be read"
    for written in ('<functioncall> {"name": "weather", "arguments": ...}', "I call weather(city=Oslo)."):
        assert left_out(messages=[user, {"role": "assistant", "content": written}]) == "calls that cannot be read"
    system = {"role": "system", "content": "<tools>[{oops</tools>"}
    assert left_out(messages=[system, user, turn], tools=None) == "tools that cannot be read"


def test_the_first_turn_with_calls_is_the_answer():
    user, turn = FORMS["OpenAI"](ASKED[0], CALLS[0])["messages"]
    system, asked = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Where?"}
    later = [{"role": "tool", "content": "5", "tool_call_id": "call_0"}, openai_turn(CALLS[1])]
    row = {"messages": [system, user, asked, user, turn, *later], "tools": [*OPENAI_TOOLS, OPENAI_TOOLS[0]], "level": 3}
    (read,) = rows_from([row])
    assert (read.prompt, read.answer) == ([system, user, asked, user], CALLS[0])
    assert read.tools == OPENAI_TOOLS and read.columns == {"level": 3}, "a tool that is listed twice is offered once"
    parallel = [{"from": "function_call", "value": text(call)} for call in CALLS[1]]
    row = sharegpt(ASKED[0], CALLS[0])
    row["conversations"][1:] = [*parallel, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "Done."}]
    assert [read.answer for read in rows_from([row | {"system": "Be brief."}])] == [CALLS[1]]
    (read,) = rows_from([row | {"system": "Be brief."}])
    assert read.prompt == [system, {"role": "user", "content": ASKED[0]}]


@pytest.mark.parametrize(
    "written",
    [
        text(CALLS[0][0]),
        text(CALLS[0]),
        f"[TOOL_CALLS] {text(CALLS[0])}",
        text({"name": "weather", "parameters": {"city": "Oslo"}}),
        '[weather(city="Oslo")]',
        f"<think>Hm, weather().</think>\n<tool_call>{CALLS[0][0]}</tool_call>",
    ],
)
def test_calls_in_the_text_of_a_turn_are_read_in_every_format_that_models_write(written):
    turns = [{"role": "user", "content": "<tools>[?]</tools>"}, {"role": "assistant", "content": written}]
    (row,) = rows_from([{"messages": turns, "tools": OPENAI_TOOLS}])
    assert row.answer == CALLS[0] and row.prompt == turns[:1]


def test_a_completion_is_answered_after_a_history_with_calls():
    user, turn = FORMS["OpenAI"](ASKED[0], CALLS[0])["messages"]
    result = {"role": "tool", "content": "5", "tool_call_id": "call_0"}
    (read,) = rows_from([trl(ASKED[1], CALLS[1]) | {"prompt": [user, turn, result, user]}])
    assert read.answer == CALLS[1] and [message["role"] for message in read.prompt] == [
        "user",
        "assistant",
        "tool",
        "user",
    ]
    call = {"id": "call_0", "type": "function", "function": CALLS[0][0]}
    assert read.prompt[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_older_and_looser_notations():
    call = {"name": "weather", "arguments": text({"city": "Oslo"})}
    (legacy,) = rows_from(
        [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "Weather in "}, {"type": "text", "text": "Oslo?"}],
                    },
                    {"role": "assistant", "content": None, "function_call": call},
                    {"role": "function", "name": "weather", "content": "5"},
                ],
                "functions": [WEATHER],
            }
        ]
    )
    assert (legacy.user_text, legacy.answer) == (ASKED[0], CALLS[0])
    no_arguments = [{"function": {"name": "weather", "arguments": ""}}, {"name": "taxes", "arguments": None}]
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "tool_calls": no_arguments}]
    (bare,) = rows_from([{"messages": text(turns), "tools": [text(tool) for tool in (WEATHER, TAXES)]}])
    assert bare.answer == [{"name": "weather", "arguments": {}}, {"name": "taxes", "arguments": {}}]
    mixed = {"type": "dict", "properties": {"n": {"type": "List[int], optional", "default": [1]}, "t": {"type": "str"}}}
    tools = [
        {"name": "in_a_schema", "parameters": mixed},
        {"name": "named_like_keywords", "parameters": {"type": {"type": "str"}, "properties": {"type": "int"}}},
        {"type": "function", "name": "of_responses", "parameters": {"type": "object", "properties": {}}},
        {"name": "without", "description": None, "parameters": None},
    ]
    (row,) = rows_from([{"query": "q", "tools": tools, "answers": {"name": "without", "arguments": "{}"}}])
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
    assert schemas["in_a_schema"]["required"] == ["t"]
    assert schemas["in_a_schema"]["properties"]["n"]["items"] == {"type": "integer"}
    assert schemas["named_like_keywords"]["required"] == ["type", "properties"]
    assert schemas["of_responses"] == {"type": "object", "properties": {}} and schemas["without"]["properties"] == {}
    assert row.answer == [{"name": "without", "arguments": {}}]
    assert rows_from([FORMS["xLAM"]("q", []) | {"tools": "[]"}])[0].tools == []


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"items": value}
    return value


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a", "label": 1}], "set:0 has the fields text, label, which are no known form: give one of toolx"),
        ([{}], r"set:0 has the fields \(none\), which"),
        (["a"], "set:0: a row must be an object, not 'a'"),
        ([{"prompt": "a", "tools": []}], "set:0: field 'answer' is missing.*is read as toolx: prompt, tools, answer"),
        ([FORMS["xLAM"]("a", []), FORMS["OpenAI"]("a", [])], "set:1 is in another form, OpenAI .*set is read as xLAM"),
        ([openai("a", []) | {"query": None}, FORMS["xLAM"]("a", []) | {"messages": None}], "set:1 is in .* xLAM"),
        ([{"messages": 5, "tools": []}], "set:0: field 'messages' must be a list of messages, not 5"),
        ([{"messages": [{"role": "agent", "content": "a"}], "tools": []}], "message 0 .* the unknown role 'agent'"),
        ([{"messages": [{"role": "user"}], "tools": []}], "message 0 of field 'messages' must have a 'role'"),
        ([{"messages": [openai_turn([{"name": "f", "arguments": [1]}])]}], "'tool_calls' that are not a list"),
        ([{"messages": [openai_turn(CALLS[0]) | {"tool_calls": "f"}]}], "message 0 .*'tool_calls' that are not a list"),
        ([openai("a", []) | {"tools": "f"}], "set:0: field 'tools' is not JSON"),
        ([openai("a", []) | {"tools": ["f"]}], "set:0: tool 0 of field 'tools' is not JSON"),
        ([openai("a", []) | {"tools": [5]}], "set:0: field 'tools' must be a list of functions, and tool 0 is 5"),
        ([sharegpt("a", []) | {"system": 5}], "set:0: field 'system' must have"),
        ([openai("a", []) | {"tools": [{"name": "f", "parameters": nested(3000)}]}], "set:0 is nested deeper than 64"),
        ([FORMS["toolx"]("a", []) | {"prompt": [nested(3000)]}], "set:0: prompt is nested deeper than 64 levels"),
        ("rows.jsonl", "set is of type str: give the rows that read_dataset returns"),
        ({"train": []}, "set is of type dict: give a list of rows"),
        (5, "set is of type int: give"),
    ],
)  # fmt: skip
def test_refusals_name_the_row_and_the_form(rows, words):
    with pytest.raises(InputError, match=words) as error:
        rows_from(rows, "set")
    assert "\n" not in str(error.value)


def nullable(*allowed):
    """A tool whose parameters ``allowed`` may be null, in each of the ways to say so."""
    ways = [{"type": ["string", "null"]}, {"type": "string", "nullable": True}, {"anyOf": [{"type": "null"}]}, {}]
    specs = {name: ways[n % 4] if name in allowed else {"type": "string"} for n, name in enumerate("abcd")}
    return {"name": "f", "parameters": {"type": "object", "properties": specs}}


def with_nulls(*arguments, tool=None, as_text=False):
    answers = [[{"name": "f", "arguments": given}] for given in arguments]
    tools = [tool or nullable()]
    return [{"prompt": "p", "tools": tools, "answer": json.dumps(answer) if as_text else answer} for answer in answers]


FILLED = [{"a": "x", "b": None}, {"a": None, "b": "y"}]  # as Arrow stores {"a": "x"} and {"b": "y"}
WITHOUT = [{"a": "x"}, {"b": "y"}]
KEYWORD = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": None}, "b": {}}}}
DEFAULT = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"default": None}, "b": {"const": None}}}}


@pytest.mark.parametrize(
    ("rows", "arguments"),
    [
        (with_nulls(*FILLED), WITHOUT),
        (with_nulls(*FILLED, tool=KEYWORD), WITHOUT),
        (with_nulls({"a": None, "b": "y"}, tool=KEYWORD), [{"b": "y"}]),
        (with_nulls(*FILLED, tool=nullable("a")), [{"a": "x"}, {"a": None, "b": "y"}]),
        *((with_nulls(*FILLED, tool=nullable(*names)), FILLED) for names in ("ab", "abcd")),
        (with_nulls({"c": "x", "d": None}, {"c": None, "d": "y"}, tool=nullable(*"cd")), "as given"),
        (with_nulls(*FILLED, tool=DEFAULT), "as given"),
        (with_nulls(*FILLED, {"a": "z"}), "as given"),
        (with_nulls(*FILLED, {"a": "z"}, tool=KEYWORD), "as given"),
        (with_nulls({"a": "x", "b": None}), "as given"),
        (with_nulls({"a": "x", "b": None}, {"a": "y", "b": None}), "as given"),
        (with_nulls(*FILLED, as_text=True), FILLED),
        (with_nulls(*FILLED, tool=KEYWORD, as_text=True), FILLED),
    ],
)
def test_null_arguments_are_dropped_where_arrow_filled_them_in_and_only_there(rows, arguments, tmp_path):
    if arguments == "as given":
        arguments = [row["answer"][0]["arguments"] for row in rows]
    for container in ("list", "lines", "DataFrame"):
        assert [row.answer[0]["arguments"] for row in CONTAINERS[container](rows, tmp_path)] == arguments


def test_each_field_of_calls_is_looked_at_alone(tmp_path):
    """Calls of the history have other names than those of the answers."""
    history = [{"role": "user", "content": "?"}, openai_turn([{"name": "g", "arguments": {"n": None}}], as_text=False)]
    rows = [row | {"prompt": history} for row in with_nulls(*FILLED)]
    read = as_lines(rows, tmp_path)
    assert [row.answer[0]["arguments"] for row in read] == WITHOUT
    assert read[0].prompt[1]["tool_calls"][0]["function"]["arguments"] == {"n": None}


def test_objects_in_arguments_are_filled_too(tmp_path):
    inner = [{"a": {"x": 1}, "tools": {"n": [{"y": 2}, {"z": 3}]}}, {"a": {"y": 2}, "tools": {"n": [{"z": None}]}}]
    properties = {"a": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": properties | {"tools": {"type": "object"}}}}
    rows = with_nulls(*inner, tool=tool)
    inner[1]["tools"]["n"] = [{}]  # a null beside an absent key cannot be told from it any more
    assert [row.answer[0]["arguments"] for row in as_arrows_lines(rows, tmp_path)] == inner
    assert [row.answer[0]["arguments"] for row in as_arrow(rows, tmp_path)] == inner


def test_a_dataset_tells_where_it_filled_nulls_in():
    d = datasets()
    text_answers = [{**row, "answer": json.dumps(row["answer"])} for row in with_nulls(*FILLED)]
    assert [row.answer[0]["arguments"] for row in as_arrow(text_answers, None)] == FILLED
    stored = d.Features({"prompt": d.Value("string"), "tools": d.Json(), "answer": d.List(d.Json())})
    exact = d.Dataset.from_list(with_nulls(*FILLED, tool=nullable("a")), features=stored)
    assert [row.answer[0]["arguments"] for row in rows_from(exact)] == FILLED
    tensors = d.Dataset.from_list([row | {"level": 3} for row in with_nulls(*WITHOUT)]).with_format("numpy")
    (row, _) = rows_from(tensors)
    assert row.answer[0]["arguments"] == {"a": "x"} and type(row.columns["level"]) is int
    assert [row.answer[0]["arguments"] for row in rows_from(tensors.to_iterable_dataset())] == WITHOUT


def test_cells_of_a_frame_are_missing_or_pythons():
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    rows = [FORMS["toolx"]("a", CALLS[0]) | {"level": 1, "seen": pandas.NaT}, FORMS["toolx"]("b", CALLS[1])]
    first, second = rows_from(pandas.DataFrame(rows))
    assert first.columns == {"level": 1.0, "seen": None} and second.columns == {"level": None, "seen": None}
    (row,) = rows_from([FORMS["toolx"]("a", CALLS[0]) | {"answer": numpy.array(CALLS[0]), "n": numpy.int64(3)}])
    assert row.answer == CALLS[0] and type(row.columns["n"]) is int


def test_splits(caplog):
    d = datasets()
    rows = d.Dataset.from_list([FORMS["toolx"]("q", [])])
    assert said(caplog, d.DatasetDict(train=rows, test=rows)).startswith("set, split train: 1 row in the form of toolx")
    assert said(caplog, d.DatasetDict(test=rows)).startswith("set, split test: 1 row")
    assert [row.id for row in rows_from(d.DatasetDict(test=rows), "set")] == ["set:0"]
    assert len(rows_from(d.IterableDatasetDict(test=rows.to_iterable_dataset()))) == 1
    with pytest.raises(InputError, match=r"set has the splits a, b: pass one of them, such as dataset\['a'\]"):
        rows_from(d.DatasetDict(a=rows, b=rows), "set")
    with pytest.raises(InputError, match="set has the splits train, test: pass one of them"):
        rows_from(d.DatasetDict(train=rows, test=rows), "set", for_training=False)


@pytest.mark.parametrize("ending", ["parquet", "csv", "arrow"])
def test_tables_and_saved_datasets(ending, tmp_path, monkeypatch, caplog):
    d = datasets()
    monkeypatch.setattr(d.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    stored = d.Dataset.from_list(
        [FORMS["xLAM"](asked, calls) | {"level": n} for n, (asked, calls) in enumerate(zip(ASKED, CALLS, strict=True))]
    )
    path = str(tmp_path / f"rows.{ending}")
    if ending == "arrow":
        stored.save_to_disk(tmp_path / "saved")
        path = str(tmp_path / "saved")
    else:
        getattr(stored, f"to_{ending}")(path)
    with caplog.at_level(logging.INFO):
        rows = read_dataset(path)
    assert [(row.prompt, row.answer, row.columns) for row in rows] == [
        (asked, calls, {"level": n}) for n, (asked, calls) in enumerate(zip(ASKED, CALLS, strict=True))
    ]
    assert f"{path}: 3 rows in the form of xLAM" in caplog.text


def test_files_of_one_array(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n" + json.dumps([FORMS["toolx"]("a", []), FORMS["toolx"]("b", [{"name": "g"}])], indent=1))
    with pytest.raises(InputError, match="rows.json:1: call 0 of field 'answer'"):
        read_dataset(str(path))
    path.write_text(json.dumps(FORMS["toolx"]("a", []), indent=1))
    with pytest.raises(InputError, match="rows.json:1 is not JSON .* one JSON object per line, or all in one array"):
        read_dataset(str(path))
    path.write_text('[{"prompt": "a"},\n oops]')
    with pytest.raises(InputError, match="rows.json is not JSON .*line 2 column 2"):
        read_dataset(str(path))


def test_an_instruction_continues_in_input():
    """As in Alpaca's rows."""
    row = {"instruction": "Weather?", "tools": FLAT, "output": "[]"}
    (alone, empty, joined) = rows_from([row, row | {"input": " "}, row | {"input": "In Oslo."}])
    assert (alone.prompt, empty.prompt, joined.prompt) == ("Weather?", "Weather?", "Weather?\n\nIn Oslo.")
    assert joined.columns == {}
    with pytest.raises(InputError, match="set:0: field 'input' continues 'instruction', so both must be texts"):
        rows_from([row | {"input": 5}], "set")
    query = {"query": "q", "input": "i", "tools": FLAT, "answers": "[]"}
    assert rows_from([query])[0].columns == {"input": "i"}, "a column of its own"


def test_odd_names_of_columns():
    pandas = pytest.importorskip("pandas")
    row = FORMS["toolx"](ASKED[0], CALLS[0])
    frame = pandas.DataFrame([row])
    with pytest.raises(InputError, match="set has two columns of the name 'prompt'"):
        rows_from(pandas.concat([frame, frame[["prompt"]]], axis=1), "set")
    for raw in (row, openai(ASKED[0], CALLS[0])):
        with pytest.raises(InputError, match="set:0: the name of a column must be text, not 0: rename"):
            rows_from(pandas.DataFrame([raw | {0: "a"}]), "set")


def test_rows_that_are_deep_lists_are_refused():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    for rows in ([deep], [FORMS["toolx"](ASKED[0], CALLS[0]), deep]):
        with pytest.raises(InputError, match="a row must be an object, not a value nested hundreds deep"):
            rows_from(rows, "set")


def test_a_tool_that_toolace_lists_twice():
    row = toolace(ASKED[0], CALLS[0])
    (read,) = rows_from([row | {"system": text([WEATHER, TAXES, WEATHER])}])
    assert read.tool_names == ["weather", "taxes"]
    with pytest.raises(InputError, match="1 row.*two different tools of one name|left out: two different tools"):
        rows_from([row | {"system": text([WEATHER, WEATHER | {"description": "?"}])}])


@pytest.mark.parametrize("name", ["toolx", "OpenAI", "xLAM in objects"])
def test_parameters_written_as_text(name):
    row = FORMS[name](ASKED[0], CALLS[0])
    written = [{"type": "function", "function": tool | {"parameters": text(tool["parameters"])}} for tool in (WEATHER,)]
    (read,) = rows_from([row | {"tools": written}])
    assert read.tools == OPENAI_TOOLS[:1]
    for parameters in (text(nested(400)), '{"items": ' * 3000 + "{}" + "}" * 3000, '{"a": "\\ud800"}', "{oops"):
        with pytest.raises(InputError, match="^set"):
            rows_from([row | {"tools": [WEATHER | {"parameters": parameters}]}], "set")


def test_a_refused_tool_is_quoted_as_it_is_written():
    words = re.escape(
        "tool 0 of field 'tools' must be a function with 'name' and 'parameters', not {'parameters': {'a': {}}}"
    )
    with pytest.raises(InputError, match=words):
        rows_from([FORMS["xLAM"](ASKED[0], CALLS[0]) | {"tools": [{"parameters": {"a": {}}}]}])


def test_an_empty_list_of_calls_beside_no_content():
    row = openai(ASKED[0], CALLS[2])
    row["messages"][1] = {"role": "assistant", "content": None, "tool_calls": []}
    assert rows_from([row])[0].answer == []
