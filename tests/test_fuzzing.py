"""The driver of the fuzzers: a failure is named, repeated by its command and made small, and nothing hangs."""

import re
from collections import Counter

import pytest

from tests.fuzzing import Fuzzer, fuzz, shrunk


def fuzzer(check, seconds=5.0):
    return Fuzzer("letters", "tests.x", lambda rng: (7, "".join(rng.choices("abcd", k=30))), check, lambda _: seconds)


def test_a_failing_case_is_repeated_by_its_number_and_made_small():
    def check(setting, text):
        if "a" in text[1:] and text.count("d") > 14:
            raise ValueError("both")
        return Counter(letters=len(text))

    said = []
    with pytest.raises(AssertionError, match="case (.+) of seed 5 fails: ValueError: both") as found:
        fuzz(fuzzer(check), 10_000, seed=5, said=said.append)
    number = int(re.search(r"--seed 5 --first (\d+) --cases 1\n", str(found.value))[1])
    with pytest.raises(AssertionError) as again:
        fuzz(fuzzer(check), 1, seed=5, first=number)
    assert str(again.value) == str(found.value)
    assert "setting: 7\n" in str(found.value) and "part, 16 of 30" in str(found.value)
    assert fuzz(fuzzer(check), number, seed=5) == Counter(letters=30 * number)
    assert fuzz(fuzzer(check), 20, seed=5, said=said.append) and len(said) == 10
    assert re.fullmatch(r"letters, seed 5: 20 of 20 cases in \d+ s; 600 letters", said[-1])


def test_a_regular_expression_without_end_is_interrupted():
    def check(setting, text):
        re.fullmatch("(x|x)*y", "x" * len(text) * 2)

    with pytest.raises(AssertionError, match="TooSlow: it takes more than 0.02 s of the processor") as found:
        fuzz(fuzzer(check, seconds=0.02), 1)
    assert int(re.search(r"part, (\d+) of 30", str(found.value))[1]) < 20


def test_shrinking_leaves_what_is_needed():
    assert shrunk("xxaxxbxx", lambda part: "a" in part and "b" in part) == "ab"
    assert shrunk([3, 1, 2, 1], lambda part: sum(part) >= 3) == [2, 1]
