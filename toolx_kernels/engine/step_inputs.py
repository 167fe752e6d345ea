"""Step inputs: all inputs of a decode step in one buffer, in sizes rounded up to a few buckets."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from toolx_kernels.engine.pool_size import power_of_two

ROW_TILE = 64  # rows that matrix products and sampling compute at a time: fewer save little
LEAST_WIDTH = 64  # columns of a graph's block table
SIBLINGS = (4, 16, 64)  # one attention tile each; a single row shares no prefix, and more select no other tile

Array = Any  # a numpy array when a step is packed, a tensor when it is read


@dataclass(slots=True, frozen=True)
class DecodeInputs:
    """The inputs of one decode step of R sequences in G groups."""

    ids: np.ndarray  # (R) int64: the newest token of each sequence
    positions: np.ndarray  # (R) int64
    slots: np.ndarray  # (R) int64: the slots of its key and value
    streams: np.ndarray  # (R, 5) int64: random streams of the tokens to be sampled
    block_table: np.ndarray  # (R, W) int32
    cu_groups: np.ndarray  # (G + 1) int64
    prefix_lens: np.ndarray  # (R) int64


class Sizes(NamedTuple):
    """Sizes of a decode step's buffer: rows, groups, columns of the block table, and the rows of the largest group."""

    rows: int
    groups: int
    width: int
    siblings: int

    @classmethod
    def of(cls, inputs: DecodeInputs) -> Sizes:
        rows, width = inputs.block_table.shape
        return cls(rows, len(inputs.cu_groups) - 1, width, int(np.diff(inputs.cu_groups).max()))


def bucket(exact: Sizes) -> Sizes:
    """The sizes of the graph to use, at least the exact ones: few, because each graph is captured separately.

    Up to ROW_TILE rows a step takes as long as reading the weights, so powers of two cost almost nothing. ``siblings``
    only selects a kernel's tile; each of its values is another kernel to compile.
    """
    rows = power_of_two(exact.rows) if exact.rows <= ROW_TILE else math.ceil(exact.rows / ROW_TILE) * ROW_TILE
    groups = power_of_two(exact.groups + (rows > exact.rows))  # padding rows form one more group
    width = power_of_two(max(exact.width, LEAST_WIDTH))
    siblings = next(n for n in SIBLINGS if n >= min(exact.siblings, SIBLINGS[-1]))
    return Sizes(rows, groups, width, siblings)


class Parts(NamedTuple):
    """The inputs of a step as views of its buffer: each is contiguous, so that no kernel copies it first."""

    ids: Array  # (R) int64, like the next three
    positions: Array  # (R)
    slots: Array  # (R)
    streams: Array  # (R, 5)
    seq_lens: Array  # (R) int32, like all others
    prefix_lens: Array  # (R)
    cu_groups: Array  # (G + 1)
    cu_rows: Array  # (R + 1): every row has one query
    block_table: Array  # (R, W)


def parts_of(buffer: Array, sizes: Sizes) -> Parts:
    """The parts of a buffer of ``buffer_length(sizes)`` int64."""
    rows, width = sizes.rows, sizes.width
    wide, narrow = buffer[: 8 * rows], buffer[8 * rows :].view(torch.int32 if torch.is_tensor(buffer) else np.int32)
    bounds = np.cumsum([0, rows, rows, sizes.groups + 1, rows + 1, rows * width])
    seq_lens, prefix_lens, cu_groups, cu_rows, table = (narrow[i:j] for i, j in itertools.pairwise(bounds))
    ids, positions, slots = wide[: 3 * rows].reshape(3, rows)
    streams, block_table = wide[3 * rows :].reshape(rows, 5), table.reshape(rows, width)
    return Parts(ids, positions, slots, streams, seq_lens, prefix_lens, cu_groups, cu_rows, block_table)


def buffer_length(sizes: Sizes) -> int:
    narrow = 3 * sizes.rows + sizes.groups + 2 + sizes.rows * sizes.width
    return 8 * sizes.rows + math.ceil(narrow / 2)


def pack(inputs: DecodeInputs, parts: Parts) -> None:
    """Writes all of a step's inputs to the parts of its buffer, and pads these."""
    (n_rows, width), n_bounds = inputs.block_table.shape, len(inputs.cu_groups)
    parts.ids[:n_rows], parts.positions[:n_rows], parts.slots[:n_rows] = inputs.ids, inputs.positions, inputs.slots
    parts.slots[n_rows:] = -1  # writes nothing
    parts.streams[:n_rows], parts.prefix_lens[:n_rows] = inputs.streams, inputs.prefix_lens
    parts.ids[n_rows:], parts.positions[n_rows:], parts.prefix_lens[n_rows:] = 0, 0, 0
    parts.seq_lens[:n_rows], parts.seq_lens[n_rows:] = inputs.positions + 1, 1
    parts.cu_groups[:n_bounds], parts.cu_groups[n_bounds:] = inputs.cu_groups, len(parts.ids)
    parts.cu_rows[:] = np.arange(len(parts.cu_rows))
    parts.block_table[:n_rows, :width], parts.block_table[n_rows:, 0] = inputs.block_table, 0
