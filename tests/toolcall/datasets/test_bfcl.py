"""BFCL's rows, and small cases of its matching rules (for the official checker see test_bfcl_agreement.py)."""

import importlib.util

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import CATEGORIES, bfcl_match, read_bfcl
from toolx_kernels.toolcall.literals import MAX_LENGTH, read_literal

SIZES = {
    "simple_python": 400, "simple_java": 100, "simple_javascript": 50, "multiple": 200, "parallel": 200,
    "parallel_multiple": 200, "live_simple": 258, "live_multiple": 1053, "live_parallel": 16,
    "live_parallel_multiple": 24, "irrelevance": 240, "live_irrelevance": 884,
}  # fmt: skip
# BFCL's checker accepts no answer for these: they require a list of mixed types from a Java literal, list no
# acceptable value, or expect an argument that the tool does not have.
UNSOLVABLE = {
    "simple_java_36", "simple_java_65", "live_simple_106-63-0", "live_simple_112-68-0", "live_multiple_862-181-3",
    "live_multiple_964-207-0",
}  # fmt: skip


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_row_is_read_and_its_answer_is_right(category):
    pytest.importorskip("bfcl_eval")
    rows = read_bfcl(category)
    assert len(rows) == SIZES[category]
    right = {row.id for row in rows if bfcl_match(row.answer, row.tools, row.columns["possible_answers"], category)}
    assert {row.id for row in rows} - right == {row.id for row in rows} & UNSOLVABLE
    assert all(row.columns["category"] == category for row in rows)


def test_types_names_and_answers_of_a_row():
    pytest.importorskip("bfcl_eval")
    first = read_bfcl("simple_python")[0]
    assert first.answer == [{"name": "calculate_triangle_area", "arguments": {"base": 10, "height": 5}}]
    assert first.tools[0]["function"]["parameters"]["type"] == "object"
    assert "Python 3 syntax" in first.tools[0]["function"]["description"]
    second = read_bfcl("multiple")[0]
    assert second.tool_names == ["triangle_properties.get", "circle_properties.get"]
    assert second.tools[1]["function"]["parameters"]["properties"]["radius"]["type"] == "number"
    java = {row.id: row for row in read_bfcl("simple_java")}["simple_java_22"]
    assert java.answer[0]["arguments"] == {
        "ids": "new ArrayList<>(Arrays.asList(101L, 202L, 303L))", "newStatus": "2"
    }  # fmt: skip
    ids = java.tools[0]["function"]["parameters"]["properties"]["ids"]
    assert (ids["type"], ids["format"]) == ("string", "ArrayList<long>")
    assert read_bfcl("irrelevance")[0].answer == []


def test_irrelevance_is_right_without_a_call():
    assert bfcl_match([], [], [], "live_irrelevance")
    assert not bfcl_match([{"name": "f", "arguments": {}}], [], [], "irrelevance")
    assert not bfcl_match(None, [], [], "irrelevance")


def tool(properties, required=()):
    parameters = {"type": "object", "properties": properties, "required": list(required)}
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def test_matching_rules_in_small():
    tools = tool({"a": {"type": "number"}, "b": {"type": "string"}, "c": {"type": "object"}}, ["a"])
    possible = [{"f": {"a": [2.0], "b": ["New York, NY", ""], "c": [{"k": ["v", "w"], "o": ["", 1]}, ""]}}]

    def right(**arguments):
        return bfcl_match([{"name": "f", "arguments": arguments}], tools, possible, "simple_python")

    assert right(a=2.0) and right(a=2) and right(a=2, b="new york ny") and right(a=2, c={"k": "W"})
    assert not right(a=3) and not right(b="New York, NY") and not right(a="2.0") and not right(a=True)
    assert not right(a=2, b="New Jersey") and not right(a=2, c={"o": 1}) and not right(a=2, z=1)


def test_java_literals_in_small():
    tools = tool({"a": {"type": "string", "format": "long"}, "b": {"type": "string", "format": "HashMap"}})
    possible = [{"f": {"a": [42], "b": [{"k": [1]}]}}]

    def right(a, b):
        return bfcl_match([{"name": "f", "arguments": {"a": a, "b": b}}], tools, possible, "simple_java")

    literal = 'new HashMap<String, Integer>() {{ put("k", 1); }}'
    assert right("42L", literal) and not right("42", literal) and not right(42, literal)
    assert not right("9" * 5000 + "L", literal) and not right("42L", literal.replace("1", "2"))
    assert not right("42L", "new HashMap<" * 3000) and not right("42L", "new HashMap<>() {" + " " * 200000)


def test_no_literal_takes_long():
    """In quadratic time these would not finish."""
    for language, name, text in (
        ("javascript", "dict", "{" + "a" * 200_000 + "}"),
        ("javascript", "dict", "{a: " + ", " * 100_000 + "}"),
        ("javascript", "array<float>", "[" * 200_000),
        ("java", "HashMap", "new HashMap<>() {" + " " * 200_000),
        ("java", "HashMap", 'new HashMap<>() {{ put("' * 10_000),
        ("java", "ArrayList<any>", "new ArrayList<>() {{ add(" * 10_000),
        ("java", "integer", "9" * 200_000),
    ):
        assert read_literal(text, language, name) == text
        read_literal(text[:MAX_LENGTH], language, name)
        read_literal(text[: MAX_LENGTH - 3] + "}", language, name)


def test_unknown_category_and_absent_package(monkeypatch):
    with pytest.raises(InputError, match="'nope'.*simple_python"):
        read_bfcl("nope")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps bfcl-eval.*make models"):
        read_bfcl("multiple")
