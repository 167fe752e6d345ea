"""Rows of every form with anything in them; ``make soak`` tries many more."""

import pytest

from tests.fuzzing import fuzz
from tests.toolcall.datasets.fuzz_rows import FUZZER
from toolx_kernels.toolcall import rows

CASES = 800


def test_rows_are_read_or_refused():
    counts = fuzz(FUZZER, CASES)
    assert counts["read"] > CASES / 20 and counts["refused"] > CASES / 2


def test_a_planted_fault_is_found(monkeypatch):
    monkeypatch.setattr(rows, "json_fault", lambda value, name: None)
    monkeypatch.setattr("tests.fuzzing.SHRINKING", 0.0)
    with pytest.raises(AssertionError, match="case .* fails: (TypeError|ValueError|UnicodeEncodeError|RecursionError)"):
        fuzz(FUZZER, CASES)
