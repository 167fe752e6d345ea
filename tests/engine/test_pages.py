"""The page pool; ``test_fuzz.py`` uses it at random."""

import pytest
import torch

from toolx_kernels.engine.pages import PagePool
from toolx_kernels.errors import out_of_memory


def make_pool(n_pages=12):
    return PagePool(n_pages, 4, 2, 1, 3, like=torch.zeros(1))


def test_misuse_is_caught():
    pool = make_pool()
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError, match="already free"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="is free"):
        pool.share(pages)


def test_copy_moves_whole_pages_in_every_layer():
    pool = make_pool()
    for cache in (*pool.key_caches, *pool.value_caches):
        cache.copy_(torch.randn_like(cache))
    before = [cache.clone() for cache in (*pool.key_caches, *pool.value_caches)]
    pool.copy([1, 5], [7, 2])
    for old, new in zip(before, (*pool.key_caches, *pool.value_caches), strict=True):
        assert torch.equal(new[[7, 2]], old[[1, 5]])
        untouched = [p for p in range(12) if p not in (2, 7)]
        assert torch.equal(new[untouched], old[untouched])


def test_a_prefix_is_found_until_its_memory_is_needed():
    pool = make_pool(6)
    tokens = list(range(12))
    pages = pool.allocate(3)
    pool.remember(tokens, pages)
    pool.release(pages)
    assert pool.find(tokens) == pages and pool.find(tokens[:7] + [99]) == pages[:1]
    pool.release(pages)
    pool.release(pages[:1])
    assert set(pool.allocate(3)).isdisjoint(pages), "pages that hold nothing are taken first"
    assert pool.allocate(1) == pages[2:], "then the end of a prefix"
    assert pool.find(tokens) == pages[:2]


def test_what_followed_a_forgotten_page_is_not_found_behind_another():
    pool = make_pool(2)
    pages = pool.allocate(2)
    pool.remember([1] * 4 + [2] * 4, pages)
    pool.release(pages[:1])
    [first] = pool.allocate(1)
    assert first == pages[0]
    pool.remember([1] * 4, [first])
    assert pool.find([1] * 4 + [2] * 4) == [first], "the page behind it belonged to what was there before"


def test_equal_prefixes_in_two_places_are_one():
    pool = make_pool(6)
    one, two = pool.allocate(2), pool.allocate(2)
    pool.remember([1] * 8, one)
    pool.remember([1] * 8, two)
    assert pool.find([1] * 8) == one
    pool.remember([1] * 8 + [2] * 4, [*two, *pool.allocate(1)])
    assert len(pool.find([1] * 8 + [2] * 4)) == 3


def test_enlarging_keeps_what_pages_hold():
    pool = make_pool(3)
    pages = pool.allocate(3)
    for cache in (*pool.key_caches, *pool.value_caches):
        cache.copy_(torch.randn_like(cache))
    before = [cache.clone() for cache in (*pool.key_caches, *pool.value_caches)]
    pool.enlarge(5)
    for old, new in zip(before, (*pool.key_caches, *pool.value_caches), strict=True):
        assert new.shape[0] == 5 and torch.equal(new[:3], old)
    assert sorted(pages + pool.allocate(2)) == list(range(5)) and pool.peak == 5


def test_memory_that_cannot_be_had_is_an_error_of_memory():
    n_pages = 2**60 // (4 * 3 * 4)  # the cache would exceed the address space
    with pytest.raises(RuntimeError) as error:
        make_pool(n_pages)
    assert out_of_memory(error.value)
