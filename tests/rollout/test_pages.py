"""The page pool under random use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.errors import InputError
from toolx_kernels.rollout.pages import PagePool


def make_pool(n_pages=12):
    return PagePool(n_pages, 4, 2, 1, 3, like=torch.zeros(1))


@given(st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 5)), max_size=60))
def test_pages_are_free_exactly_when_nobody_holds_them(actions):
    pool = make_pool()
    held: list[list[int]] = []
    for action, number in actions:
        if action == "allocate":
            if number > len(pool.free):
                with pytest.raises(InputError, match=f"not {number}"):
                    pool.allocate(number)
                continue
            held.append(pool.allocate(number))
        elif held and action == "share":
            pages = held[number % len(held)]
            pool.share(pages)
            held.append(pages)
        elif held:
            pool.release(held.pop(number % len(held)))
        holders = [sum(pages.count(page) for pages in held) for page in range(pool.n_pages)]
        assert pool.references == holders
        assert sorted(pool.free) == [page for page, count in enumerate(holders) if count == 0]


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
