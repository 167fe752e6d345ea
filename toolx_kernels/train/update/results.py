"""Results of micro-batches: loss, statistics, and log-probs kept for later updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.groups import ScoredGroup


@dataclass(frozen=True, slots=True)
class MicroBatchResult:
    """Loss and statistics of one micro-batch, or of several combined."""

    loss: float
    logprobs: Tensor  # (N) of the targets, on the CPU; NaN where not computed
    ref_logprobs: Tensor | None = None
    live: float = 0.0  # tokens in the loss
    nonfinite: float = 0.0  # live tokens without a finite log-prob
    means: dict[str, float] = field(default_factory=dict)  # over the live tokens

    @classmethod
    def together(cls, results: Sequence[MicroBatchResult]) -> MicroBatchResult:
        live = sum(result.live for result in results)
        references = [result.ref_logprobs for result in results if result.ref_logprobs is not None]
        return cls(
            sum(result.loss for result in results),
            torch.cat([result.logprobs for result in results]),
            torch.cat(references) if references else None,
            live,
            sum(result.nonfinite for result in results),
            {
                name: sum(result.live * result.means[name] for result in results if result.live) / live
                for name in results[0].means
                if live
            },
        )


def keep_logprobs(rollouts: Sequence[Rollout], result: MicroBatchResult, *, old: bool) -> None:
    """Stores the log-probs of a batch's first update in its rollouts: the reference model's and, if ``old``, the
    policy's, which the ratios of later updates start from."""
    lengths = [len(rollout.ids) for rollout in rollouts]
    for rollout, logprobs in zip(rollouts, result.logprobs.split(lengths), strict=True):
        rollout.old_logprobs = logprobs if old else rollout.old_logprobs
    if result.ref_logprobs is not None:
        for rollout, logprobs in zip(rollouts, result.ref_logprobs.split(lengths), strict=True):
            rollout.ref_logprobs = logprobs


def sampler_differences(groups: Sequence[ScoredGroup], logprobs: Tensor) -> dict[str, float]:
    """Differences between the trainer's and the sampler's log-probs: largest and mean for rollouts learned on the
    prompt that they were sampled on (rounding errors); largest for those learned on another prompt (``distill``)."""
    differences: dict[bool, list[float]] = {True: [], False: []}
    rollouts = [(r, here) for group in groups for r, here in zip(group.rollouts, group.on_policy_prompt, strict=True)]
    of_rollout = logprobs.split([len(rollout.ids) for rollout, _ in rollouts])
    for (rollout, on_policy), own_logprobs in zip(rollouts, of_rollout, strict=True):
        pairs = zip(own_logprobs.tolist(), rollout.logprobs, strict=True)
        # NaN: the loss did not compute this token
        differences[on_policy] += [abs(own - sampler) for own, sampler in pairs if not math.isnan(own)]
    metrics = {}
    if rounding := differences[True]:
        metrics = {"logp_difference": max(rounding), "logp_difference_mean": sum(rounding) / len(rounding)}
    return metrics | ({"distilled_gap": max(differences[False])} if differences[False] else {})
