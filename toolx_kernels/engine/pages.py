"""The page pool: KV memory in reference-counted pages of equal size, with a prefix cache in the free ones.

A page is *held* by the sequences that read it, and *free* when no sequence holds it. A full page can be remembered by
its tokens and those before it; it can still be found after its last holder has released it, until its memory is needed.
So siblings share their prompt, prompts share common prefixes, and a later call finds the prompts of an earlier one.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from toolx_kernels.errors import InputError


class PagePool:
    """``key_caches[layer]`` and ``value_caches[layer]`` are (pages, page_size, Hkv, Dh).

    ``peak`` is the largest number of pages that were held at once.
    """

    def __init__(self, n_pages: int, page_size: int, n_layers: int, n_kv_heads: int, head_dim: int, like: Tensor):
        self.page_size, self.n_pages, self.peak = page_size, 0, 0
        nothing = like.new_empty((0, page_size, n_kv_heads, head_dim))
        self.key_caches, self.value_caches = ([nothing] * n_layers for _ in range(2))
        self.references: list[int] = []
        # Taken from the front: first pages without a remembered prefix, then the least recently released prefix.
        self.free: OrderedDict[int, None] = OrderedDict()
        # A page is remembered by (serial of the page before it, its tokens). Serials are never reused, so the
        # continuations of a forgotten page cannot be found as those of the page that replaces it.
        self._remembered: dict[tuple[int, tuple[int, ...]], int] = {}
        self._of_page: dict[int, tuple[int, tuple[int, tuple[int, ...]]]] = {}  # page -> (serial, key)
        self._serials = itertools.count(1)
        self.enlarge(n_pages)

    def enlarge(self, n_pages: int) -> None:
        """Adds pages, up to ``n_pages`` in all; existing ones keep their contents. If it fails, discard the pool."""
        if n_pages <= self.n_pages:
            return
        for caches in (self.key_caches, self.value_caches):
            for layer, cache in enumerate(caches):
                caches[layer] = cache.new_zeros(n_pages, *cache.shape[1:])
                caches[layer][: self.n_pages] = cache
        self.free.update(dict.fromkeys(range(self.n_pages, n_pages)))
        for page in range(n_pages - 1, self.n_pages - 1, -1):
            self.free.move_to_end(page, last=False)
        self.references += [0] * (n_pages - self.n_pages)
        self.n_pages = n_pages

    @property
    def n_held(self) -> int:
        return self.n_pages - len(self.free)

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """Returns ``count`` pages for writing, each held once by the caller."""
        if count > len(self.free):
            raise InputError(
                f"The page pool has {len(self.free)} free pages of {self.n_pages}, not {count}: raise max_pages."
            )
        pages = [self.free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._forget(page)
            self.references[page] = 1
        self.peak = max(self.peak, self.n_held)
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds a holder to each of the pages, which must be held already."""
        references = self.references
        for page in pages:
            assert references[page] > 0, f"page {page} is free"
            references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Removes a holder from each of the pages; one without holders is free, but still found if remembered."""
        references = self.references
        for page in reversed(pages):  # the end of a prefix is reused before its beginning
            assert references[page] > 0, f"page {page} is already free"
            references[page] -= 1
            if references[page] == 0:
                self.free[page] = None
                self.free.move_to_end(page, last=page in self._of_page)

    def is_shared(self, page: int) -> bool:
        return self.references[page] > 1

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of remembered full pages that is a prefix of ``tokens``; the caller becomes their holder."""
        pages, serial = [], 0
        for key_tokens in self._full_pages(tokens):
            page = self._remembered.get((serial, key_tokens))
            if page is None:
                break
            self.references[page] += 1
            self.free.pop(page, None)
            pages.append(page)
            serial = self._of_page[page][0]
        self.peak = max(self.peak, self.n_held)
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Remembers the full pages among ``pages``, which hold ``tokens``. They must not be written again."""
        n_full = min(len(tokens) // self.page_size, len(pages))
        n_known = n_full
        while n_known and pages[n_known - 1] not in self._of_page:
            n_known -= 1
        serial = self._of_page[pages[n_known - 1]][0] if n_known else 0
        for page, key_tokens in zip(pages[n_known:n_full], self._full_pages(tokens, n_known), strict=False):
            key = (serial, key_tokens)
            if key not in self._remembered:
                self._remembered[key] = page
                self._of_page[page] = (next(self._serials), key)
            serial = self._of_page[self._remembered[key]][0]

    def forget_all(self) -> None:
        """Forgets all remembered pages, because the weights that wrote them have changed."""
        self._remembered.clear()
        self._of_page.clear()

    def copy(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copies whole pages, in every layer."""
        to, source = on_device(np.array([destinations, sources]), self.key_caches[0].device)
        for cache in (*self.key_caches, *self.value_caches):
            cache[to] = cache[source]

    def _full_pages(self, tokens: Sequence[int], first: int = 0) -> Iterator[tuple[int, ...]]:
        size = self.page_size
        return (tuple(tokens[i : i + size]) for i in range(first * size, len(tokens) - len(tokens) % size, size))

    def _forget(self, page: int) -> None:
        if page in self._of_page:
            del self._remembered[self._of_page.pop(page)[1]]


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copies an array to the device; the host does not wait for the copy."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
