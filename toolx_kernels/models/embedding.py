"""Embedding whose gradient goes straight to ``weight.grad``."""

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
    """``anchor`` is empty: a tensor that needs a gradient, so that backward is called. autograd does not look into the
    tuple ``holder`` of the weight."""

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
    """While it is on, looking rows of ``weight`` up leaves no (V, D) gradient behind in autograd."""

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
    """``embedding(ids)``, (..., D), whose backward adds the few rows of its gradient straight to ``weight.grad``.

    autograd makes a gradient of the whole vocabulary for every lookup, which a tied head then has twice. Because it
    goes round autograd, this one is for ``backward()``: ``torch.autograd.grad`` does not return it. Whatever the module
    does besides the lookup (Gemma's scale, its hooks) is done. Where others stand in between, autograd keeps the
    gradient: an adapter around the module, hooks on the weight, a maximal norm, a frozen weight.
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
