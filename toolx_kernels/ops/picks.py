"""Picks of rows: a row gather with a deterministic backward.

On a GPU torch adds the gradients of a row that was picked twice in the order in which its threads arrive. Here a row's
gradients are added in the order of the picks, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from toolx_kernels.reference import compute_dtype


class Picks:
    """The picked rows, as an ``index`` (N) int64; the sorted index that their gradient needs is computed once."""

    def __init__(self, index: Tensor):
        self.index = index
        self._bags: tuple[Tensor, Tensor] | None = None

    def bags(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The picks sorted by row, in order (N), and where each row's begin (n_rows); ``n_rows`` must not change."""
        if self._bags is None:
            order = self.index.argsort(stable=True)
            every = torch.arange(n_rows, device=self.index.device)
            self._bags = order, torch.searchsorted(self.index[order], every)
        return self._bags


def sum_rows(
    picked: Tensor,  # (N, ...)
    picks: Picks,
    n_rows: int,
) -> Tensor:
    """(n_rows, ...): the sum over the picks of each row, in the order of the picks, bitwise repeatable."""
    if picked.is_cuda:  # index_put_ sorts the index first; index_add_ uses atomics
        total = picked.new_zeros(n_rows, *picked.shape[1:])
        return total.index_put_((picks.index,), picked, accumulate=True)
    # index_add_ takes the picks one by one, and with several threads takes several times as long as this
    order, starts = picks.bags(n_rows)
    return F.embedding_bag(order, picked.reshape(len(picked), -1), starts, mode="sum").view(n_rows, *picked.shape[1:])


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, source, picks):
        ctx.picks, ctx.n_rows = picks, len(source)
        return source.index_select(0, picks.index)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        total = sum_rows(upstream.to(compute_dtype(upstream)), ctx.picks, ctx.n_rows)
        return total.to(upstream.dtype), None


def take_rows(
    source: Tensor,  # (M, ...)
    picks: Picks,
) -> Tensor:
    """``source[picks.index]``, (N, ...); the gradients of a row picked more than once are summed in fp32 or float64.

    Differentiable once.
    """
    return _TakeRows.apply(source, picks)
