"""Rows of every form with anything in them; ``make soak`` tries many more."""

import pytest

from tests.fuzzing import fuzz
from tests.toolcall.datasets.fuzz_rows import FORMS, FUNCTION, FUZZER
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import rows, rows_from

CASES = 800


def test_rows_are_read_or_refused():
    counts = fuzz(FUZZER, CASES)
    assert counts["read"] > CASES / 20 and counts["refused"] > CASES / 2


@pytest.mark.parametrize("name", [["f"], {"f": 1}, None, 3])
def test_a_tool_with_a_name_that_is_no_text_is_refused(name):
    tools = [{"type": "function", "function": {**FUNCTION, "name": name}}]
    with pytest.raises(InputError, match="^set"):
        rows_from([{**FORMS["messages"], "tools": tools}], "set")


def test_values_that_python_cannot_write_are_refused():
    deep: list = []
    for _ in range(3000):
        deep = [deep]
    for value in (10**5000, deep):
        for raw in (
            FORMS["ours"] | {"id": value},
            FORMS["ours"] | {"prompt": value},
            FORMS["xLAM"] | {"answers": value},
            FORMS["ToolACE"] | {"conversations": value},
        ):
            with pytest.raises(InputError, match="^set"):
                rows_from([raw], "set")


def test_a_planted_fault_is_found(monkeypatch):
    monkeypatch.setattr(rows, "json_fault", lambda value, name: None)
    monkeypatch.setattr("tests.fuzzing.SHRINKING", 0.0)
    with pytest.raises(AssertionError, match="case .* fails: (TypeError|ValueError|UnicodeEncodeError|RecursionError)"):
        fuzz(FUZZER, CASES)
