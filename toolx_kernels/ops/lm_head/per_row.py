"""The per-row step between forward and gradient GEMMs: partial sums -> log-prob, entropy, loss, coefficients.

With d = z - anchor and s = sum of exp(d): lse = anchor + log s, entropy = log s - (sum of exp(d) d) / s. The objective
turns them into the row's loss and into its two coefficients, d loss / d logprob and d loss / d entropy.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.dual import dual, in_torch
from toolx_kernels.ops.lm_head.head import Head
from toolx_kernels.ops.lm_head.objective import Objective, RowVectors, policy_objective, token_objective
from toolx_kernels.reference import LARGEST_COEFFICIENT

LARGEST_LOG_SUM = 55.0  # beyond it an anchor is so far off that exponentials may have over- or underflowed

try:
    import triton
    import triton.language as tl

    from toolx_kernels.ops.triton_common import per_row_kernel

    MOST_LOG_SUM, MOST = tl.constexpr(LARGEST_LOG_SUM), tl.constexpr(LARGEST_COEFFICIENT)
except ImportError:  # a CPU build of torch comes without triton
    triton = None


class RowStatistics(NamedTuple):
    logprobs: Tensor  # (n)
    entropy: Tensor  # (n)
    anchored: Tensor  # (n) bool: whether the row's exponentials can be used, see ``is_anchored``


class Factors(NamedTuple):
    """The factors that turn a row's exponentials E into the gradient of its logits. All (n).

    factor: of the row. at_target: the gradient at the target, which E lacks. placed: the value of E at the target for
    which ``factor * E`` is ``at_target``. alpha, beta: arguments of ``reweigh``, which comes first if there is an
    entropy bonus or a softcap; then they include the whole factor, and the remaining factor is 1, so that no hidden
    state is rounded.
    """

    factor: Tensor
    at_target: Tensor
    placed: Tensor
    alpha: Tensor
    beta: Tensor


@dual
def factors_of(logprobs, entropy, log_total, c, e, target_logit, scale, softcap, HAS_ENTROPY, HAS_SOFTCAP):
    """The ``Factors`` of a row whose loss has the derivatives c and e in log-prob and entropy.

    With p = exp(logprob): d loss / d z = c (1[target] - p) - e p (log p + entropy), per token of the vocabulary.
    """
    p = tl.exp(logprobs)
    at_target = c * (1.0 - p)
    alpha, beta = -c, 0.0 * c
    if HAS_ENTROPY:
        at_target = at_target - e * p * (tl.where(p > 0.0, logprobs, 0.0) + entropy)
        alpha, beta = alpha - e * (entropy - log_total), -e
    dead = (c == 0.0) & (beta == 0.0)  # also if the log-prob is not a number
    factor = scale * tl.exp(-log_total)
    if HAS_SOFTCAP:
        ratio = target_logit / (scale * softcap)
        at_target = at_target * (1.0 - ratio * ratio)
    if HAS_ENTROPY or HAS_SOFTCAP:
        alpha, beta = alpha * factor, beta * factor
        factor = 1.0 + 0.0 * c
    else:
        factor = -c * factor
    at_target = at_target * scale
    at_target = tl.where(dead, 0.0, at_target)
    factor = tl.where(dead, 0.0, factor)
    return factor, at_target, tl.where(factor == 0.0, 0.0, at_target / factor), alpha, beta


@dual
def is_anchored(log_total, factor, alpha, beta, MOST_LOG_SUM, MOST):
    """Whether the anchor is close enough to the row's log-sum-exp; False for NaN.

    One that is far above makes the exponentials small and the factors large: c and 1 / total may fit where their
    product does not.
    """
    fits = (tl.abs(factor) <= MOST) & (tl.abs(alpha) <= MOST) & (tl.abs(beta) <= MOST)
    return fits & (tl.abs(log_total) < MOST_LOG_SUM)


def statistics_and_objective(
    partials: tuple[Tensor, Tensor],  # (tiles, n) each: partial sums of exp(d) and of exp(d) d
    anchor: Tensor,  # (n)
    target_logits: Tensor,  # (n)
    head: Head,  # n rows
    vectors: RowVectors,
    config: GRPOLossConfig,
    lengths: Tensor,  # (b) int64 rows of each completion
    *,
    fused: bool,
) -> tuple[RowStatistics, Objective, Factors]:
    """The statistics, the objective and the factors; in one kernel if ``fused``: for token-by-token objectives only."""
    if fused:
        return fused_statistics(partials, anchor, target_logits, head, vectors, config)
    total, moment = partials[0].sum(0), partials[1].sum(0)
    log_total = total.log()
    logprobs, entropy = target_logits - anchor - log_total, log_total - moment / total
    objective = policy_objective(logprobs, entropy, vectors, lengths, config)
    c, e = objective.coefficients, objective.entropy_coefficients
    factors = Factors(*in_torch.factors_of(
        logprobs, entropy, log_total, c, c if e is None else e, target_logits, head.scale, head.softcap,
        e is not None, bool(head.softcap),
    ))  # fmt: skip
    limits = LARGEST_LOG_SUM, LARGEST_COEFFICIENT
    anchored = in_torch.is_anchored(log_total, factors.factor, factors.alpha, factors.beta, *limits)
    return RowStatistics(logprobs, entropy, anchored), objective, factors


if triton is not None:

    @per_row_kernel
    def statistics_kernel(
        total_ptr, moment_ptr,  # (n_tiles, N)
        anchor_ptr, target_ptr, scale_ptr, advantage_ptr, share_ptr, old_ptr, ref_ptr, sampler_ptr,  # (N)
        out_ptr,  # (16, N)
        N, n_tiles, softcap,
        CONFIG: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_SAMPLER: tl.constexpr,
        HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    ):  # fmt: skip
        """Adds the tiles' sums in order and applies the objective; one program per BLOCK_N rows."""
        offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
        mask_n = offs_n < N
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for t in range(0, n_tiles, BLOCK_T):
            mask = (offs_t < n_tiles - t)[:, None] & mask_n[None, :]
            place = (t + offs_t)[:, None] * N + offs_n[None, :]
            total += tl.sum(tl.load(total_ptr + place, mask=mask, other=0.0), 0)
            moment += tl.sum(tl.load(moment_ptr + place, mask=mask, other=0.0), 0)
        row = tl.where(mask_n, offs_n, 0)
        total = tl.where(mask_n, total, 1.0)
        log_total = tl.log(total)
        target_logit = tl.load(target_ptr + row)
        logprobs = target_logit - tl.load(anchor_ptr + row) - log_total
        entropy = log_total - moment / total
        loss, coefficient, entropy_coefficient, ratio, clip_low, clip_high, kl, finite = token_objective(
            logprobs, entropy, tl.load(advantage_ptr + row), tl.load(share_ptr + row),
            tl.load(old_ptr + row), tl.load(ref_ptr + row), tl.load(sampler_ptr + row),
            CONFIG, HAS_OLD, HAS_REF, HAS_SAMPLER,
        )  # fmt: skip
        factor, at_target, placed, alpha, beta = factors_of(
            logprobs, entropy, log_total, coefficient, entropy_coefficient, target_logit, tl.load(scale_ptr + row),
            softcap, HAS_ENTROPY, HAS_SOFTCAP,
        )  # fmt: skip
        anchored = is_anchored(log_total, factor, alpha, beta, MOST_LOG_SUM, MOST)
        outs = out_ptr + offs_n
        plane = N.to(tl.int64)
        tl.store(outs, logprobs, mask=mask_n)
        tl.store(outs + plane, entropy, mask=mask_n)
        tl.store(outs + 2 * plane, anchored.to(tl.float32), mask=mask_n)
        tl.store(outs + 3 * plane, loss, mask=mask_n)
        tl.store(outs + 4 * plane, coefficient, mask=mask_n)
        tl.store(outs + 5 * plane, entropy_coefficient, mask=mask_n)
        tl.store(outs + 6 * plane, ratio, mask=mask_n)
        tl.store(outs + 7 * plane, clip_low.to(tl.float32), mask=mask_n)
        tl.store(outs + 8 * plane, clip_high.to(tl.float32), mask=mask_n)
        tl.store(outs + 9 * plane, kl, mask=mask_n)
        tl.store(outs + 10 * plane, finite.to(tl.float32), mask=mask_n)
        tl.store(outs + 11 * plane, factor, mask=mask_n)
        tl.store(outs + 12 * plane, at_target, mask=mask_n)
        tl.store(outs + 13 * plane, placed, mask=mask_n)
        tl.store(outs + 14 * plane, alpha, mask=mask_n)
        tl.store(outs + 15 * plane, beta, mask=mask_n)


def fused_statistics(
    partials: tuple[Tensor, Tensor],
    anchor: Tensor,
    target_logits: Tensor,
    head: Head,
    vectors: RowVectors,
    config: GRPOLossConfig,
) -> tuple[RowStatistics, Objective, Factors]:
    """``statistics_and_objective`` in one kernel."""
    n_tiles, n_rows = partials[0].shape
    out = anchor.new_empty(16, n_rows)
    old, ref, sampler = (anchor if x is None else x for x in (vectors.old, vectors.ref, vectors.sampler))
    statistics_kernel[(triton.cdiv(n_rows, 16),)](
        *partials, anchor, target_logits, head.scale, vectors.advantages, vectors.weights, old, ref, sampler, out,
        n_rows, n_tiles, float(head.softcap),
        CONFIG=config, HAS_OLD=vectors.old is not None, HAS_REF=vectors.ref is not None,
        HAS_SAMPLER=vectors.sampler is not None, HAS_ENTROPY=bool(config.entropy_coef),
        HAS_SOFTCAP=bool(head.softcap), BLOCK_N=16, BLOCK_T=64,
    )  # fmt: skip
    logprobs, entropy, anchored, loss, coefficients, entropy_coefficients, ratio, low, high, kl, finite, *factors = out
    objective = Objective(
        loss, coefficients, entropy_coefficients if config.entropy_coef else None, ratio, low, high,
        None if vectors.ref is None else kl, finite,
    )  # fmt: skip
    return RowStatistics(logprobs, entropy, anchored != 0), objective, Factors(*factors)


class PerRow(NamedTuple):
    """Results of a call for its n rows."""

    logprobs: Tensor  # (n)
    entropy: Tensor  # (n)
    lse: Tensor | None  # (n) after two sweeps only, whose gradients may be formed later
    objective: Objective
