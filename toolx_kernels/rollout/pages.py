"""The page pool: KV memory in pages of equal size, reference-counted so that siblings share their prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.errors import InputError


class PagePool:
    """``key_caches[layer]`` and ``value_caches[layer]`` are (pages, page_size, Hkv, Dh)."""

    def __init__(self, n_pages: int, page_size: int, n_layers: int, n_kv_heads: int, head_dim: int, like: Tensor):
        shape = (n_pages, page_size, n_kv_heads, head_dim)
        self.page_size = page_size
        self.n_pages = n_pages
        self.key_caches = [torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(n_layers)]
        self.value_caches = [torch.zeros_like(cache) for cache in self.key_caches]
        self.free = list(range(n_pages - 1, -1, -1))  # popped from the end: low pages first
        self.references = [0] * n_pages

    def pages_for(self, n_tokens: int) -> int:
        return -(-n_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, each held once by the caller."""
        if count > len(self.free):
            raise InputError(
                f"The page pool has {len(self.free)} free pages of {self.n_pages}, not {count}: raise max_pages."
            )
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more holder for each of the pages."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is free"
            self.references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One holder less; a page without holders is free again."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is already free"
            self.references[page] -= 1
            if self.references[page] == 0:
                self.free.append(page)

    def copy(self, sources: list[int], destinations: list[int]) -> None:
        """Copies whole pages, in every layer."""
        for cache in (*self.key_caches, *self.value_caches):
            cache[destinations] = cache[sources]
