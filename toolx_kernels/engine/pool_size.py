"""The size of the page pool: the pages that the work needs, limited to a share of the device's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

# A pool takes at most 1 / share of the memory: a host has other work too.
CPU_POOL_SHARE = 8
GPU_POOL_SHARE = 4


def pages_of(prompt: int, limit: int, page_size: int) -> int:
    """Pages of a sequence at its longest: ``prompt`` tokens and ``limit`` new ones, the last of them never written."""
    return -(-(prompt + limit - 1) // page_size)


def pages_wanted(prompts: Sequence[int], n: int, limits: Sequence[int], page_size: int, max_sequences: int) -> int:
    """Pages with which all ``n`` sequences of each prompt can run at once, or ``max_sequences`` if that is fewer.

    ``prompts`` holds lengths. Sequences share the full pages of their prompt and own those after it.
    """
    prefixes = [length // page_size for length in prompts]
    whole = [pages_of(length, limit, page_size) for length, limit in zip(prompts, limits, strict=True)]
    own = max(pages - shared for pages, shared in zip(whole, prefixes, strict=True))
    return sum(prefixes) + own * min(max_sequences, n * len(prompts))


def pool_pages(wanted: int, least: int, page_bytes: int, memory: int, device: str) -> int:
    """Default number of pages of a pool on a device ("cpu" or "cuda") with ``memory`` bytes.

    A pool moves when it grows, and the CUDA graphs that read it are lost, so it grows in powers of two.
    """
    budget = memory // (GPU_POOL_SHARE if device == "cuda" else CPU_POOL_SHARE) // page_bytes
    return max(least, min(power_of_two(wanted), budget))


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


def physical_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of this machine."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_memory()
