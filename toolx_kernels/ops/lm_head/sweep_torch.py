"""Sweeps over the vocabulary in plain torch: for CPUs, for float64, and for devices without Triton.

The same functions with the same arguments are in ``sweep_triton``. At any time memory holds one tile of logits, small
enough to stay in the cache, and one upcast slice of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head.head import Head, blocks
from toolx_kernels.ops.lm_head.tiles import SweepSize

FUSES_OBJECTIVE = False  # with the kernel that adds partial sums
LOG_OF_NOTHING = -1e4  # exp() of it is exactly zero, and it times zero is not NaN as -inf would be


class _Tiles:
    """Produces tiles of scaled logits, in the dtype of the sums."""

    def __init__(self, head: Head, columns: int, target_logits: Tensor, with_space: bool = True):
        self.head, self.target_logits = head, target_logits
        self.scale = head.scale[:, None]
        # if nothing lies between the GEMM and the temperature, scaling (N, D) saves a pass over every tile
        self.folded = head.bias is None and not head.softcap
        factor = self.scale if self.folded else 1
        self.hidden = head.hidden.to(head.dtype) * factor
        self.columns = blocks(len(head.weight), columns)
        width = self.columns[0].stop if self.columns else 0
        self.space = head.hidden.new_empty(len(head.hidden) * width if with_space else 0, dtype=head.dtype)

    def __iter__(self):
        """Yields (columns, logits); the next tile overwrites the logits (N, columns)."""
        for columns in self.columns:
            yield columns, self.fill(columns, self.tile(columns))

    def tile(self, columns: slice) -> Tensor:
        """A view (N, columns) of the reused space."""
        width = columns.stop - columns.start
        return self.space[: width * len(self.hidden)].view(width, -1).T

    def fill(self, columns: slice, z: Tensor) -> Tensor:
        """Writes the logits with exact ones at the targets: a log-prob near 0 is a small difference of logits."""
        self.logits(columns, z)
        place_targets(self.head.columns(columns), z, self.target_logits)
        return z

    def logits(self, columns: slice, z: Tensor) -> Tensor:
        head = self.head
        torch.mm(self.hidden, head.weight[columns].to(head.dtype).T, out=z)
        if self.folded:
            return z
        if head.bias is not None:
            z += head.bias[columns]
        if head.softcap:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        return z.mul_(self.scale)


def target_logits(head: Head) -> Tensor:
    """(N): the scaled logit of each target, zero if the target is not among these rows of weight."""
    parts = [_target_logits(head.rows(rows)) for rows in blocks(len(head.hidden), 256)]
    return torch.cat(parts) if parts else head.scale.new_empty(0)


def _target_logits(head: Head) -> Tensor:
    """In float64, because a rounding error here is one of the log-prob itself."""
    inside, local = head.targets_inside()
    z = torch.linalg.vecdot(head.hidden.double(), head.weight[local].double())
    if head.bias is not None:
        z += head.bias[local]
    if head.softcap:
        z.div_(head.softcap).tanh_().mul_(head.softcap)
    return torch.where(inside, z * head.scale, 0).to(head.dtype)


def online_sums(head: Head, target_logits: Tensor, plan: SweepSize, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(N) each: the largest logit m, sum of exp(z - m), and sum of exp(z - m) * (z - m) (zeros without entropy).

    Correct for logits of any size, because it tracks the running maximum.
    """
    top = torch.full(head.targets.shape, torch.finfo(head.dtype).min, dtype=head.dtype, device=head.hidden.device)
    total, moment = torch.zeros_like(top), torch.zeros_like(top)
    for _, z in _Tiles(head, plan.columns, target_logits):
        new_top = torch.maximum(top, z.amax(1))
        shift = (top - new_top).clamp_(min=LOG_OF_NOTHING)
        rescale = shift.exp()
        z.sub_(new_top[:, None])
        if entropy:
            z.clamp_(min=LOG_OF_NOTHING)
            moment = rescale * (moment + shift * total)
            exp = z.exp()
            moment += torch.linalg.vecdot(exp, z)
        else:
            exp = z.exp_()
        total = total * rescale + exp.sum(1)
        top = new_top
    return top, total, moment


def exponentials(
    head: Head, target_logits: Tensor, anchor: Tensor, out: Tensor, plan: SweepSize
) -> tuple[Tensor, Tensor]:
    """Writes ``exp(z - anchor)`` to ``out`` (N, V), zero at the targets; returns its sums, also times (z - anchor).

    The sums include the targets; they are partial sums, (parts, N) each.
    """
    tiles = _Tiles(head, plan.columns, target_logits, with_space=out.dtype != head.dtype)
    sums = anchor.new_zeros(2, len(anchor))
    for columns in tiles.columns:
        part = out[:, columns]
        z = tiles.fill(columns, part if out.dtype == head.dtype else tiles.tile(columns))
        if head.dtype == torch.float32:
            torch.ops.toolx.exp_sums(z, anchor, part, sums)
        else:
            exp_sums(z, anchor, part, sums)
    place_targets(head, out, torch.zeros_like(anchor))
    return sums[:1], sums[1:]


def exp_sums(z: Tensor, anchor: Tensor, out: Tensor, sums: Tensor) -> None:
    """``out = exp(z - anchor)``; adds its row sums to ``sums[0]``, and those of it times (z - anchor) to ``sums[1]``.

    z: (N, C), overwritten; anchor: (N); out: (N, C), may be z; sums: (2, N).
    """
    d = z.sub_(anchor[:, None]).clamp_(min=LOG_OF_NOTHING)
    exp = d.exp()
    sums[0] += exp.sum(1)
    sums[1] += torch.linalg.vecdot(exp, d)
    out.copy_(exp)


def place_targets(head: Head, out: Tensor, values: Tensor) -> None:
    """``out[n, target of n] = values[n]`` for every target among these rows of weight; out is (N, V)."""
    inside, local = head.targets_inside()
    row = torch.arange(len(out), device=out.device)
    out[row, local] = torch.where(inside, values.to(out.dtype), out[row, local])


def reweigh(head: Head, out: Tensor, anchor: Tensor, alpha: Tensor, beta: Tensor, plan: SweepSize) -> None:
    """``E <- E * (alpha + beta * log E) * slope of the softcap``, in place: for the entropy's gradient and a softcap.

    alpha, beta: (N).
    """
    width = max(1, out.shape[1] * out.dtype.itemsize // 128)  # the four fp32 tiles take an eighth of E's memory
    for columns in blocks(out.shape[1], width):
        e = out[:, columns].to(head.dtype)
        d = e.log().clamp_(min=LOG_OF_NOTHING)
        factor = torch.addcmul(alpha[:, None], beta[:, None], d)
        if head.softcap:
            z = d.add_(anchor[:, None]).div_(head.scale[:, None] * head.softcap)
            factor *= z.clamp_(-1, 1).square_().neg_().add_(1)
        out[:, columns] = e.mul_(factor)


def finish_rows(head: Head, part: Tensor, factor: Tensor, at_target: Tensor, out: Tensor, index: Tensor) -> None:
    """``out[index[n]] = factor[n] * part[n] + at_target[n] * weight[target of n]``, if the target is among its rows.

    part: (n, D), overwritten; factor, at_target, index: (n); out: (N, D).
    """
    inside, local = head.targets_inside()
    part.mul_(factor[:, None]).addcmul_(torch.where(inside, at_target, 0)[:, None], head.weight[local].to(part.dtype))
    out.index_copy_(0, index, part.to(out.dtype))


def move_rows(out: Tensor, source: Tensor, target: Tensor) -> None:
    """``out[target[i]] = out[source[i]]``; sources and targets are disjoint."""
    for columns in blocks(out.shape[1], 1024):
        out[target, columns] = out[source, columns]


def workspace(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, columns), column-major: so CPU GEMMs fill and read it fastest.

    (Two cores, N=296, D=576: 283 against 262 GFLOP/s.)
    """
    return like.new_empty(columns, rows, dtype=dtype).T


def logit_gradients(
    head: Head, lse: Tensor, alpha: Tensor, beta: Tensor, at_target: Tensor, out: Tensor, plan: SweepSize
) -> None:
    """Writes ``p (alpha + beta log p) slope / T``, and at the targets ``at_target``, to ``out`` (N, V).

    ``p = exp(z - lse)``; slope is the softcap's.
    """
    alpha, beta = alpha * head.scale, beta * head.scale
    flat = not beta.any()
    tiles = _Tiles(head, plan.columns, at_target, with_space=out.dtype != head.dtype)
    for columns in tiles.columns:
        part = out[:, columns]
        z = tiles.logits(columns, part if out.dtype == head.dtype else tiles.tile(columns))
        slope = z.div(head.scale[:, None] * head.softcap).square_().neg_().add_(1) if head.softcap else None
        log_p = z.sub_(lse[:, None])
        if flat:
            dz = log_p.exp_().mul_(alpha[:, None])
        else:
            factor = torch.addcmul(alpha[:, None], beta[:, None], log_p.clamp_(min=LOG_OF_NOTHING))
            dz = log_p.exp_().mul_(factor)
        if slope is not None:
            dz.mul_(slope)
        if out.dtype != head.dtype:
            part.copy_(dz)
    place_targets(head, out, at_target)


library.define(
    "exp_sums(Tensor(a!) z, Tensor anchor, Tensor(b!) out, Tensor(c!) sums) -> ()",
    default=exp_sums,
    fake=lambda z, anchor, out, sums: None,
)
