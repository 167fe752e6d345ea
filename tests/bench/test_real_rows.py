"""Rows for the records of real models: usable rows, and their split into files."""

import json

import pytest

from bench.learning import real_rows
from toolx_kernels.toolcall import read_dataset
from toolx_kernels.toolcall.datasets.read import rows_from

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
    for name in ("weather", "taxes", "trains")
]


def row(name, *calls, prompt=None):
    answer = [{"name": tool, "arguments": {"x": x}} for tool, x in calls]
    return {"id": name, "prompt": prompt or f"Question {name}", "tools": TOOLS, "answer": answer}


ROWS = [
    row("a", ("weather", 1)),
    row("b", ("weather", 2), ("taxes", 1)),  # two calls: demonstrates both tools
    row("c", ("taxes", 1)),  # b would reveal its answer, d does not
    row("d", ("taxes", 5)),  # c demonstrates taxes, with another value
    row("e", ("trains", 1)),  # no row demonstrates trains
    row("f", ("weather", 3), prompt="  QUESTION a"),  # a has the same text, b does not
]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(real_rows, "CATEGORIES", str(tmp_path / "one.jsonl"))
    monkeypatch.setitem(real_rows.MOST_ROWS, "coder", 2)
    for name, rows in (("one", ROWS[:3]), ("two", ROWS[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))

    def written(record):
        sources = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
        real_rows.main([record, str(tmp_path / record), *sources])
        return {
            path.stem: [each.id for each in read_dataset(str(path))] for path in (tmp_path / record).glob("*.jsonl")
        }

    return written


def test_all_usable_rows_are_trained_on_and_the_others_demonstrate(data, capsys):
    assert data("smollm2") == {
        "rl": ["a", "c", "d", "f"],
        "cold": ["e"],
        "demonstrations": ["b", "e"],
        "bfcl": ["a", "b", "c"],
    }
    assert "of 5 with one call, 4 have a tool that another row's answer calls, 4 are usable" in capsys.readouterr().out


def test_so_many_are_drawn_always_the_same_ones(data):
    first = data("coder")
    assert first == data("coder") and first.keys() == {"rl", "demonstrations", "bfcl"}
    assert len(first["rl"]) == 2 and set(first["rl"]) < {"a", "c", "d", "f"}
    assert sorted(first["rl"] + first["demonstrations"]) == list("abcdef")


def test_a_row_whose_answer_the_only_other_user_tells_is_not_usable(capsys):
    rows = rows_from([row("a", ("weather", 1)), row("b", ("weather", 1), ("taxes", 2))])
    assert real_rows.chosen(rows, None) == []
    assert "of 1 with one call, 1 have a tool that another row's answer calls, 0 are usable" in capsys.readouterr().out
