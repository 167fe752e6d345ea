"""Objectives: short elementwise functions of per-token vectors. They never touch a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.reference import LOG_RATIO_BOUND, GRPOLossConfig


class TokenLosses(NamedTuple):
    losses: Tensor  # (N) differentiable in logprobs
    ratio: Tensor  # (N)
    clip_low: Tensor  # (N) bool: the lower bound removed the gradient
    clip_high: Tensor  # (N) bool


def clipped_policy_loss(
    logprobs: Tensor,  # (N) with gradient
    advantages: Tensor,  # (N) each token carries its completion's
    lengths: Tensor,  # (B) tokens of each completion among the N
    config: GRPOLossConfig,
    *,
    old_logprobs: Tensor | None,  # (N) None: on-policy, the ratio is exactly 1
    ref_logprobs: Tensor | None,  # (N)
    sampler_logprobs: Tensor | None,  # (N)
) -> TokenLosses:
    """``-min(r A, clip(r) A) * w + beta * k3`` per token (arXiv 2402.03300, eq. 3 and 4).

    r is ``exp(logp - old)``, per token or per sequence; w the truncated importance weight against the sampler;
    k3 ``exp(ref - logp) - (ref - logp) - 1``.
    """
    own = logprobs.detach()
    old = own if old_logprobs is None else old_logprobs.detach().to(own.dtype)
    # where the advantage is zero only the KL term is left, and the old log-probs may be NaN (rows that were left out)
    dead = advantages == 0
    old = torch.where(dead, own, old)
    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        # segment_reduce adds each completion in order, so two runs give the same bits on a GPU too
        mean = torch.segment_reduce(log_ratio, "sum", lengths=lengths) / lengths.clamp(min=1)
        log_ratio = mean.repeat_interleave(lengths)
    ratio = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).exp()
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    clipped = ratio.clamp(1 - config.epsilon, 1 + config.clip_high)
    losses = -torch.minimum(unclipped * advantages, clipped * advantages)
    if sampler_logprobs is not None:
        gap = torch.where(dead, 0, old - sampler_logprobs.detach().to(own.dtype))
        losses = losses * gap.exp().clamp(max=config.importance_sampling_cap)
    if config.beta:
        losses = losses + config.beta * k3(logprobs, ref_logprobs.detach().to(own.dtype))
    ratio = ratio.detach()
    return TokenLosses(
        losses,
        ratio,
        clip_low=(ratio < 1 - config.epsilon) & (advantages < 0),
        clip_high=(ratio > 1 + config.clip_high) & (advantages > 0),
    )


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The non-negative, unbiased estimate of KL(policy || reference) per token (Schulman, 2020)."""
    gap = ref_logprobs - logprobs
    return gap.exp() - gap - 1


def token_weights(lengths: Tensor, config: GRPOLossConfig, denominator: float | Tensor | None) -> Tensor:
    """(B): what one token of each completion weighs in the loss; floating ``lengths`` (B) count its unmasked tokens."""
    if config.loss_type == "grpo":
        return lengths.clamp(min=1).reciprocal() / (len(lengths) if denominator is None else denominator)
    if denominator is None:
        if config.loss_type == "dr_grpo":
            denominator = len(lengths) * config.max_completion_length
        else:
            denominator = lengths.sum().clamp(min=1)
    return torch.ones_like(lengths) / denominator
