"""The embedding, with a gradient that goes directly to ``weight.grad``."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from toolx_kernels.ops.picks import Picks, sum_rows
from toolx_kernels.reference import compute_dtype


class _Lookup(torch.autograd.Function):
    """``anchor`` is an empty tensor that needs a gradient, so that backward is called. ``holder`` is a tuple with the
    weight, which hides it from autograd."""

    @staticmethod
    def forward(ctx, anchor, holder, ids, padding_idx):
        (ctx.weight,), ctx.padding_idx = holder, padding_idx
        ctx.save_for_backward(ids)
        return F.embedding(ids, ctx.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        ids, rows = ctx.saved_tensors[0].flatten(), upstream.flatten(0, -2)
        if ctx.padding_idx is not None:
            kept = ids != ctx.padding_idx
            ids, rows = ids[kept], rows[kept]
        ids, place = ids.unique(return_inverse=True)
        sums = sum_rows(rows.to(compute_dtype(rows)), Picks(place), len(ids))
        weight = ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight, dtype=weight.grad_dtype)
        present = weight.grad.index_select(0, ids)
        weight.grad.index_copy_(0, ids, (present + sums).to(weight.grad.dtype))
        return None, None, None, None


class _SparseGradient(TorchFunctionMode):
    """A mode in which looking up rows of ``weight`` makes no (V, D) gradient in autograd."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = weight

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.embedding:
            return function(*args, **(kwargs or {}))
        return self._embedding(*args, **(kwargs or {}))

    def _embedding(self, input, weight, padding_idx=None, *others, **options):
        if weight is not self.weight:
            return F.embedding(input, weight, padding_idx, *others, **options)
        anchor = torch.empty(0, device=weight.device, requires_grad=True)
        return _Lookup.apply(anchor, (weight,), input, padding_idx)


def embed(
    embedding: nn.Module,
    ids: Tensor,  # (...) int64
) -> Tensor:
    """``embedding(ids)``, (..., D), whose backward adds the few rows of its gradient directly to ``weight.grad``.

    autograd makes a gradient of the whole vocabulary for every lookup, so a tied head would have two. This gradient
    bypasses autograd: it is for ``backward()``, and ``torch.autograd.grad`` does not return it. Everything else that
    the module does (Gemma's scale, its hooks) still happens. The lookup is left to autograd if something else is
    involved: an adapter around the module, hooks on the weight, a maximal norm, a frozen weight.
    """
    if not _is_plain(embedding):
        return embedding(ids)
    with _SparseGradient(embedding.weight):
        return embedding(ids)


def _is_plain(embedding: nn.Module) -> TypeGuard[nn.Embedding]:
    if not (isinstance(embedding, nn.Embedding) and torch.is_grad_enabled()):
        return False
    weight = embedding.weight
    changed = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse
    watched = weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    return weight.is_leaf and weight.requires_grad and not changed and not watched
