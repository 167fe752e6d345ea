"""The bit sum of a tensor: the position-weighted sum of its words, of which a fingerprint is made."""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLUMNS = 1021  # a prime: values that move by whole rows of a weight move to other columns
MULTIPLIER = 2654435761


def bit_sum(tensor: Tensor) -> Tensor:
    """() int64: the sum of a tensor's words, weighted by their positions; sums wrap around."""
    flat = tensor.contiguous().view(-1)
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[word_bytes(flat)])
    whole = len(words) // COLUMNS * COLUMNS
    sums = words[:whole].view(-1, COLUMNS).sum(0, dtype=torch.int64)
    sums[: len(words) - whole] += words[whole:]
    return (sums * (torch.arange(COLUMNS, device=words.device) * MULTIPLIER + 1)).sum()


def word_bytes(tensor: Tensor) -> int:
    """Bytes of the widest word, up to 8, that divides a contiguous tensor and its offset."""
    return math.gcd(tensor.nbytes, tensor.storage_offset() * tensor.itemsize, 8)
