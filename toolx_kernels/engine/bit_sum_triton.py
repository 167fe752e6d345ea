"""Bit sums of all tensors of a model in one Triton kernel: hundreds of them are small, and each by itself would cost
several launches."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from toolx_kernels.engine.bit_sum import COLUMNS, WORD, column_weights, row_weights, words_of

ROWS = 32  # of COLUMNS words that one program sums
ROWS_AT_ONCE = 4


@triton.jit(do_not_specialize=["n_parts"])
def bit_sum_kernel(
    parts_ptr,  # (4, parts) int64: address of a part of a tensor, its number of words, its first row, the tensor
    columns_ptr,  # (COLUMNS) int32
    rows_ptr,  # int64, as many as the largest tensor has rows
    sums_ptr,  # (parts) int64
    n_parts,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """The bit sum of one part, which begins in column 0."""
    part = tl.program_id(0).to(tl.int64)
    words = tl.load(parts_ptr + part).to(tl.pointer_type(tl.int32))
    n_words = tl.load(parts_ptr + n_parts + part)
    row_weights = rows_ptr + tl.load(parts_ptr + 2 * n_parts + part)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.int64)
    for first in range(0, ROWS, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        at = row[:, None] * COLUMNS + column[None, :]
        word = tl.load(words + at, mask=at < n_words, other=0).to(tl.int64)
        weight = tl.load(row_weights + row, mask=row * COLUMNS < n_words, other=0)
        total += tl.sum(word * weight[:, None], 0)
    tl.store(sums_ptr + part, tl.sum(total * tl.load(columns_ptr + column).to(tl.int64), 0))


def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """(tensors) int64: the ``bit_sum`` of each. The tensors are on one GPU."""
    device = tensors[0].device
    words = [words_of(tensor) for tensor in tensors]
    parts = _parts(tuple((part.data_ptr(), len(part)) for part in words), device)
    sums_of_parts = parts.new_empty(parts.shape[1])
    if parts.shape[1]:
        bit_sum_kernel[(parts.shape[1],)](
            parts, column_weights(device), row_weights(max(map(len, words)), device), sums_of_parts, parts.shape[1],
            COLUMNS=COLUMNS, ROWS=ROWS, BLOCK_R=ROWS_AT_ONCE,
        )  # fmt: skip
    return parts.new_zeros(len(tensors)).index_add_(0, parts[3], sums_of_parts)  # integers: exact in any order


@functools.lru_cache(maxsize=4)  # models; a table is reused as long as no tensor moves
def _parts(places: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The first argument of the kernel, for tensors at these (address, words)."""
    size = ROWS * COLUMNS
    address, n_words = np.array(places, dtype=np.int64).T
    counts = -(-n_words // size)
    tensor = np.repeat(np.arange(len(places)), counts)
    begin = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    left = np.minimum(n_words[tensor] - begin, size)
    parts = np.stack([address[tensor] + begin * WORD, left, begin // COLUMNS, tensor])
    return torch.from_numpy(parts).to(device)
