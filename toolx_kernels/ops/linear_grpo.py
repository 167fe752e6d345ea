"""The clipped GRPO loss straight from hidden states and the LM-head weight.

    hidden (N, D), weight (V, D), targets (N) -> logprobs (N) -> advantages (B) -> token losses (N) -> loss

Between the vocabulary sweep (``linear_logprob``) and the objective (``losses``) stand only per-row vectors. Rows
that cannot have a gradient are known before the sweep, and never enter it: masked tokens, and completions whose
group has equal rewards while there is no KL term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.ops.linear_logprob import check_head, linear_logprob
from toolx_kernels.ops.losses import clipped_policy_loss, k3, token_weights
from toolx_kernels.reference import GRPOLossConfig, GRPOOutput


def linear_grpo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    cu_seqlens: Tensor,  # (B + 1) int32
    rewards: Tensor | None = None,  # (B)
    advantages: Tensor | None = None,  # (B)
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B)
    old_logprobs: Tensor | None = None,  # (N)
    ref_logprobs: Tensor | None = None,  # (N)
    sampler_logprobs: Tensor | None = None,  # (N)
    mask: Tensor | None = None,  # (N) bool
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    temperature: Tensor | None = None,  # (N)
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 (frozen)
) -> GRPOOutput:
    """GRPO loss of B packed completions; ``.loss.backward()`` gives gradients of hidden, weight and bias.

    Args:
        hidden: (N, D); ``hidden[n]`` predicts ``targets[n]``. Only completion tokens are packed.
        cu_seqlens: (B + 1) int32; completion b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        rewards: (B), turned into advantages within groups of ``group_size`` or of equal ``group_ids``; or pass
            ``advantages`` (B) yourself.
        old_logprobs: (N) log-probs under the policy that the ratio starts from; None when the batch is on-policy.
        ref_logprobs: (N) log-probs under the reference policy; needed when ``config.beta`` is not 0.
        sampler_logprobs: (N) what the sampler reported, for truncated importance weights.
        mask: (N) bool; False rows (tool output, say) contribute nothing. A completion without any True row
            contributes 0 and still counts in B.
        denominator: replaces the normaliser (B for ``grpo``, tokens for ``bnpo`` and ``dapo``,
            ``B * max_completion_length`` for ``dr_grpo``), so that micro-batches add up to one batch.
        temperature: (N) one per row, instead of ``config.temperature``.

    Returns:
        GRPOOutput; ``logprobs`` and ``entropy`` are NaN on rows that were left out (masked, or without gradient
        unless ``config.compute_all_logprobs``).

    Raises:
        InputError: vectors of the wrong length, bounds that do not cover N rows, neither rewards nor advantages,
            ``beta`` without ``ref_logprobs``.
    """
    check_head(hidden, weight, targets, bias)
    n_completions = _check_vectors(cu_seqlens, rewards, advantages, len(targets), config, locals())
    if advantages is None:
        advantages = group_advantages(rewards, group_size=group_size, group_ids=group_ids, scale=config.scale_rewards)
    lengths = cu_seqlens.diff().long()
    completion = torch.repeat_interleave(lengths, output_size=len(targets))  # (N) index of each token's completion
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    active = torch.bincount(completion[mask], minlength=n_completions)  # (B) unmasked tokens
    computed = mask
    if not (config.beta or config.compute_all_logprobs):
        computed = mask & (advantages != 0)[completion]
    rows = computed.nonzero().squeeze(1)

    def pick(per_row: Tensor | None) -> Tensor | None:
        return per_row if per_row is None or len(rows) == len(targets) else per_row[rows]

    stats = linear_logprob(
        pick(hidden), weight, pick(targets), bias=bias, softcap=softcap, entropy=True,
        temperature=config.temperature if temperature is None else pick(temperature),
    )  # fmt: skip
    owner = pick(completion)
    tokens = clipped_policy_loss(
        stats.logprobs, advantages.to(stats.logprobs.dtype)[owner],
        torch.bincount(owner, minlength=n_completions), config,
        old_logprobs=pick(old_logprobs), ref_logprobs=pick(ref_logprobs), sampler_logprobs=pick(sampler_logprobs),
    )  # fmt: skip
    weights = token_weights(active.to(stats.logprobs.dtype), config, denominator)
    loss = (tokens.losses * weights[owner]).sum()

    logged = {
        "entropy": stats.entropy,
        "ratio": tokens.ratio,
        "clip_low": tokens.clip_low,
        "clip_high": tokens.clip_high,
    }
    if ref_logprobs is not None:
        logged["kl"] = k3(stats.logprobs.detach(), pick(ref_logprobs))
    return GRPOOutput(
        loss,
        logprobs=_spread(stats.logprobs, rows, len(targets)),
        entropy=_spread(stats.entropy, rows, len(targets)),
        stats={"live_tokens": computed.sum()} | {k: v.detach().to(weights.dtype).mean() for k, v in logged.items()},
    )


def _spread(values: Tensor, rows: Tensor, n_rows: int) -> Tensor:
    return values.new_full((n_rows,), torch.nan).index_copy_(0, rows, values.detach())


def _check_vectors(cu_seqlens, rewards, advantages, n_rows, config, given) -> int:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise InputError(f"cu_seqlens {tuple(cu_seqlens.shape)} must hold the B + 1 bounds of at least one completion.")
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != n_rows or (cu_seqlens.diff() < 0).any():
        raise InputError(f"cu_seqlens must rise from 0 to N = {n_rows}, but is {cu_seqlens.tolist()[:8]}...")
    n_completions = len(cu_seqlens) - 1
    if (rewards is None) == (advantages is None):
        raise InputError("Give either rewards or advantages, one number per completion.")
    for name, size in {
        "rewards": n_completions, "advantages": n_completions, "old_logprobs": n_rows, "ref_logprobs": n_rows,
        "sampler_logprobs": n_rows, "mask": n_rows, "temperature": n_rows,
    }.items():  # fmt: skip
        if (vector := given[name]) is not None and vector.shape != (size,):
            raise InputError(
                f"{name} has shape {tuple(vector.shape)}: it must be ({size},) to fit cu_seqlens and hidden."
            )
    if (mask := given["mask"]) is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}: pass mask.bool(), True where a token counts.")
    if advantages is not None and not advantages.isfinite().all():
        at = int((~advantages.isfinite()).nonzero()[0])
        raise InputError(f"advantages[{at}] = {float(advantages[at])} is not finite.")
    if config.beta and given["ref_logprobs"] is None:
        raise InputError(f"beta={config.beta} needs ref_logprobs: pass the reference policy's log-probs or set beta=0.")
    return n_completions
