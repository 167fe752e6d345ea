"""Row gather with a deterministic backward.

On a GPU torch adds the gradients of rows that were picked twice in whichever order its threads arrive. Here a row's
gradients are added in the order of the picks, on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from toolx_kernels.reference import compute_dtype


class Picks:
    """Which rows are picked, as an ``index`` (N) int64; what their gradient needs is found once for all its uses."""

    def __init__(self, index: Tensor):
        self.index = index
        self._bags: tuple[Tensor, Tensor] | None = None

    def bags(self, n_rows: int) -> tuple[Tensor, Tensor]:
        """The picks row by row, in their order (N), and where each row's begin (n_rows); of one ``n_rows`` alone."""
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
    """(n_rows, ...): the sum of what was picked of each row, in the order of the picks, repeatable to the bit."""
    if picked.is_cuda:  # sorts the index first, where index_add_ has atomics
        total = picked.new_zeros(n_rows, *picked.shape[1:])
        return total.index_put_((picks.index,), picked, accumulate=True)
    # index_add_ goes through the picks one by one, and with several threads takes a multiple of this
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
    """``source[picks.index]``, (N, ...); rows picked more than once get the sum of their gradients, in fp32 or above.

    Differentiable once.
    """
    return _TakeRows.apply(source, picks)
