"""Two sweeps over the vocabulary: one for the statistics of each row, one for the gradients.

No tile outlives its sweep, so the second one recomputes all logits: 8 NDV in all, compared with 6 for a single sweep.
"""

from __future__ import annotations

import torch

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import sweep as sweeps
from toolx_kernels.ops.lm_head import sweep_torch, tiles
from toolx_kernels.ops.lm_head.gradients import Gradients
from toolx_kernels.ops.lm_head.head import Head, HeadGradients, Trained, blocks, pick
from toolx_kernels.ops.lm_head.live_rows import Batch
from toolx_kernels.ops.lm_head.objective import policy_objective
from toolx_kernels.ops.lm_head.per_row import PerRow
from toolx_kernels.ops.lm_head.vocab_shard import reducer, vocab_size_of
from toolx_kernels.reference import TokenStats


def two_sweeps(batch: Batch, config: GRPOLossConfig) -> tuple[PerRow, HeadGradients]:
    stats = statistics(batch.head, entropy=True, workspace_mib=config.workspace_mib)
    objective = policy_objective(stats.logprobs, stats.entropy, batch.vectors, batch.lengths, config)
    grads = HeadGradients()
    if any(batch.needs):
        c, e = objective.coefficients, objective.entropy_coefficients
        kept = (c != 0 if e is None else (c != 0) | (e != 0)).nonzero().squeeze(1)
        logprobs, lse = stats.logprobs[kept], stats.lse[kept]
        grads = recompute_gradients(
            batch.head.rows(kept),
            TokenStats(logprobs, lse, None if e is None else pick(stats.entropy, kept)),
            TokenStats(c[kept], torch.zeros_like(lse), None if e is None else e[kept]),
            batch.needs,
            config.workspace_mib,
        ).spread(batch.rows[kept], batch.n_rows)
    return PerRow(stats.logprobs, stats.entropy, stats.lse, objective), grads


def statistics(head: Head, *, entropy: bool, workspace_mib: int | None = None) -> TokenStats:
    """Statistics, (N) each, for logits of any size; entropy None unless requested. Costs 2 NDV."""
    n_rows, dim = head.hidden.shape
    vocab_size = vocab_size_of(head.weight, head.shard)
    size = tiles.forward_size(n_rows, vocab_size, dim, head.hidden.device, workspace_mib=workspace_mib)
    sweep, parts = sweeps.backend(head), []
    for rows in blocks(n_rows, size.rows):
        chunk = head.rows(rows)
        target_logits = sweep.target_logits(chunk)
        parts.append((target_logits, *sweep.online_sums(chunk, target_logits, size, entropy=entropy)))
    if not parts:
        empty = head.scale.new_empty(0)
        return TokenStats(empty, empty, empty if entropy else None)
    target, top, total, moment = (torch.cat(part) for part in zip(*parts, strict=True))
    if head.shard >= 0:
        all_reduce = reducer(head.shard)
        whole_top = all_reduce(top.clone(), "max")
        shift = (top - whole_top).clamp_(min=sweep_torch.LOG_OF_NOTHING)
        rescale = shift.exp()
        sums = torch.stack([target, rescale * total, rescale * (moment + shift * total)])
        target, total, moment = all_reduce(sums, "sum")
        top = whole_top
    log_total = total.log()
    return TokenStats(target - top - log_total, top + log_total, log_total - moment / total if entropy else None)


def recompute_gradients(
    head: Head, stats: TokenStats, upstream: TokenStats, needs: Trained, workspace_mib: int | None
) -> HeadGradients:
    """The gradients of a head with the statistics ``stats``, given their gradients ``upstream``. Costs up to 6 NDV.

    Both are (n) over the head's rows; the entropies are None if they have no gradient.
    """
    n_rows, dim = head.hidden.shape
    vocab_size = vocab_size_of(head.weight, head.shard)
    size = tiles.recompute_size(n_rows, vocab_size, dim, head.hidden.device, head.weight_dtype, workspace_mib)
    sweep = sweeps.backend(head)
    alpha = upstream.lse - upstream.logprobs
    beta = torch.zeros_like(alpha)
    if upstream.entropy is not None:
        alpha, beta = alpha - upstream.entropy * stats.entropy, -upstream.entropy
    logprobs, lse = stats.logprobs, stats.lse
    target_logit = reducer(head.shard)(sweep.target_logits(head), "sum")
    at_target = upstream.logprobs + logprobs.exp() * (alpha + beta * logprobs.clamp(min=sweep_torch.LOG_OF_NOTHING))
    # lse is rounded like any number near 30, which scales all probabilities of the sweep by one factor. If the target's
    # is near 1, the others must sum to the small remainder; the target's log-prob, which is small, gives that factor.
    unrounded = torch.where(logprobs > -1, (logprobs - (target_logit - lse)).exp(), 1)
    alpha, beta = alpha * unrounded, beta * unrounded
    if head.softcap:
        at_target *= 1 - (target_logit / (head.scale * head.softcap)).square()
    at_target *= head.scale

    grads = Gradients(head, needs, size.gemm_dtype, whole_weight=False)
    space = sweep.workspace(size.rows, size.columns, head.hidden, size.dtype)
    for columns in blocks(len(head.weight), size.columns):
        tile = head.columns(columns)
        tile = tile._replace(weight=tile.weight.to(torch.promote_types(tile.weight.dtype, size.gemm_dtype)))
        grads.open_weight(columns)
        for rows in blocks(n_rows, size.rows):
            part = tile.rows(rows)
            dz = space[: len(part.hidden), : len(part.weight)]
            sweep.logit_gradients(part, lse[rows], alpha[rows], beta[rows], at_target[rows], dz, size)
            if grads.hidden is not None:
                grads.multiply(grads.hidden[rows], dz, part.weight)
            grads.add_weight(dz, [slice(0, len(part.weight))], part.hidden, None)
        grads.close_weight(columns)
    return grads.results()
