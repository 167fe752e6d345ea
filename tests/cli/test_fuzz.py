"""Flags of ``toolx train`` with any words; ``make soak`` tries many more."""

from tests.cli.fuzz_settings import FUZZER
from tests.fuzzing import fuzz

CASES = 250


def test_flags_are_taken_or_refused():
    counts = fuzz(FUZZER, CASES)
    assert counts["taken"] > CASES / 8 and counts["refused"] > CASES / 2
