"""The two kinds of update, supervised and clipped policy gradient, over micro-batches of packed groups."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.ops.hf_attention import head_of, toolx_attention
from toolx_kernels.ops.linear_logprob import linear_logprob
from toolx_kernels.train.batch import PackedBatch, PackedGroup, micro_batches, pack
from toolx_kernels.train.checkpoint import load_weights
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.policies import PolicyLoss
from toolx_kernels.train.rollouts import ScoredGroup


class DivergedError(InputError):
    """A log-prob, the loss or the gradient is no longer a number; the weights have not been touched by it."""


class Learner:
    """Owns the optimizer and changes the model's weights; nobody else does.

    The model stays in evaluation mode: the policy that is trained is exactly the one that sampled, without dropout.
    """

    def __init__(self, model: PreTrainedModel, args: ToolExpanderConfig, loss: PolicyLoss):
        self.model, self.args, self.loss = model, args, loss
        self.optimizer = self.adamw(args.learning_rate)
        self.reference: PreTrainedModel | None = None  # the model before RL

    def adamw(self, learning_rate: float) -> torch.optim.AdamW:
        args = self.args
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            fused=True,
        )

    def freeze_reference(self, checkpoint: Path) -> None:
        """Keeps the model of ``checkpoint``, for the KL term or for verifying demonstrations."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        load_weights(checkpoint, self.reference)

    def imitate(self, groups: Sequence[PackedGroup], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One supervised step: mean negative log-prob of the completion tokens that the model is to write."""
        n_tokens = sum(
            len(ids) if mask is None else sum(mask)
            for group in groups
            for ids, mask in zip(group.completions, group.masks or [None] * len(group.completions), strict=True)
        )
        total = 0.0

        def loss_of(hidden: Tensor, batch: PackedBatch, _) -> Tensor:
            nonlocal total
            rows = slice(None) if batch.mask is None else batch.mask
            stats = linear_logprob(hidden[rows], targets=batch.targets[rows], **head_of(self.model))
            loss = -stats.logprobs.sum() / n_tokens
            total += float(loss.detach())
            return loss

        self._accumulate(groups, loss_of)
        return {"loss": total, "grad_norm": self._apply(optimizer, total)}

    def improve(self, groups: Sequence[ScoredGroup]) -> dict[str, float | None]:
        """One policy-gradient step at the optimizer's present rate; groups without any gradient take no part in it."""
        needed = [group for group in groups if self.args.beta or any(group.advantages)]
        share = len(needed) / max(1, len(groups))
        metrics = {"loss": 0.0, "grad_norm": 0.0, "groups_with_gradient": share, "entropy": None}
        if not needed:
            return metrics | {"trained_tokens": 0}
        sums: dict[str, float] = defaultdict(float)
        denominator = self.loss.denominator([rollout.written for group in groups for rollout in group.rollouts])

        def loss_of(hidden: Tensor, batch: PackedBatch, places: Sequence[int]) -> Tensor:
            members = [needed[place] for place in places]
            advantages = [advantage for group in members for advantage in group.advantages]
            output = self.loss(
                hidden,
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                advantages=torch.tensor(advantages, device=hidden.device),
                ref_logprobs=self._reference_logprobs(batch),
                mask=batch.mask,
                denominator=denominator,
                **head_of(self.model),
            )
            live = float(output.stats["live_tokens"])
            sums["live"] += live
            sums["nonfinite"] += float(output.stats["nonfinite"])
            sums["loss"] += float(output.loss.detach())
            for name, gap in self._gaps(output.logprobs, members).items():
                sums[name] = max(sums[name], gap)
            for name in {"entropy", "kl"} & set(output.stats) if live else ():
                sums[name] += live * float(output.stats[name])
            return output.loss

        packed = [
            PackedGroup(group.prompt, [r.ids for r in group.rollouts], [r.mask for r in group.rollouts])
            for group in needed
        ]
        self._accumulate(packed, loss_of)
        if sums["nonfinite"]:
            raise DivergedError(
                f"{sums['nonfinite']:.0f} of {sums['live']:.0f} tokens have a log-prob that is not a number"
            )
        metrics["loss"] = sums["loss"]
        metrics["grad_norm"] = self._apply(self.optimizer, sums["loss"])
        metrics["trained_tokens"] = sum(group.n_tokens for group in packed)
        metrics |= {name: sums[name] for name in ("logp_difference", "distilled_gap") if name in sums}
        return metrics | {name: sums[name] / sums["live"] for name in ("entropy", "kl") if name in sums}

    def _gaps(self, logprobs: Tensor, groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """Largest differences between the trainer's and the sampler's log-probs: on the prompt that a rollout was
        sampled on, where they are rounding, and on another one (``distill``)."""
        rollouts = [(r, here) for group in groups for r, here in zip(group.rollouts, group.sampled_here, strict=True)]
        sampled = torch.tensor([logp for rollout, _ in rollouts for logp in rollout.logprobs], device=logprobs.device)
        # the loss leaves NaN where it computed nothing
        difference = (logprobs - sampled).abs().nan_to_num(0)
        here = torch.tensor([here for rollout, here in rollouts for _ in rollout.ids], device=logprobs.device)
        gaps = {"logp_difference": difference[here], "distilled_gap": difference[~here]}
        return {name: float(values.max()) for name, values in gaps.items() if len(values)}

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if not self.args.beta:
            return None
        with torch.no_grad(), toolx_attention(self.reference):
            hidden = batch.hidden(self.reference)
            head = head_of(self.reference)
            return linear_logprob(hidden, targets=batch.targets, temperature=self.args.temperature, **head).logprobs

    def _accumulate(
        self, groups: Sequence[PackedGroup], loss_of: Callable[[Tensor, PackedBatch, Sequence[int]], Tensor]
    ) -> None:
        """Adds up the gradients of ``loss_of(hidden, batch, places of its groups)`` over micro-batches."""
        with toolx_attention(self.model):
            for places in micro_batches(groups, self.args.micro_batch_tokens):
                batch = pack([groups[place] for place in places], self.model.device)
                loss_of(batch.hidden(self.model), batch, places).backward()

    def _apply(self, optimizer: torch.optim.Optimizer, loss: float) -> float:
        """Clips and applies the accumulated gradient; returns its norm before clipping."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"the loss is {loss} and the gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm
