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


SMALLEST_BUDGET_BYTES = 1 << 20  # below it tiles get so small that the GEMMs are all overhead
TILES = 4  # logits tiles alive at a time in the backward pass with entropy and softcap


def choose_sweep(n_rows: int, vocab_size: int, dim: int, device: torch.device, itemsize: int = 4) -> Sweep:
    """The block for ``n_rows`` tokens: all that is alive fits the workspace and a quarter of ``n_rows * vocab_size``.

    Half of the budget goes to slices of the weight and of its gradient, ``2 * columns * dim`` elements, the other half
    to logits tiles. (The quarter yields to a smallest budget of 1 MiB.)
    """
    on_cpu = device.type == "cpu"
    workspace = CPU_WORKSPACE_BYTES if on_cpu else GPU_WORKSPACE_BYTES
    budget = min(workspace, max(n_rows * vocab_size * itemsize // 4, SMALLEST_BUDGET_BYTES)) // itemsize
    columns = max(1, min(vocab_size, 4096 if on_cpu else 16384, budget // (4 * dim)))
    tile = min(budget // (2 * TILES), CPU_TILE_BYTES // itemsize if on_cpu else budget)
    columns = min(columns, max(1, tile))
    return Sweep(rows=max(1, min(n_rows, tile // columns)), columns=columns)
