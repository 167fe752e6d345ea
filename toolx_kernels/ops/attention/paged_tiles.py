"""Tiles and splits of the paged attention kernel, chosen from sizes that the host knows."""

from __future__ import annotations

from typing import NamedTuple

import triton

MAX_SPLITS = 32
PROGRAMS_PER_PROCESSOR = 2


class Tile(NamedTuple):
    """At most ``block_m`` rows (query tokens times the heads that share a key) against ``block_n`` keys at a time."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def n_splits(n_programs: int, n_processors: int) -> int:
    """The number of splits of the keys that keeps a GPU busy, given ``n_programs`` programs without splits.

    It depends on sizes that the host knows, never on lengths: a captured launch must work for any lengths.
    """
    return min(MAX_SPLITS, max(1, PROGRAMS_PER_PROCESSOR * n_processors // n_programs))


# For up to 16 rows (decode), and the largest for more, by (bytes per element, BLOCK_D). They compile without register
# spills and within every chip's shared memory (tests/without_gpu/test_cross_compile.py). fp32 needs many registers.
TILES = {
    (2, 64): (Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
    (2, 128): (Tile(16, 64, 4, 3), Tile(128, 32, 8, 3)),
    (2, 256): (Tile(16, 32, 4, 3), Tile(64, 32, 8, 3)),
    (4, 64): (Tile(16, 32, 4, 3), Tile(32, 32, 4, 2)),
    (4, 128): (Tile(16, 32, 4, 3), Tile(32, 32, 8, 2)),
    (4, 256): (Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
}
# Better tiles for single chips; Hopper multiplies from shared memory.
TILES_OF_CHIP = {
    (80, 2, 128): (Tile(16, 64, 4, 3), Tile(128, 32, 8, 2)),
    (90, 2, 128): (Tile(16, 64, 4, 3), Tile(128, 64, 8, 3)),
}


def choose_tile(capability: tuple[int, int] | None, itemsize: int, block_d: int, sharing: int, queries: int) -> Tile:
    """The tile for units of up to ``queries`` tokens with ``sharing`` heads each; ``capability`` None: interpreter."""
    wanted = triton.next_power_of_2(max(16, sharing * queries))
    least = max(16, triton.next_power_of_2(sharing))
    if capability is None:
        return Tile(max(least, min(wanted, 32)), 16, 4, 1)
    key = (itemsize, max(64, block_d))
    chip = capability[0] * 10 + capability[1]
    few, many = TILES_OF_CHIP.get((chip, *key), TILES[key])
    if wanted <= few.block_m:
        return few
    block_m = max(least, min(wanted, many.block_m))
    return many._replace(block_m=block_m, warps=max(4, many.warps * block_m // many.block_m))


def dot_precision(itemsize: int, block_d: int, block_m: int) -> str:
    """Precision of the products: fp32 is multiplied as three products of tf32.

    Two exceptions: the largest heads, whose parts do not fit the registers, and 64 rows or more, which triton 3.6
    multiplies with Hopper's wgmma: results were off by 0.3 on an H200.
    """
    return "tf32x3" if itemsize == 4 and block_d <= 128 and block_m < 64 else "ieee"
