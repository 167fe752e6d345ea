import gzip
import json
import logging
import math
import os
import re
import sys
from pathlib import Path

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import read_dataset, read_hub, read_jsonl, rows_from

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {argument: {}}}}}
    for name, argument in (("f", "x"), ("g", "y"))
]
ROWS = [
    {"prompt": "a", "tools": TOOLS[:1], "answer": [{"name": "f", "arguments": {"x": 1}}], "level": 1},
    {"prompt": "b", "tools": TOOLS, "answer": [{"name": "g", "arguments": {"y": "q"}}], "level": 2},
]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_jsonl(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[0], "\n", ROWS[1])
    rows = read_dataset(path)
    assert [row.id for row in rows] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert [row.answer for row in rows] == [raw["answer"] for raw in ROWS]
    assert rows[1].columns == {"level": 2}
    assert read_dataset(write(tmp_path / "other.txt", *ROWS))[0].prompt == "a"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{not json}\n", "rows.jsonl:2 is not JSON"),
        ('{"prompt": NaN}\n', "rows.jsonl:2 is not JSON"),
        ('{"prompt": "a", "tools": [], "answer": [], "level": 1e999}\n', "rows.jsonl:2 is not JSON"),
        ('{"prompt": "a", "tools": [], "answer": [], "prompt": "b"}\n', "rows.jsonl:2 is not JSON"),
        ("[1]\n", "rows.jsonl:2: a row must be an object"),
        ({"prompt": "a", "answer": []}, "rows.jsonl:2: field 'tools' is missing"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, words):
    with pytest.raises(InputError, match=words):
        read_jsonl(write(tmp_path / "rows.jsonl", ROWS[0], line))


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        ('"a": 1, "a": 2', "repeated key 'a'"),
        ('"a": NaN', "the constant NaN"),
        ('"a": ' + "9" * 5000, "Exceeds the limit (4300 digits) for integer string conversion"),
        ('"a": 1e999', "number out of range"),
    ],
)
def test_values_that_cannot_be_used_are_told_from_other_notations(tmp_path, field, reason):
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "p", {field}}}')
    words = f"rows.jsonl:1 is not JSON that can be used ({reason}): change or remove this value."
    with pytest.raises(InputError, match=re.escape(words) + "$"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_files_packed_by_gzip(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(b"".join(json.dumps({**ROWS[0], "id": n}).encode() + b"\n" for n in range(100)))
    for name in ("rows.jsonl.gz", "unnamed.jsonl"):
        (tmp_path / name).write_bytes(packed)
        assert len(read_dataset(str(tmp_path / name))) == 100
    for damaged in (packed[:60], packed[:20] + b"x" + packed[21:], packed[:2] + b"garbage"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"cannot read the dataset file .*rows.jsonl.gz \(.+\): name a readable"):
            read_dataset(str(path))


@pytest.mark.parametrize(
    "name",
    ["nix.parquet", "nix.CSV", "nix.jsonl.gz", "nix.arrow", "nix.json", "./nix", "../nix", "/nix/", "~/nix", "a/b/c"],
)
def test_paths_that_do_not_exist(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"(nix\S*|a/b/c) \(No such file or directory\): name a readable file"):
        read_dataset(name)


def test_tables_without_rows(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    empty = datasets.Dataset.from_dict({"prompt": [], "tools": []})
    empty.to_parquet(tmp_path / "rows.parquet")
    empty.save_to_disk(tmp_path / "saved")
    for name, text in (("none.csv", ""), ("head.csv", "prompt,tools\n"), ("none.parquet", ""), ("none.arrow", "")):
        (tmp_path / name).write_text(text)
    for name in ("rows.parquet", "saved", "none.csv", "head.csv", "none.parquet", "none.arrow"):
        with pytest.raises(InputError, match=f"{name} holds no rows: give a dataset with at least one"):
            read_dataset(str(tmp_path / name))


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n")
    assert [row.prompt for row in read_jsonl(path)] == ["a"]


def test_rows_that_call_a_tool_they_do_not_offer_are_counted_over_the_file(tmp_path):
    wrong = {**ROWS[0], "answer": [{"name": "g", "arguments": {}}]}
    path = write(tmp_path / "rows.jsonl", ROWS[0], wrong, "\n", wrong, ROWS[1])
    with pytest.raises(InputError, match=r"rows.jsonl: .*2 of 4 rows call a tool .*the first: .*rows.jsonl:2: call 0"):
        read_dataset(path)


def test_several_datasets_joined_by_commas(tmp_path):
    one, two = (write(tmp_path / name, ROWS[n]) for n, name in enumerate(("one.jsonl", "two.jsonl")))
    assert [row.prompt for row in read_dataset(f"{one},{two}")] == ["a", "b"]
    assert [row.prompt for row in read_dataset(write(tmp_path / "a,b.jsonl", ROWS[1]))] == ["b"]
    with pytest.raises(InputError, match="one.jsonl:1' occurs twice"):
        read_dataset(f"{one}, {one}")
    with pytest.raises(InputError, match="the dataset name '' is empty"):
        read_dataset(f"{one},")


@pytest.mark.parametrize("spec", ["", "  "])
def test_an_empty_name(spec):
    with pytest.raises(InputError, match=f"the dataset name '{spec}' is empty: give bfcl:<category>"):
        read_dataset(spec)


def test_bad_files(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.jsonl \(No such file or directory\): name a readable file"):
        read_dataset(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match="empty.jsonl holds no rows"):
        read_jsonl(write(tmp_path / "empty.jsonl", "\n"))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match="binary.jsonl is not UTF-8"):
        read_jsonl(tmp_path / "binary.jsonl")
    with pytest.raises(InputError, match="unknown BFCL category 'nope'"):
        read_dataset("bfcl:nope")


def test_a_dataset_object_and_a_folder_that_datasets_loads(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = datasets.Dataset.from_list(ROWS)
    assert dataset[0]["answer"][0]["arguments"] == {"x": 1, "y": None}  # the pitfall: keys of other rows appear
    assert [row.answer for row in rows_from(dataset)] == [raw["answer"] for raw in ROWS]
    assert [row.tools for row in rows_from(dataset)] == [raw["tools"] for raw in ROWS]

    stored = [{**raw, "tools": json.dumps(raw["tools"]), "answer": json.dumps(raw["answer"])} for raw in ROWS]
    stored[0]["answer"] = json.dumps([{"name": "f", "arguments": {"x": None}}])
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", *stored)
    rows = read_dataset(str(tmp_path / "set"))
    assert [row.prompt for row in rows] == ["a", "b"]
    assert rows[0].answer[0]["arguments"] == {"x": None} and rows[1].answer == ROWS[1]["answer"]
    with pytest.raises(InputError, match="split 'nope'"):
        read_hub(str(tmp_path / "set"), "nope")


def test_numbers_that_are_not_json_in_a_dataset_object():
    datasets = pytest.importorskip("datasets")
    for value in (math.nan, math.inf):
        raw = {**ROWS[0], "answer": [{"name": "f", "arguments": {"x": value}}]}
        with pytest.raises(InputError, match=rf"set:0: answer\[0\].arguments.x is {value}"):
            rows_from(datasets.Dataset.from_list([raw]), "set")


def test_unknown_name_and_absent_library(monkeypatch):
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="cannot load dataset 'nobody/nothing-here'"):
        read_dataset("nobody/nothing-here")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'toolx_kernels\[data\]'"):
        read_hub("nobody/nothing-here")


def test_xlam_rows():
    parameters = {
        "city": {"description": "Where.", "type": "str"},
        "days": {"description": "How many.", "type": "int, optional", "default": 3},
        "tags": {"description": "Which.", "type": "List[str]"},
        "unit": {"description": "Unit.", "type": "str", "default": "C"},
        "area": {"description": "Area.", "type": "Optional[float]"},
        "either": {"description": "One of two.", "type": "Union[int, str]"},
    }
    raw = {
        "id": 12,
        "query": "Weather in Oslo?",
        "tools": json.dumps([{"name": "weather", "description": "Weather.", "parameters": parameters}]),
        "answers": json.dumps([{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]),
    }
    (row,) = rows_from([raw])
    assert (row.id, row.prompt) == ("12", "Weather in Oslo?")
    assert row.answer == [{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}]
    schema = row.tools[0]["function"]["parameters"]
    assert schema["required"] == ["city", "tags", "either"]
    assert schema["properties"]["days"] == {"type": "integer", "description": "How many.", "default": 3}
    assert schema["properties"]["tags"] == {
        "type": "array", "items": {"type": "string"}, "description": "Which."
    }  # fmt: skip
    assert schema["properties"]["area"]["type"] == "number"
    assert schema["properties"]["either"]["type"] == ["integer", "string"]
    assert row.columns == {}
    with pytest.raises(InputError, match="dataset:0.*'tools' is not JSON"):
        rows_from([{**raw, "tools": "[{"}])
    with pytest.raises(InputError, match="'answer' is missing"):
        rows_from([{**raw, "answers": None}])


XLAM = {"query": "q", "tools": [{"name": "f", "parameters": {}}], "answers": [{"name": "f", "arguments": {}}]}


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("text", "set:1: a row must be an object, not 'text'"),
        (None, "set:1: a row must be an object, not None"),
        ({}, "set:1: field 'tools' must be a list of functions"),
        ({**XLAM, "query": None}, "set:1: field 'prompt' is missing"),
        ({**XLAM, "tools": None}, "set:1: field 'tools' must be a list of functions"),
        ({**XLAM, "tools": 5}, "set:1: field 'tools' must be a list of functions"),
        ({**XLAM, "tools": ["f"]}, "set:1: tool 0 of field 'tools' is not JSON"),
        ({**XLAM, "tools": "[NaN]"}, "set:1: field 'tools' is not JSON"),
        ({**XLAM, "tools": [{"parameters": {}}]}, "set:1: tool 0"),
        ({**XLAM, "tools": [{"name": "f", "parameters": ["a"]}]}, "set:1: the parameters of tool 'f'"),
        ({**XLAM, "tools": [{"name": "f", "parameters": {"a": "str"}}]}, "set:1: the parameters of tool 'f'"),
        ({**XLAM, "answers": "f()"}, "set:1: field 'answers' is not JSON"),
        ({**XLAM, "answers": [{"name": "g", "arguments": {}}]}, "set:1: call 0 of field 'answer' is of 'g'"),
        ({**XLAM, "answers": [{"name": "f", "arguments": []}]}, "set:1: call 0 of field 'answer' must be"),
    ],
)
def test_bad_xlam_rows_are_named(bad, words):
    with pytest.raises(InputError, match=words):
        rows_from([XLAM, bad], "set")


ACE_TOOLS = [
    {
        "name": "Market Trends",
        "description": "Trends.",
        "parameters": {
            "type": "dict",
            "properties": {"country": {"type": "string"}, "limit": {"type": "int"}, "deep": {"type": "dict"}},
            "required": ["country"],
        },
        "required": None,
    },
    {"name": "api.news", "description": "News.", "parameters": None},
]
ACE_SYSTEM = f"You compose functions. [{{not this}}] Here is the list:\n{json.dumps(ACE_TOOLS)}\nPut it as [f(a=1)]."


def ace(*turns, system=ACE_SYSTEM):
    roles = ("user", "assistant", "tool", "assistant", "user", "assistant")
    return {"system": system, "conversations": [{"from": r, "value": v} for r, v in zip(roles, turns, strict=False)]}


def test_toolace_rows(caplog):
    raws = [
        ace("one", '[Market Trends(country="US (all)]", limit=5, deep={"a": [1, true], "b": None}), api.news()]'),
        ace("two", "[api.news( flag = false , names=('x', 'y') )]", "result", "summary"),
        ace("three", "Which country do you mean?"),
        ace("four", "[api.news()]", "result", "summary", "five", "bye"),
        ace("six", "[unheard_of(a=1)]"),
        ace("seven", "[api.news(a=__import__('os'))]"),
        ace("eight", "[api.news(1)]"),
        ace("nine", "[api.news(a=1"),
        ace("ten", "[api.news()]", system="no tools"),
    ]
    with caplog.at_level(logging.WARNING):
        rows = rows_from(raws, "ace")
    assert [row.prompt for row in rows] == ["one", "two", "three"]
    assert rows[0].answer == [
        {
            "name": "Market Trends",
            "arguments": {"country": "US (all)]", "limit": 5, "deep": {"a": [1, True], "b": None}},
        },
        {"name": "api.news", "arguments": {}},
    ]
    assert rows[1].answer == [{"name": "api.news", "arguments": {"flag": False, "names": ["x", "y"]}}]
    assert rows[2].answer == []
    schema = rows[0].tools[0]["function"]["parameters"]
    assert schema["type"] == "object" and schema["properties"]["limit"] == {"type": "integer"}
    (message,) = caplog.messages
    assert message == (
        "ace: 3 rows in the form of ToolACE (system, conversations); 6 left out: 1 with more than one user turn, 4 with"
        " calls that cannot be read, 1 with no list of tools in the system text; 1 cut after the answer"
    )
    with pytest.raises(InputError, match="ace holds no rows"):
        rows_from(raws[3:], "ace")


def system_of(*tools):
    return f"Tools: {json.dumps(tools)}"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("text", "set:1: a row must be an object, not 'text'"),
        (None, "set:1: a row must be an object, not None"),
        ({"system": ACE_SYSTEM}, "set:1: a row in ToolACE's format"),
        ({**ace("one", "two"), "system": None}, "set:1 is in another form, Hermes or ShareGPT .*is read as ToolACE"),
        ({**ace("one", "two"), "system": 5}, "set:1: a row in ToolACE's format"),
        ({**ace("one", "two"), "conversations": {"from": "user"}}, "set:1: a row in ToolACE's format"),
        ({**ace("one", "two"), "conversations": ["one", "two"]}, "set:1: a turn of field 'conversations'"),
        ({**ace("one", "two"), "conversations": [{"value": "one"}]}, "set:1: a turn of field 'conversations'"),
        (ace("one", None), "set:1: a turn of field 'conversations'"),
        (ace("one", "two", system=system_of({"name": "f", "parameters": "x"})), "tool 'f'.*not a JSON schema"),
        (ace("one", "two", system=system_of({"name": "f", "parameters": [1]})), "tool 'f'.*not a JSON schema"),
        (ace("one", "two", system=system_of({"name": "f", "parameters": {"a": math.nan}})), r"set:1: tools\[0\]"),
    ],
)
def test_bad_toolace_rows_are_named(bad, words):
    with pytest.raises(InputError, match=words) as error:
        rows_from([ace("one", "[api.news()]"), bad], "set")
    assert "set:1" in str(error.value)


def test_seal_tools():
    path = os.environ.get("TOOLX_SEAL_TOOLS")
    if not path:
        pytest.skip("TOOLX_SEAL_TOOLS does not name a copy of seal-tools-train.jsonl")
    rows = read_dataset(path)
    assert len(rows) == len(Path(path).read_text().splitlines()) == 1342
    assert sum(len(row.answer) == 1 for row in rows) == 400
    assert all({call["name"] for call in row.answer} <= set(row.tool_names) for row in rows)
