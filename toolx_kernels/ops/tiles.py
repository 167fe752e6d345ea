"""Sizes of the blocks in which the vocabulary is swept: the one place where they are chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch

CPU_WORKSPACE_BYTES = 64 << 20
GPU_WORKSPACE_BYTES = 512 << 20
CPU_TILE_BYTES = 8 << 20  # the logits tile is passed over several times, so it should stay in the last-level cache


class Sweep(NamedTuple):
    """``rows`` x ``columns`` logits are alive at a time."""

    rows: int
    columns: int


def choose_sweep(n_rows: int, vocab_size: int, dim: int, device: torch.device, itemsize: int = 4) -> Sweep:
    """The block for ``n_rows`` tokens: within the workspace, and at most a quarter of ``n_rows * vocab_size``.

    The workspace counts the logits tile and the upcast slice of the weight, ``columns * (rows + dim)`` elements.
    """
    on_cpu = device.type == "cpu"
    budget = (CPU_WORKSPACE_BYTES if on_cpu else GPU_WORKSPACE_BYTES) // itemsize
    columns = max(1, min(vocab_size, 4096 if on_cpu else 16384, budget // (2 * dim)))
    tile = min(budget - columns * dim, CPU_TILE_BYTES // itemsize if on_cpu else budget, n_rows * vocab_size // 4)
    columns = max(1, min(columns, tile))
    return Sweep(rows=max(1, min(n_rows, tile // columns)), columns=columns)
