"""The objective: short elementwise functions of per-token vectors, written once for torch and Triton (``dual``).

Gradients are analytic. A token's loss depends on its log-prob in two ways, whose slopes are kept separate until the
end: through the log-ratio, which at sequence level is shared by the whole completion, and directly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.dual import clamp, dual, in_torch, is_finite, k3_estimate
from toolx_kernels.reference import LARGEST_COEFFICIENT, LARGEST_LOSS, LOG_RATIO_BOUND, VESPO_LOG_BOUNDS

try:
    import triton
    import triton.language as tl

    BOUND, MOST_LOSS, MOST = map(tl.constexpr, (LOG_RATIO_BOUND, LARGEST_LOSS, LARGEST_COEFFICIENT))
except ImportError:  # a CPU build of torch comes without triton; then only the twins exist
    triton = None


@dual
def kl_term(logprobs, ref, CONFIG):
    """The estimate of KL(policy || reference) per token; its slope in the log-prob, 0 where the gap is clamped; and the
    slope of ratio * KL divided by the ratio: their sum, which for k3 is a small difference of large numbers."""
    gap = ref - logprobs
    beyond = tl.abs(gap) > BOUND
    gap = clamp(gap, -BOUND, BOUND)
    if CONFIG.kl_estimator == "k1":
        value = -gap
        slope = 1.0 + 0.0 * gap
    elif CONFIG.kl_estimator == "k2":
        value = 0.5 * gap * gap
        slope = -gap
    else:
        value, slope = k3_estimate(gap)
    if CONFIG.kl_gradient == "straight_through":
        slope = -gap
    both = value + slope
    if CONFIG.kl_estimator == "k3":
        both = -gap
    return value, tl.where(beyond, 0.0, slope), tl.where(beyond, value, both)


@dual
def importance_weight(gap, CONFIG):
    """The weight of a policy term; ``gap`` is old - sampler log-prob of the token, or their sum over its completion."""
    weight = tl.exp(clamp(gap, -BOUND, BOUND))
    limit = CONFIG.importance_sampling_cap
    if CONFIG.importance_sampling_mode == "token_truncate" or CONFIG.importance_sampling_mode == "sequence_truncate":
        return tl.where(weight > limit, limit, weight)
    else:
        return tl.where(weight > limit, 0.0, weight)


@dual
def policy_term(logprobs, log_ratio, advantage, CONFIG):
    """One token's policy loss: (loss, slope in log_ratio, slope in logprobs, ratio, its slope, clip_low, clip_high)."""
    ratio = tl.exp(clamp(log_ratio, -BOUND, BOUND))
    growth = tl.where(tl.abs(log_ratio) > BOUND, 0.0, ratio)
    nothing = 0.0 * ratio
    never = ratio < 0.0
    if CONFIG.loss_type == "cispo":
        capped = ratio > CONFIG.clip_high
        slope = -tl.where(capped, CONFIG.clip_high, ratio) * advantage
        return slope * logprobs, nothing, slope, ratio, growth, never, capped
    elif CONFIG.loss_type == "vespo":
        slope = nothing - advantage
        return slope * logprobs, nothing, slope, ratio, growth, never, never
    elif CONFIG.loss_type == "sapo":
        steepness = tl.where(advantage > 0.0, CONFIG.sapo_temperature_pos, nothing + CONFIG.sapo_temperature_neg)
        gate = tl.sigmoid(steepness * (ratio - 1.0))
        loss = -4.0 / steepness * gate * advantage
        rest = tl.sigmoid(steepness * (1.0 - ratio))  # 1 - gate, which would lose its digits where the gate is near 1
        return loss, -4.0 * gate * rest * advantage * growth, nothing, ratio, growth, never, never
    else:
        below, above = ratio < 1 - CONFIG.epsilon, ratio > 1 + CONFIG.clip_high
        clipped = clamp(ratio, 1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
        clipped_slope = tl.where(below | above, 0.0, growth)
        unclipped, unclipped_slope = ratio, growth
        if CONFIG.delta is not None:
            unclipped_slope = tl.where(ratio > CONFIG.delta, 0.0, growth)
            unclipped = tl.where(ratio > CONFIG.delta, CONFIG.delta, ratio)
        smaller = unclipped * advantage < clipped * advantage
        loss = -tl.where(smaller, unclipped, clipped) * advantage
        slope = -tl.where(smaller, unclipped_slope, clipped_slope) * advantage
        return loss, slope, nothing, ratio, growth, below & (advantage < 0.0), above & (advantage > 0.0)


@dual
def row_inputs(logprobs, advantage, idle, old, ref, sampler, CONFIG, HAS_OLD, HAS_REF, HAS_SAMPLER):
    """From a row's log-probs: (finite, logprobs, log_ratio, gap to the sampler, KL, its two slopes, advantage).

    All results are finite, even on rows whose inputs are not. On ``idle`` rows, whose advantage is zero, old and
    sampler log-probs are ignored, unless the KL is part of the advantage or is weighted by the ratio.
    """
    finite = is_finite(logprobs)
    nothing = tl.where(finite, 0.0 * logprobs, 0.0)
    log_ratio, gap, kl, kl_slope, kl_both = nothing, nothing, nothing, nothing, nothing
    if CONFIG.kl_in_advantage:
        idle = idle & (advantage != 0.0)
    if HAS_OLD:
        log_ratio = logprobs - old
        if not (CONFIG.kl_in_loss and CONFIG.use_bias_correction_kl):
            log_ratio = tl.where(idle, nothing, log_ratio)
        finite = finite & is_finite(log_ratio)
    if HAS_SAMPLER:
        if HAS_OLD:
            gap = old - sampler
        else:
            gap = logprobs - sampler
        gap = tl.where(idle, nothing, gap)
        finite = finite & is_finite(gap)
    if HAS_REF:
        finite = finite & is_finite(ref - logprobs)
        ref = tl.where(finite, ref, 0.0)
    logprobs = tl.where(finite, logprobs, 0.0)
    if HAS_REF:
        kl, kl_slope, kl_both = kl_term(logprobs, ref, CONFIG)
        if CONFIG.kl_in_advantage:
            advantage = advantage - CONFIG.beta * kl
    return (
        finite, logprobs, tl.where(finite, log_ratio, 0.0), tl.where(finite, gap, 0.0), kl, kl_slope, kl_both,
        advantage,
    )  # fmt: skip


@dual
def weighted_terms(
    finite, logprobs, log_ratio, importance, kl, kl_slope, kl_both, advantage, entropy, weight, kept_weight, CONFIG
):
    """(loss, slope in log_ratio, slope in logprobs, slope in entropy, ratio, clip_low, clip_high, kl) of each row.

    ``weight`` is the row's share of the loss, ``kept_weight`` the same, or 0 on rows without policy term and bonus.
    """
    weight = tl.where(finite, weight, 0.0)
    kept_weight = tl.where(finite, kept_weight, 0.0)
    loss, ratio_slope, slope, ratio, growth, clip_low, clip_high = policy_term(logprobs, log_ratio, advantage, CONFIG)
    share = kept_weight * importance
    loss, ratio_slope, slope = share * loss, share * ratio_slope, share * slope
    if CONFIG.kl_in_loss:
        penalty = weight * CONFIG.beta
        if CONFIG.use_bias_correction_kl:
            if CONFIG.kl_gradient == "own":
                if CONFIG.importance_sampling_level == "token":
                    kl_slope = tl.where(growth > 0.0, kl_both, kl_slope)
                else:
                    ratio_slope = ratio_slope + penalty * kl * growth
            penalty = penalty * ratio
        loss = loss + penalty * kl
        slope = slope + penalty * kl_slope
    entropy_slope = 0.0 * kept_weight
    if CONFIG.entropy_coef != 0:
        entropy_slope = -CONFIG.entropy_coef * kept_weight
        loss = loss + entropy_slope * tl.where(finite, entropy, 0.0)
    return loss, ratio_slope, slope, entropy_slope, ratio, clip_low, clip_high, kl


@dual
def fits(loss, coefficient, entropy_coefficient):
    """Whether a row may be applied; False for NaN. ``GRPOOutput`` has the rule."""
    return (tl.abs(loss) <= MOST_LOSS) & (tl.abs(coefficient) <= MOST) & (tl.abs(entropy_coefficient) <= MOST)


@dual
def applied(loss, coefficient, entropy_coefficient, ratio, clip_low, clip_high, kl, finite):
    """The results of rows, all zeros where ``finite`` is False."""
    return (
        tl.where(finite, loss, 0.0), tl.where(finite, coefficient, 0.0), tl.where(finite, entropy_coefficient, 0.0),
        tl.where(finite, ratio, 0.0), clip_low & finite, clip_high & finite, tl.where(finite, kl, 0.0), finite,
    )  # fmt: skip


@dual
def token_objective(logprobs, entropy, advantage, weight, old, ref, sampler, CONFIG, HAS_OLD, HAS_REF, HAS_SAMPLER):
    """The whole objective of a row, for configs in which tokens are independent of each other.

    ``weight`` is the row's share of the loss (``token_weights``). An input whose HAS_* flag is False may be anything;
    only the bonus uses ``entropy``.

    Returns (loss, coefficient, entropy_coefficient, ratio, clip_low, clip_high, kl, finite): ``loss`` includes the
    weight, ``coefficient`` is d total / d logprob and ``entropy_coefficient`` d total / d entropy. A row that is
    dropped (``GRPOOutput`` says which are) is all zeros.
    """
    finite, logprobs, log_ratio, gap, kl, kl_slope, kl_both, advantage = row_inputs(
        logprobs, advantage, advantage == 0.0, old, ref, sampler, CONFIG, HAS_OLD, HAS_REF, HAS_SAMPLER
    )
    importance = 1.0
    if HAS_SAMPLER:
        importance = importance_weight(gap, CONFIG)
    loss, ratio_slope, slope, entropy_slope, ratio, clip_low, clip_high, kl = weighted_terms(
        finite, logprobs, log_ratio, importance, kl, kl_slope, kl_both, advantage, entropy, weight, weight, CONFIG
    )
    coefficient = ratio_slope + slope
    finite = finite & fits(loss, coefficient, entropy_slope)
    return applied(loss, coefficient, entropy_slope, ratio, clip_low, clip_high, kl, finite)


class RowVectors(NamedTuple):
    """The objective's inputs for each of n rows besides its log-prob, in the dtype of the log-probs."""

    advantages: Tensor  # (n)
    weights: Tensor  # (n) share of the loss
    old: Tensor | None  # (n) log-probs; None: on-policy, the ratio is exactly 1
    ref: Tensor | None  # (n)
    sampler: Tensor | None  # (n)

    def rows(self, index: slice | Tensor) -> RowVectors:
        return RowVectors(*(None if vector is None else vector[index] for vector in self))


class Objective(NamedTuple):
    """Vectors over n rows, zero where ``finite`` is False. A kernel writes bools as 0.0 and 1.0."""

    losses: Tensor  # (n) multiplied by the row's weight, so that they sum to the loss
    coefficients: Tensor  # (n) d loss / d logprob
    entropy_coefficients: Tensor | None  # (n) d loss / d entropy, None without an entropy bonus
    ratio: Tensor  # (n)
    clip_low: Tensor  # (n) bool
    clip_high: Tensor  # (n) bool
    kl: Tensor | None  # (n) the estimate, None without reference log-probs
    finite: Tensor  # (n) bool


def policy_objective(
    logprobs: Tensor,  # (n)
    entropy: Tensor | None,  # (n), required for an entropy bonus or a top_entropy_quantile
    vectors: RowVectors,
    lengths: Tensor,  # (b) int64: rows of each completion, n in sum
    config: GRPOLossConfig,
) -> Objective:
    """The objective of n rows and its gradient, in the dtype of ``logprobs``; the definition is in ``reference``.

    A token-by-token objective takes any rows. Completions must be whole if ``config.needs_whole_sequences``, and all
    unmasked rows of the call must be present if ``needs_whole_batch(config)``.
    """
    advantages, weights, old, ref, sampler = vectors

    def spread_sum(values: Tensor) -> Tensor:
        # in order, so that every run gives the same bits; in float64, because a completion may have very many tokens;
        # "unsafe" only skips reading the lengths first
        sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True).to(values.dtype)
        return sums.repeat_interleave(lengths, output_size=len(values))

    idle = advantages == 0
    if config.needs_whole_sequences:  # a row without an advantage is still part of what its completion's rows share
        idle = spread_sum((~idle).to(logprobs.dtype)) == 0
    finite, own, log_ratio, gap, kl, kl_slope, kl_both, advantages = in_torch.row_inputs(
        logprobs, advantages, idle, old, ref, sampler, config, old is not None, ref is not None, sampler is not None
    )
    by_sequence = config.importance_sampling_level == "sequence"
    if by_sequence:
        tokens = spread_sum(finite.to(logprobs.dtype)).clamp(min=1)
        log_ratio = spread_sum(log_ratio) / tokens
    importance = torch.ones_like(own)
    if sampler is not None:
        gap = spread_sum(gap) if config.importance_sampling_mode.startswith("sequence") else gap
        importance = in_torch.importance_weight(gap, config)
    if config.loss_type == "vespo":
        low, high = VESPO_LOG_BOUNDS
        log_weight = spread_sum(log_ratio.clamp(-high, high) + importance.log().clamp(low, high)).clamp(low, high)
        importance = vespo_weight(log_weight, advantages, config)
    kept_weights = weights
    if needs_whole_batch(config):
        kept_weights = weights * entropy_mask(entropy, config.top_entropy_quantile)
    losses, ratio_slope, slope, entropy_slope, ratio, clip_low, clip_high, kl = in_torch.weighted_terms(
        finite, own, log_ratio, importance, kl, kl_slope, kl_both, advantages, entropy, weights, kept_weights, config
    )
    if by_sequence:
        ratio_slope = torch.where(finite, spread_sum(ratio_slope) / tokens, 0)
    coefficients = ratio_slope + slope
    fit = in_torch.fits(losses, coefficients, entropy_slope)
    if by_sequence:  # a row that does not fit leaves its completion with a wrong ratio
        fit = spread_sum((~fit).to(own.dtype)) == 0
    parts = in_torch.applied(
        losses, coefficients, entropy_slope, ratio, clip_low, clip_high, kl, finite & fit
    )  # fmt: skip
    losses, coefficients, entropy_slope, ratio, clip_low, clip_high, kl, finite = parts
    return Objective(
        losses,
        coefficients,
        entropy_slope if config.entropy_coef else None,
        ratio,
        clip_low,
        clip_high,
        kl if ref is not None else None,
        finite,
    )


def vespo_weight(log_weight: Tensor, advantages: Tensor, config: GRPOLossConfig) -> Tensor:
    """``exp(lambda) w^k exp(-lambda w)``, k and lambda for the advantage's sign (arXiv 2602.10693)."""
    rising = (config.vespo_k_pos, config.vespo_lambda_pos)
    falling = (config.vespo_k_neg, config.vespo_lambda_neg)
    k, rate = (
        torch.where(advantages >= 0, torch.full_like(advantages, p), n) for p, n in zip(rising, falling, strict=True)
    )
    return (rate + k * log_weight - rate * log_weight.exp()).clamp(max=LOG_RATIO_BOUND).exp()


def needs_whole_batch(config: GRPOLossConfig) -> bool:
    """Whether the objective of a row depends on all unmasked rows of the call."""
    return config.top_entropy_quantile < 1


def entropy_mask(entropy: Tensor, quantile: float) -> Tensor:
    """(n) bool: whether a row is among the top ``quantile`` by entropy; rows without an entropy (NaN) are not."""
    if not len(entropy):
        return torch.zeros_like(entropy, dtype=torch.bool)
    return entropy >= entropy.nanquantile(1 - quantile)


def loss_denominator(
    loss_type: str, lengths: Tensor | Sequence[int], max_completion_length: int | None
) -> float | Tensor:
    """The divisor of the sum of a batch's weighted losses; ``lengths`` count each completion's unmasked tokens."""
    if loss_type in ("grpo", "sapo", "luspo"):
        return len(lengths)
    if loss_type == "dr_grpo":
        assert max_completion_length is not None  # GRPOLossConfig requires it
        return len(lengths) * max_completion_length
    return lengths.sum().clamp(min=1) if isinstance(lengths, Tensor) else max(1, sum(lengths))


def token_weights(lengths: Tensor, config: GRPOLossConfig, denominator: float | Tensor | None) -> Tensor:
    """(B): the weight of one token of each completion in the loss; float ``lengths`` (B) count its unmasked tokens."""
    if denominator is None:
        denominator = loss_denominator(config.loss_type, lengths, config.max_completion_length)
    per_completion = lengths.clamp(min=1) if config.loss_type in ("grpo", "sapo") else torch.ones_like(lengths)
    return per_completion.reciprocal() / denominator
