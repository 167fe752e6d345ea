"""Two sweeps over the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import sweep as sweeps
from toolx_kernels.ops.lm_head import sweep_torch, tiles
from toolx_kernels.ops.lm_head.gradients import Gradients
from toolx_kernels.ops.lm_head.head import Head, blocks
from toolx_kernels.ops.lm_head.objective import policy_objective
from toolx_kernels.ops.lm_head.per_row import Batch, PerRow
from toolx_kernels.ops.lm_head.vocab_shard import reducer, vocab_size_of


def recompute_gradients(
    head: Head, logprobs: Tensor, lse: Tensor, entropy: Tensor,
    grad_logprobs: Tensor, grad_lse: Tensor, grad_entropy: Tensor, needs: list[bool], shard: int,
    workspace_mib: int | None, spread: tuple[Tensor, int] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of (hidden, weight, bias), an empty tensor for each that is not needed; up to 6 NDV.

    Args:
        logprobs, lse, entropy: (n) of the head's rows; entropy is empty where its gradient is zero.
        grad_logprobs, grad_lse, grad_entropy: (n), the upstream gradients.
        spread: (rows, N), where the n rows lie among the N of the results; None if they are all.
    """
    n_rows, dim = head.hidden.shape
    plan = tiles.recompute_plan(
        n_rows, vocab_size_of(head.weight, shard), dim, head.hidden.device,
        head.weight_dtype, workspace_mib,
    )  # fmt: skip
    sweep = sweeps.backend(head)
    with_entropy = entropy.numel() > 0
    alpha = grad_lse - grad_logprobs - (grad_entropy * entropy if with_entropy else 0)
    beta = -grad_entropy if with_entropy else torch.zeros_like(alpha)
    target_logit = reducer(shard)(sweep.target_logits(head), "sum")
    at_target = grad_logprobs + logprobs.exp() * (alpha + beta * logprobs.clamp(min=sweep_torch.LOG_OF_NOTHING))
    # lse is rounded as a number of 30 or so is, and all probabilities that the sweep makes of it are off by one factor.
    # Where the target's is near 1 the others' must fit what it leaves: its log-prob, which is small, knows that factor.
    unrounded = torch.where(logprobs > -1, (logprobs - (target_logit - lse)).exp(), 1)
    alpha, beta = alpha * unrounded, beta * unrounded
    if head.softcap:
        at_target *= 1 - (target_logit / (head.scale * head.softcap)).square()
    at_target *= head.scale

    grads = Gradients(head, needs, plan.gemm_dtype, whole_weight=False)
    space = sweep.workspace(plan.rows, plan.columns, head.hidden, plan.dtype)
    for columns in blocks(len(head.weight), plan.columns):
        tile = head.columns(columns)
        tile = tile._replace(weight=tile.weight.to(torch.promote_types(tile.weight.dtype, plan.gemm_dtype)))
        grads.open_weight(columns)
        for rows in blocks(n_rows, plan.rows):
            part = tile.rows(rows)
            dz = space[: len(part.hidden), : len(part.weight)]
            sweep.logit_gradients(part, lse[rows], alpha[rows], beta[rows], at_target[rows], dz, plan)
            if grads.hidden is not None:
                grads.multiply(grads.hidden[rows], dz, part.weight)
            grads.add_weight(dz, [slice(0, len(part.weight))], part.hidden, None)
        grads.close_weight(columns)
    return grads.results(spread, shard)


def statistics(
    head: Head, *, entropy: bool, shard: int, workspace_mib: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(N) each: log-prob, log-sum-exp and entropy (empty unless asked for); logits of any size, 2 NDV."""
    n_rows, dim = head.hidden.shape
    plan = tiles.forward_plan(
        n_rows, vocab_size_of(head.weight, shard), dim, head.hidden.device, workspace_mib=workspace_mib
    )
    parts = []
    for rows in blocks(n_rows, plan.rows):
        chunk = head.rows(rows)
        sweep = sweeps.backend(chunk)
        target_logits = sweep.target_logits(chunk)
        parts.append((target_logits, *sweep.online_sums(chunk, target_logits, plan, entropy=entropy)))
    if not parts:
        empty = head.scale.new_empty(0)
        return empty, empty, empty
    target, top, total, moment = (torch.cat(part) for part in zip(*parts, strict=True))
    if shard >= 0:
        all_reduce = reducer(shard)
        whole_top = all_reduce(top.clone(), "max")
        shift = (top - whole_top).clamp_(min=sweep_torch.LOG_OF_NOTHING)
        rescale = shift.exp()
        target, total, moment = all_reduce(
            torch.stack([target, rescale * total, rescale * (moment + shift * total)]), "sum"
        )
        top = whole_top
    log_total = total.log()
    lse = top + log_total
    return target - top - log_total, lse, log_total - moment / total if entropy else lse.new_empty(0)


def _two_sweeps(batch: Batch, config: GRPOLossConfig, needs: list[bool], n_rows: int, shard: int):
    """(per row, objective, gradients): log-probs first, then the gradients by computing the logits again."""
    head, vectors = batch.head, batch.vectors
    logprobs, lse, entropy = statistics(head, entropy=True, shard=shard, workspace_mib=config.workspace_mib)
    objective = policy_objective(
        logprobs, entropy, vectors.advantages, vectors.weights, old_logprobs=vectors.old,
        ref_logprobs=vectors.ref, sampler_logprobs=vectors.sampler, lengths=batch.lengths, config=config,
    )  # fmt: skip
    grads = tuple(head.hidden.new_empty(0) for _ in needs)
    if any(needs):
        e = objective.entropy_coefficients
        live = objective.coefficients != 0
        kept = (live if e is None else live | (e != 0)).nonzero().squeeze(1)
        grads = recompute_gradients(
            head.rows(kept), logprobs[kept], lse[kept],
            entropy.new_empty(0) if e is None else entropy[kept], objective.coefficients[kept],
            torch.zeros_like(lse[kept]), lse.new_zeros(len(kept)) if e is None else e[kept], needs, shard,
            config.workspace_mib, (batch.rows[kept], n_rows),
        )  # fmt: skip
    return PerRow(logprobs, entropy, lse), objective, grads
