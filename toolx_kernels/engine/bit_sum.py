"""The bit sum of a tensor: a hash of its bits that a GPU and a CPU compute alike, of which a fingerprint is made.

With the tensor's bits as a matrix of signed 32-bit words x, ``COLUMNS`` to a row, and odd pseudo-random weights:

    bit sum = sum over rows r of R_r * (sum over columns c of C_c * x_rc)    modulo 2^64

A change of one word, and so of one bit, always changes it, because products of odd weights are odd. So do changes of
two words of a row that swap them or flip one bit in each: the C_c are 32-bit numbers of different sizes, and a
difference of words times one of weights is below 2^64. Any other change goes unnoticed with a probability of about
2^-32 if it flips the highest bits of words only, and less otherwise.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from toolx_kernels.ops import library

COLUMNS = 1024
WORD = 4  # bytes


def bit_sum(tensor: Tensor) -> Tensor:
    """() int64: the bit sum of a tensor of any dtype and layout; bytes short of a whole word count as zeros."""
    words = words_of(tensor)
    out = words.new_empty((), dtype=torch.int64)
    torch.ops.toolx.bit_sum(words, column_weights(words.device), row_weights(len(words), words.device), out)
    return out


def words_of(tensor: Tensor) -> Tensor:
    """(n) int32: the bits of a tensor, without a copy if it is contiguous and made of whole, aligned words."""
    flat = tensor.contiguous().view(-1)
    if flat.nbytes % WORD or flat.storage_offset() * flat.itemsize % WORD:
        padded = flat.new_zeros(-(-flat.nbytes // WORD), dtype=torch.int32)
        padded.view(torch.uint8)[: flat.nbytes] = flat.view(torch.uint8)
        return padded
    return flat.view(torch.int32)


def _odd_numbers(n: int) -> np.ndarray:
    """The first n (uint64) of the generator SplitMix64 (Steele et al., OOPSLA 2014) with seed 0, made odd."""
    z = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31)) | np.uint64(1)


@functools.lru_cache(maxsize=8)  # devices
def column_weights(device: torch.device) -> Tensor:
    """(COLUMNS) int32."""
    return torch.from_numpy(_odd_numbers(COLUMNS).astype(np.uint32).view(np.int32)).to(device)


def row_weights(n_words: int, device: torch.device) -> Tensor:
    """(at least the rows of n_words) int64."""
    return _row_weights((max(0, n_words - 1) // COLUMNS).bit_length(), device)


@functools.lru_cache(maxsize=64)  # devices, and powers of two
def _row_weights(log2: int, device: torch.device) -> Tensor:
    return torch.from_numpy(_odd_numbers(1 << log2).view(np.int64)).to(device)


def in_torch(words: Tensor, columns: Tensor, rows: Tensor, out: Tensor) -> None:
    """Writes the bit sum of words (n) to out ()."""
    out.zero_()
    for first in range(0, -(-len(words) // COLUMNS), 64):  # 64 rows at a time are widened to 64 bits
        part = words[first * COLUMNS : (first + 64) * COLUMNS]
        part = torch.nn.functional.pad(part, (0, -len(part) % COLUMNS)).view(-1, COLUMNS)
        out += ((part * columns.long()).sum(1) * rows[first : first + len(part)]).sum()


library.define(
    "bit_sum(Tensor words, Tensor columns, Tensor rows, Tensor(a!) out) -> ()",
    default=in_torch,
    fake=lambda words, columns, rows, out: None,
)
