"""The LM head: the arguments of operators and of sweeps, and the gradients of its inputs.

    z = softcap(h W^T + bias) / T

The sweeps themselves are in ``sweep_torch`` and ``sweep_triton``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.ops.lm_head.vocab_shard import start_of
from toolx_kernels.reference import compute_dtype


def pick(tensor: Tensor | None, index: slice | Tensor) -> Tensor | None:
    """``tensor[index]``, or None if there is no tensor."""
    return None if tensor is None else tensor[index]


class Trained(NamedTuple):
    """Which inputs of the head need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class HeadGradients(NamedTuple):
    """Gradients of the head's inputs, in their dtypes; None for an input that needs none."""

    hidden: Tensor | None = None  # (N, D)
    weight: Tensor | None = None  # (V, D)
    bias: Tensor | None = None  # (V)

    def spread(self, rows: Tensor, n_rows: int) -> HeadGradients:
        """The same, with the gradient of hidden placed at ``rows`` of ``n_rows`` rows, zero elsewhere."""
        if self.hidden is None or len(rows) == n_rows:
            return self
        hidden = self.hidden.new_zeros(n_rows, self.hidden.shape[1])
        return self._replace(hidden=hidden.index_copy_(0, rows, self.hidden))


class HeadInputs(NamedTuple):
    """The first arguments of every operator over the head, in the operators' order."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N) int64
    temperature: Tensor  # (N)
    bias: Tensor | None  # (V)
    softcap: float  # 0 for none
    shard: int  # key of the VocabShard, -1 if weight holds the whole vocabulary

    @classmethod
    def split(cls, arguments: Sequence) -> tuple[HeadInputs, Sequence]:
        """Splits an operator's arguments into the head and the others."""
        n = len(cls._fields)
        return cls(*arguments[:n]), arguments[n:]

    def head(self) -> Head:
        scale = self.temperature.to(compute_dtype(self.hidden)).reciprocal()
        bias = None if self.bias is None else self.bias.contiguous()
        targets = self.targets.contiguous()
        return Head(self.hidden, self.weight, targets, scale, bias, self.softcap, start_of(self.shard), self.shard)


# Indices of the trainable inputs.
TRAINABLE = [HeadInputs._fields.index(name) for name in Trained._fields]


def results_of(grads: HeadGradients, inputs: HeadInputs) -> tuple[Tensor, ...]:
    """The gradients as an operator returns them: an empty tensor in place of None."""
    return tuple(inputs.hidden.new_empty(0) if grad is None else grad for grad in grads)


def fake_results(inputs: HeadInputs, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialized tensors of the shapes that ``results_of`` returns."""
    empty = inputs.hidden.new_empty
    pairs = zip((inputs.hidden, inputs.weight, inputs.bias), needs, strict=True)
    return tuple(empty(0) if x is None or not need else x.new_empty(x.shape) for x, need in pairs)


def for_autograd(results: Sequence[Tensor], needs: Sequence[bool], n_inputs: int) -> list[Tensor | None]:
    """A gradient or None for each of an operator's inputs."""
    grads: list[Tensor | None] = [None] * n_inputs
    for at, grad, need in zip(TRAINABLE, results, needs, strict=True):
        grads[at] = grad if need else None
    return grads


class Head(NamedTuple):
    """The arguments of a sweep. All per-row tensors have the N rows of ``hidden``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N) int64, ids in the whole vocabulary
    scale: Tensor  # (N) 1 / temperature, in compute_dtype
    bias: Tensor | None = None  # (V)
    softcap: float = 0.0
    start: int = 0  # token id of the first row of weight
    shard: int = -1

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of logits and sums: fp32, or float64 for float64 inputs."""
        return compute_dtype(self.hidden)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype to which hidden and weight are promoted if theirs differ."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def rows(self, index: slice | Tensor) -> Head:
        return self._replace(hidden=self.hidden[index], targets=self.targets[index], scale=self.scale[index])

    def columns(self, index: slice) -> Head:
        start = self.start + index.start
        return self._replace(weight=self.weight[index], bias=pick(self.bias, index), start=start)

    def targets_inside(self) -> tuple[Tensor, Tensor]:
        """(N) bool: whether the target is among these rows of weight; (N) int64: its row, clamped to them."""
        local = self.targets - self.start
        return (local >= 0) & (local < len(self.weight)), local.clamp(0, len(self.weight) - 1)


def blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def as_given(function: Callable) -> Callable:
    """Decorator: runs in the tensors' precision (autocast would use bf16 for some reductions) and on their device."""

    @wraps(function)
    def wrapped(hidden: Tensor, *arguments):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return function(hidden, *arguments)

    return wrapped
