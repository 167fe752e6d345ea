"""The size of the page pool: pages that the work asks for, and what of a device's memory they may take."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

# A pool takes at most one part in so many of the memory: a host has other work than this.
CPU_POOL_SHARE = 8
GPU_POOL_SHARE = 4


def pages_of(prompt: int, limit: int, page_size: int) -> int:
    """Pages of one sequence at its longest: ``prompt`` tokens and ``limit`` more, the last never written."""
    return -(-(prompt + limit - 1) // page_size)


def pages_wanted(prompts: Sequence[int], n: int, limits: Sequence[int], page_size: int, max_sequences: int) -> int:
    """Pages with which all ``n`` sequences of each prompt run at once, or ``max_sequences`` of them if these are fewer.

    ``prompts`` holds lengths. The full pages of a prompt are there once, what follows is each sequence's own.
    """
    prefixes = [length // page_size for length in prompts]
    whole = [pages_of(length, limit, page_size) for length, limit in zip(prompts, limits, strict=True)]
    own = max(pages - shared for pages, shared in zip(whole, prefixes, strict=True))
    return sum(prefixes) + own * min(max_sequences, n * len(prompts))


def pool_pages(wanted: int, least: int, page_bytes: int, memory: int, device: str) -> int:
    """Pages of a pool on a device ("cpu" or "cuda") with this memory, where no size is given.

    A pool that grows moves, and the CUDA graphs that read it are lost: in powers of two it grows seldom.
    """
    budget = memory // (GPU_POOL_SHARE if device == "cuda" else CPU_POOL_SHARE) // page_bytes
    return max(least, min(power_of_two(wanted), budget))


def power_of_two(n: int) -> int:
    """The least that is not below ``n``."""
    return 1 << (n - 1).bit_length()


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else physical_memory()
