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

from toolx_kernels.engine.bit_sum import COLUMNS, MULTIPLIER, bit_sum, word_bytes

ROWS = 16  # of COLUMNS words that one program sums
ROWS_AT_ONCE = 4
WORD = 8  # bytes


@triton.jit(do_not_specialize=["n_parts"])
def bit_sum_kernel(
    parts_ptr,  # (3, parts) int64: address of a part of a tensor, its number of words, index of the tensor
    sums_ptr,  # (parts) int64
    n_parts,
    MULTIPLIER: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The sum of one part, which begins in column 0."""
    part = tl.program_id(0).to(tl.int64)
    words = tl.load(parts_ptr + part).to(tl.pointer_type(tl.int64))
    n_words = tl.load(parts_ptr + n_parts + part)
    column = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int64)
    for first_row in range(0, ROWS, BLOCK_R):
        at = (first_row + tl.arange(0, BLOCK_R))[:, None] * COLUMNS + column[None, :]
        total += tl.load(words + at, mask=(column < COLUMNS)[None, :] & (at < n_words), other=0)
    weighted = tl.sum(total, 0) * (column.to(tl.int64) * MULTIPLIER + 1)
    tl.store(sums_ptr + part, tl.sum(weighted, 0))


def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """See ``fingerprint.bit_sums``. The tensors are on one GPU; those not made of whole words are summed in torch."""
    in_words = [tensor.is_contiguous() and word_bytes(tensor) == WORD for tensor in tensors]
    places = tuple(
        (tensor.data_ptr(), tensor.nbytes if whole else 0) for tensor, whole in zip(tensors, in_words, strict=True)
    )
    parts = _parts(places, tensors[0].device)
    sums_of_parts = parts.new_empty(parts.shape[1])
    if parts.shape[1]:
        bit_sum_kernel[(parts.shape[1],)](
            parts, sums_of_parts, parts.shape[1], MULTIPLIER=MULTIPLIER, COLUMNS=COLUMNS, ROWS=ROWS,
            BLOCK_R=ROWS_AT_ONCE, BLOCK_C=triton.next_power_of_2(COLUMNS),
        )  # fmt: skip
    sums = parts.new_zeros(len(tensors)).index_add_(0, parts[2], sums_of_parts)  # integers: exact in any order
    for place, whole in enumerate(in_words):
        if not whole:
            sums[place] = bit_sum(tensors[place])
    return sums


@functools.lru_cache(maxsize=4)  # models; a table is reused as long as no tensor moves
def _parts(places: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The first argument of the kernel, for tensors at these (address, bytes)."""
    size = ROWS * COLUMNS * WORD
    address, n_bytes = np.array(places, dtype=np.int64).T
    counts = -(-n_bytes // size)
    tensor = np.repeat(np.arange(len(places)), counts)
    begin = (np.arange(len(tensor)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
    parts = np.stack([address[tensor] + begin, np.minimum(n_bytes[tensor] - begin, size) // WORD, tensor])
    return torch.from_numpy(parts).to(device)
