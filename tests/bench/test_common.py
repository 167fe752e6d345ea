"""The common code of all benchmarks."""

import re
from pathlib import Path

import pytest
import torch

from bench.common.tables import Column, table, text_of
from bench.common.timing import added_peak, take_rounds

ROOT = Path(__file__).resolve().parents[2]


def test_peak_memory_is_what_a_call_adds():
    assert added_peak(lambda: torch.ones(64 * 2**18), torch.device("cpu")) / 2**20 == pytest.approx(64, abs=4)


class Benchmark:
    """The fixture of pytest-benchmark, as documented."""

    def pedantic(self, target, *, setup, rounds):
        for _ in range(rounds):
            args, kwargs = setup()
            target(*args, **kwargs)


@pytest.mark.parametrize("benchmark", [None, Benchmark()], ids=["alone", "timed"])
def test_others_take_their_turn_before_ours(benchmark):
    calls = []

    def others():
        calls.append("others")
        return (len(calls),)

    take_rounds(calls.append, others, 2, benchmark)
    assert calls == ["others", 1, "others", 3]


def test_a_value_that_is_missing_is_an_empty_cell():
    column = Column("ms", "ms", "{:.1f}".format)
    assert [text_of(value, column.text) for value in (None, 0.0)] == ["", "0.0"]
    assert table(["a", "b"], [["1", ""]]) == ["| a | b |", "| --- | --- |", "| 1 |  |"]


def test_what_is_shared_knows_no_benchmark_and_of_the_package_pictures_and_errors():
    paths = [*(ROOT / "bench/common").glob("*.py")]
    known = {f"bench.common.{path.stem}" for path in paths} | {"toolx_kernels.pictures", "toolx_kernels.errors"}
    for path in paths:
        assert {*re.findall(r"^\s*(?:from|import) ((?:bench|toolx)\S*)", path.read_text(), re.M)} <= known, path
