import pytest

from toolx_kernels.toolcall import Row, check_row
from toolx_kernels.toolcall.datasets.report import DatasetReport, dataset_report
from toolx_kernels.toolcall.demonstrations import _Secret
from toolx_kernels.toolcall.schema import arguments_fault

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "at": {"type": "object", "properties": {"day": {"type": "integer"}}, "required": ["day"]},
        "free": {"type": "object"},
        "open": {"type": "object", "properties": {}, "additionalProperties": True},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "one": {"oneOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]},
        "both": {"allOf": [{"type": "string"}, {"enum": ["a", "b"]}]},
        "maybe": {"type": ["string", "null"]},
        "any": {},
        "flag": {"type": "boolean"},
    },
    "required": ["n"],
}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"x": 1, "colour": "red"},
        {"x": 1.5},
        {"n": 2.0},
        {"tags": []},
        {"tags": ["a", "b"]},
        {"at": {"day": 1}},
        {"free": {"what": "ever"}},
        {"open": {"what": "ever"}},
        {"either": 1},
        {"either": "1"},
        {"one": None},
        {"one": [1, 2]},
        {"both": "a"},
        {"maybe": None},
        {"any": [None, {"a": 1}]},
        {"flag": True},
    ],
)
def test_arguments_inside_the_schema(arguments):
    assert arguments_fault({"n": 1, **arguments}, SCHEMA) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"n": ...}, "the required argument 'n' is missing"),
        ({"m": 1}, "the schema has no argument 'm'"),
        ({"n": "63"}, "argument 'n' is '63', which is not of type integer"),
        ({"n": True}, "argument 'n' is True, which is not of type integer"),
        ({"n": 1.5}, "argument 'n' is 1.5, which is not of type integer"),
        ({"x": "1.5"}, "argument 'x' is '1.5', which is not of type number"),
        ({"flag": 1}, "argument 'flag' is 1, which is not of type boolean"),
        ({"colour": "green"}, "argument 'colour' is 'green', which is not a value that the schema lists"),
        ({"tags": "a"}, "argument 'tags' is 'a', which is not of type array"),
        ({"tags": ["a", 1]}, "argument 'tags[1]' is 1, which is not of type string"),
        ({"at": {}}, "the required argument 'at.day' is missing"),
        ({"at": {"day": "1"}}, "argument 'at.day' is '1', which is not of type integer"),
        ({"at": {"day": 1, "hour": 2}}, "the schema has no argument 'at.hour'"),
        ({"either": None}, "argument 'either' is None, which does not fit any of the schemas in anyOf"),
        ({"one": ["1"]}, "argument 'one[0]' is '1', which is not of type integer"),
        ({"both": "c"}, "argument 'both' is 'c', which is not a value that the schema lists"),
        ({"maybe": 1}, "argument 'maybe' is 1, which is not of type string or null"),
    ],
)
def test_arguments_outside_the_schema(arguments, words):
    arguments = {key: value for key, value in {"n": 1, **arguments}.items() if value is not ...}
    assert arguments_fault(arguments, SCHEMA) == words


def test_a_tool_that_states_no_properties_takes_anything():
    assert arguments_fault({"what": "ever"}, {}) is None
    assert arguments_fault({"what": "ever"}, {"type": "object"}) is None
    assert arguments_fault({}, {"required": ["n"]}) == "the required argument 'n' is missing"


def row(row_id, offered, *calls):
    tools = [{"name": name, "parameters": SCHEMA} for name in offered]
    answer = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return check_row({"id": row_id, "prompt": f"prompt {row_id}", "tools": tools, "answer": answer}, "d", 0)


def test_a_report():
    rows = [
        row("one", "ab", ("a", {"n": 1})),
        row("lonely", "c", ("c", {"n": 1})),
        row("none", "a"),
        row("two", "ab", ("b", {"n": 1}), ("a", {"n": "2"})),
        row("wrong", "ab", ("a", {}), ("b", {"m": 1})),
        row("told", "a", ("a", {"n": 1}), ("a", {"n": "2"}), ("a", {})),
    ]
    assert dataset_report(rows) == DatasetReport(
        rows=6,
        calls={0: 1, 1: 2, 2: 2, 3: 1},
        tools=3,
        without_demonstrations=2,
        first_without_demonstrations="lonely",
        outside_schema=3,
        first_outside_schema="two",
        first_fault="call 1 (a): argument 'n' is '2', which is not of type integer",
    )
    assert dataset_report(rows).calls[0] == 1
    assert dataset_report(rows).lines() == [
        "6 rows, 3 tools; rows by calls in the answer: 0 calls: 1, 1 call: 2, 2 calls: 2, 3 calls: 1",
        "rows without any possible demonstration, so never shown with one: 2 of 6, first 'lonely'",
        "rows whose answer breaks the schema of a tool: 3 of 6, first 'two', call 1 (a): argument 'n' is '2', which is"
        " not of type integer",
    ]


def test_nothing_odd_takes_one_line():
    rows = [row("one", "a", ("a", {"n": 1})), row("two", "a", ("a", {"n": 2}))]
    assert dataset_report(rows).lines() == ["2 rows, 1 tool; rows by calls in the answer: 1 call: 2"]


@pytest.mark.parametrize(
    "calls",
    [
        lambda n, count: [("a", {"n": n})],
        lambda n, count: [("a", {"n": 0})],
        lambda n, count: [("a", {"n": int(n < count / 2)})],
        lambda n, count: [("a", {"n": 0}), ("a", {"n": n})],
        lambda n, count: [("a", {"n": -int(n < count / 2)}), ("a", {"n": n + 1})],
    ],
    ids=["all different", "all equal", "two halves", "one call in common", "a call in common by halves"],
)
def test_work_in_proportion_to_the_rows(calls, monkeypatch):
    """Measured by the number of answers compared, which does not depend on the machine's load."""
    compared = 0
    compare = _Secret.is_called_by

    def counted(secret, sample):
        nonlocal compared
        compared += 1
        return compare(secret, sample)

    monkeypatch.setattr(_Secret, "is_called_by", counted)
    tools, count = row("any", "ab").tools, 2_000
    answers = [[{"name": name, "arguments": values} for name, values in calls(n, count)] for n in range(count)]
    dataset_report([Row(str(n), f"prompt {n}", tools, answer) for n, answer in enumerate(answers)])
    assert compared < 3 * count
