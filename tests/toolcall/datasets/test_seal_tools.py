import json
import logging

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import read_dataset
from toolx_kernels.toolcall.datasets.seal_tools import read_seal_tools


def published_tool(name, field, parameters=None, **rest):
    parameters = parameters or {}
    return {
        "api_name": name, "api_description": f"About {name}.", "field": field, "parameters": parameters,
        "required": list(parameters)[:1], "responses": {"out": {"type": "str", "description": "o"}}, **rest,
    }  # fmt: skip


TYPES = {
    "age": {"type": "int", "description": "Years."},
    "share": {"type": "float", "description": "Part."},
    "name": {"type": "str", "description": "Who.", "example": "Ann"},
    "urgent": {"type": "bool", "description": "Now?"},
}
TOOLS = [
    published_tool("enrol", "Youth/Camps", TYPES),
    *(published_tool(f"camp{n}", "Youth/Camps") for n in range(4)),
    *(published_tool(f"club{n}", "Youth/Clubs") for n in range(4)),
    *(published_tool(f"trial{n}", "Law/Trials") for n in range(4)),
    published_tool("sue", "Law/Suits", {"whom": {"type": "str", "description": "Who."}}),
]


def published_row(row_id, query, *calls):
    calling = [{"api": name, "parameters": parameters, "responses": ["API_call_0"]} for name, parameters in calls]
    return {"id": row_id, "query": query, "calling": calling}


ROWS = [
    published_row("dev-easy-0", "Enrol Ann, 63.", ("enrol", {"age": "63", "name": "Ann"})),
    published_row("dev-hard-1", "Enrol and sue.", ("enrol", {"age": 3}), ("sue", {"whom": "API_call_0"})),
    published_row("dev-hard-2", "Sue twice.", ("sue", {"whom": "Bo"}), ("sue", {"whom": "Al"}), ("camp0", {})),
    published_row("dev-hard-3", "Nested.", ("enrol", {"age": 3, "name": {"a": ["x", "after API_call_12"]}})),
]


def write(folder, tools=TOOLS, **splits):
    for name, lines in {"tool": tools, **splits}.items():
        text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def test_rows_as_published(tmp_path, caplog):
    path = write(tmp_path, dev=ROWS) / "dev.jsonl"
    with caplog.at_level(logging.WARNING):
        rows = read_seal_tools(path)
    assert caplog.messages == [f"{path}: 2 of 4 rows left out: a call uses the output of another"]
    assert [row.id for row in rows] == ["dev-easy-0", "dev-hard-2"]
    assert rows[0].messages == [{"role": "user", "content": "Enrol Ann, 63."}]
    assert rows[0].answer == [{"name": "enrol", "arguments": {"age": "63", "name": "Ann"}}]
    assert [call["name"] for call in rows[1].answer] == ["sue", "sue", "camp0"]
    enrol = next(tool["function"] for tool in rows[0].tools if tool["function"]["name"] == "enrol")
    assert enrol == {
        "name": "enrol",
        "description": "About enrol.",
        "parameters": {
            "type": "object",
            "properties": {
                "age": {"type": "integer", "description": "Years."},
                "share": {"type": "number", "description": "Part."},
                "name": {"type": "string", "description": "Who.", "example": "Ann"},
                "urgent": {"type": "boolean", "description": "Now?"},
            },
            "required": ["age"],
        },
    }


def test_distractors_are_of_the_same_field_then_area_then_any(tmp_path):
    path = write(tmp_path, dev=[ROWS[0]]) / "dev.jsonl"

    def others(distractors):
        (row,) = read_seal_tools(path, distractors=distractors)
        assert len(set(row.tool_names)) == len(row.tools) and "enrol" in row.tool_names
        return sorted(name.rstrip("0123456789") for name in row.tool_names if name != "enrol")

    assert others(0) == [] and others(2) == ["camp"] * 2
    assert others(6) == ["camp"] * 4 + ["club"] * 2
    assert others(9)[:8] == ["camp"] * 4 + ["club"] * 4 and others(9)[8] in ("trial", "sue")
    assert len(others(99)) == len(TOOLS) - 1


def test_the_order_is_drawn_from_the_id_alone(tmp_path):
    many = [published_row(f"dev-easy-{n}", f"Sue {n}.", ("sue", {"whom": "Bo"})) for n in range(60)]
    rows = read_seal_tools(write(tmp_path, dev=many) / "dev.jsonl")
    alone = read_seal_tools(write(tmp_path, dev=many[30:31]) / "dev.jsonl")
    assert alone == rows[30:31]
    assert {row.tool_names.index("sue") for row in rows} == {0, 1, 2, 3}
    assert len({tuple(row.tool_names) for row in rows}) > 20


def test_a_folder_and_the_name_of_a_dataset(tmp_path):
    folder = write(tmp_path, test_in_domain=[{**ROWS[0], "id": "t"}], train=[{**ROWS[0], "id": "r"}], dev=ROWS)
    assert [row.id for row in read_seal_tools(folder)] == ["r", "dev-easy-0", "dev-hard-2", "t"]
    assert read_dataset(f"seal-tools:{folder}") == read_seal_tools(folder)
    both = read_dataset(f"seal-tools:{folder}/train.jsonl, seal-tools:{folder}/test_in_domain.jsonl")
    assert [row.id for row in both] == ["r", "t"]


GOOD = [ROWS[0]]


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        ({"dev": [*GOOD, "{\n"]}, "dev.jsonl:2 is not JSON"),
        ({"dev": [*GOOD, [{"api": "sue", "parameters": {}}, "Sue."]]}, "dev.jsonl:2: a row must have id, query"),
        ({"dev": [{**ROWS[0], "query": None}]}, "dev.jsonl:1: a row must have id, query"),
        ({"dev": [{**ROWS[0], "id": 5}]}, "dev.jsonl:1: a row must have id, query"),
        ({"dev": [{**ROWS[0], "calling": [{"api": "sue"}]}]}, "dev.jsonl:1: a row must have id, query"),
        (
            {"dev": [*GOOD, ROWS[1], ROWS[2], published_row("x", "?", ("nope", {}))]},
            r"1 of 3 rows call a tool .*dev.jsonl:4 \(id 'x'\): call 0 .* of 'nope'",
        ),
        ({"dev": [*GOOD, *GOOD]}, "'dev-easy-0' occurs twice"),
        ({"dev": ROWS[1:2]}, "dev.jsonl holds no rows"),
        ({"dev": GOOD, "tools": []}, "1 of 1 rows call a tool .* of 'enrol'"),
        ({"dev": GOOD, "tools": [*TOOLS, {"api_name": "x"}]}, "tool.jsonl:15: a tool must have api_name"),
        ({"dev": GOOD, "tools": [*TOOLS, "5\n"]}, "tool.jsonl:15: a tool must have api_name"),
        ({"dev": GOOD, "tools": [*TOOLS, TOOLS[0]]}, "tool.jsonl:15: the tool 'enrol' occurs twice"),
        (
            {"dev": GOOD, "tools": [published_tool("enrol", "F", {"a": {"type": "text"}})]},
            r"tool 'enrol' of field 'tools' is not a JSON schema \(parameters.properties.a.type is 'text'",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, splits, words):
    with pytest.raises(InputError, match=words):
        read_seal_tools(write(tmp_path, **splits) / "dev.jsonl")


def test_what_is_not_there(tmp_path):
    with pytest.raises(InputError, match="holds none of train, dev, test_in_domain, test_out_domain"):
        read_seal_tools(tmp_path)
    with pytest.raises(InputError, match=r"nowhere/tool.jsonl \(No such file"):
        read_seal_tools(tmp_path / "nowhere" / "dev.jsonl")
    with pytest.raises(InputError, match="dev.json is Seal-Tools' format for fine-tuning: give the .jsonl"):
        read_seal_tools(tmp_path / "dev.json")
    with pytest.raises(InputError, match="distractors is -1"):
        read_seal_tools(tmp_path, distractors=-1)
    with pytest.raises(InputError, match="seal-tools:<path>"):
        read_dataset(" ")
