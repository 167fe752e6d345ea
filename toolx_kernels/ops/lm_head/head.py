"""The LM head as the loss sees it: which logits there are, and what is alive at a time while they are swept.

    z = softcap(h W^T + bias) / T

Everything that reads or checks the head's inputs is here; the sweeps themselves are in ``sweep_torch`` and
``sweep_triton``.
"""

from __future__ import annotations

from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.ops.lm_head.vocab_shard import start_of
from toolx_kernels.reference import compute_dtype


def pick(tensor: Tensor | None, index: slice | Tensor) -> Tensor | None:
    """Those rows of a tensor that may be absent."""
    return None if tensor is None else tensor[index]


class Head(NamedTuple):
    """The arguments of a sweep. All per-row tensors have the N rows of ``hidden``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N) int64, ids in the whole vocabulary
    scale: Tensor  # (N) 1 / temperature, in compute_dtype
    bias: Tensor | None = None  # (V)
    softcap: float = 0.0
    start: int = 0  # token id of the first row of weight

    @property
    def dtype(self) -> torch.dtype:
        """In which logits and sums are held: fp32, or float64 for float64 inputs."""
        return compute_dtype(self.hidden)

    @property
    def weight_dtype(self) -> torch.dtype:
        """In which hidden and weight meet, should their dtypes differ."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def rows(self, index: slice | Tensor) -> Head:
        return self._replace(hidden=self.hidden[index], targets=self.targets[index], scale=self.scale[index])

    def columns(self, index: slice) -> Head:
        return self._replace(
            weight=self.weight[index],
            bias=pick(self.bias, index),
            start=self.start + index.start,
        )

    def targets_inside(self) -> tuple[Tensor, Tensor]:
        """(N) bool: the target is one of these rows of weight; (N) int64: its row, clamped to them."""
        local = self.targets - self.start
        return (local >= 0) & (local < len(self.weight)), local.clamp(0, len(self.weight) - 1)


def make_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: Tensor,
    bias: Tensor | None,
    softcap: float,
    shard: int,
) -> Head:
    """From the arguments of the operators, in their order."""
    scale = temperature.to(compute_dtype(hidden)).reciprocal()
    bias = None if bias is None else bias.contiguous()
    return Head(hidden, weight, targets.contiguous(), scale, bias, softcap, start_of(shard))


def blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def as_given(function):
    """Runs in the tensors' own precision (autocast would make some reductions bf16) and on their own device."""

    @wraps(function)
    def wrapped(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return function(hidden, *arguments)

    return wrapped
