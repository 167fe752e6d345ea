"""Tens of thousands of operations on page pools, and schedules; ``make soak`` does a million."""

import pytest

from tests.engine import fuzz_pages, fuzz_scheduler
from tests.fuzzing import fuzz
from toolx_kernels.engine.pages import PagePool

CASES = 60


def test_a_pool_does_what_lists_and_dicts_do():
    counts = fuzz(fuzz_pages.FUZZER, CASES)
    assert counts["operations"] == CASES * fuzz_pages.OPERATIONS
    for kind in ("found", "lost", "copied"):
        assert counts[kind] > 2 * CASES, kind


def releases_out_of_order(pool, pages):
    for page in pages:
        pool.references[page] -= 1
        if pool.references[page] == 0:
            pool.free[page] = None


def shares_without_taking(pool, tokens):
    free = pool.free.copy()
    pages = find(pool, tokens)
    pool.free.update(free)
    return pages


find = PagePool.find
FAULTS = {
    "_forget": (lambda pool, page: None, "found|lost"),
    "forget_all": (lambda pool: None, "found"),
    "copy": (lambda pool, sources, destinations: None, "other tokens"),
    "is_shared": (lambda pool, page: False, "others read it"),
    "release": (releases_out_of_order, "a prefix is lost|released first"),
    "find": (shares_without_taking, "free pages are held|that are held"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_of_a_pool_are_found(name, monkeypatch):
    planted, message = FAULTS[name]
    monkeypatch.setattr(PagePool, name, planted)
    monkeypatch.setattr("tests.fuzzing.SHRINKING", 0.0)
    with pytest.raises(AssertionError, match=f"fails: AssertionError: .*({message})"):
        fuzz(fuzz_pages.FUZZER, CASES)


def test_sequences_end_with_the_tokens_that_they_would_have_alone():
    counts = fuzz(fuzz_scheduler.FUZZER, CASES)
    assert min(counts["preempted"], counts["cancelled"]) > CASES / 2 and counts["sequences"] > 10 * CASES


@pytest.mark.parametrize("name", ["_forget", "copy", "is_shared"])
def test_planted_faults_of_a_schedule_are_found(name, monkeypatch):
    monkeypatch.setattr(PagePool, name, FAULTS[name][0])
    monkeypatch.setattr("tests.fuzzing.SHRINKING", 0.0)
    with pytest.raises(AssertionError, match="fails: AssertionError"):
        fuzz(fuzz_scheduler.FUZZER, CASES)
