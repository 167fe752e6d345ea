"""Thousands of broken completions; ``make soak`` tries a million."""

import json

import pytest

from tests.fuzzing import fuzz
from tests.toolcall.fuzz import FUZZER
from toolx_kernels.toolcall import match, parse, rewards, strict_json

CASES = 1000


def test_completions_of_all_kinds_are_survived():
    counts = fuzz(FUZZER, CASES)
    for kind in ("malformed", "with calls", "without calls", "right", "exemplifying"):
        assert counts[kind] > CASES / 8, kind
    assert counts["similar"] > CASES / 50


def same_set(calls, answer, tools=None):
    return calls is not None and set(map(match.call_key, calls)) == set(map(match.call_key, answer))


FAULTS = {
    "nesting without a limit": (strict_json, "is_shallow", lambda value: True, "nested too deep"),
    "numbers that are not JSON": (strict_json, "_DECODER", json.JSONDecoder(), "JSON compliant"),
    "calls that count once": (rewards, "exact_match", same_set, "is_correct and exact_match differ"),
    "space before a thought": (parse, "skip_space", lambda text, start: start, "white space"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, monkeypatch):
    module, name, planted, message = FAULTS[fault]
    monkeypatch.setattr(module, name, planted)
    monkeypatch.setattr("tests.fuzzing.SHRINKING", 0.0)
    with pytest.raises(AssertionError, match=message):
        fuzz(FUZZER, CASES)
