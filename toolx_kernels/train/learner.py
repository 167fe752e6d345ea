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
from toolx_kernels.ops.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.linear_logprob import linear_logprob
from toolx_kernels.rollout import Group
from toolx_kernels.train.batch import PackedBatch, PackedGroup, micro_batches, pack
from toolx_kernels.train.checkpoint import load_weights
from toolx_kernels.train.config import ToolExpanderConfig


class DivergedError(InputError):
    """A log-prob, the loss or the gradient is no longer a number; the weights have not been touched by it."""


class Learner:
    """Owns the optimizer and changes the model's weights; nobody else does.

    The model stays in evaluation mode: the policy that is trained is exactly the one that sampled, without dropout.
    """

    def __init__(self, model: PreTrainedModel, args: ToolExpanderConfig):
        self.model, self.args = model, args
        self.optimizer = self.adamw(args.learning_rate)
        self.reference: PreTrainedModel | None = None  # for the KL term

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
        """Keeps the model of ``checkpoint`` for the KL term."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        load_weights(checkpoint, self.reference)

    def imitate(self, groups: Sequence[PackedGroup], optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """One supervised step: mean negative log-prob of all completion tokens."""
        n_tokens = sum(len(ids) for group in groups for ids in group.completions)
        total = 0.0

        def loss_of(hidden: Tensor, batch: PackedBatch, _) -> Tensor:
            nonlocal total
            loss = -linear_logprob(hidden, targets=batch.targets, **head_of(self.model)).logprobs.sum() / n_tokens
            total += float(loss.detach())
            return loss

        self._accumulate(groups, loss_of)
        return {"loss": total, "grad_norm": self._apply(optimizer, total)}

    def improve(self, groups: Sequence[Group], advantages: Tensor, learning_rate: float) -> dict[str, float | None]:
        """One clipped policy-gradient step; groups without any gradient take no part in forward and backward.

        ``advantages`` (B) belong to the groups' completions in order.
        """
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        per_group = advantages.view(len(groups), -1)
        needed = [i for i in range(len(groups)) if self.args.beta or (per_group[i] != 0).any()]
        metrics = {"loss": 0.0, "grad_norm": 0.0, "groups_with_gradient": len(needed) / len(groups), "entropy": None}
        if not needed:
            return metrics
        sums: dict[str, float] = defaultdict(float)
        denominator = self._denominator(groups)

        def loss_of(hidden: Tensor, batch: PackedBatch, places: Sequence[int]) -> Tensor:
            members = [needed[place] for place in places]
            output = linear_grpo_loss(
                hidden,
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                advantages=per_group[members].flatten().to(hidden.device),
                ref_logprobs=self._reference_logprobs(batch),
                denominator=denominator,
                config=self.args.loss,
                **head_of(self.model),
            )
            sampled = [logp for i in members for c in groups[i].completions for logp in c.logprobs]
            difference = (output.logprobs - torch.tensor(sampled, device=hidden.device)).abs()
            live = float(output.stats["live_tokens"])
            sums["live"] += live
            sums["nonfinite"] += float(output.stats["nonfinite"])
            sums["loss"] += float(output.loss.detach())
            sums["logp_difference"] = max(sums["logp_difference"], float(difference.nan_to_num(0).max()))
            for name in {"entropy", "kl"} & set(output.stats) if live else ():
                sums[name] += live * float(output.stats[name])
            return output.loss

        self._accumulate(
            [PackedGroup(groups[i].prompt_ids, [c.ids for c in groups[i].completions]) for i in needed], loss_of
        )
        if sums["nonfinite"]:
            raise DivergedError(
                f"{sums['nonfinite']:.0f} of {sums['live']:.0f} tokens have a log-prob that is not a number"
            )
        metrics["loss"] = sums["loss"]
        metrics["grad_norm"] = self._apply(self.optimizer, sums["loss"])
        metrics["logp_difference"] = sums["logp_difference"]
        return metrics | {name: sums[name] / sums["live"] for name in ("entropy", "kl") if name in sums}

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad(), toolx_attention(self.reference):
            hidden = batch.hidden(self.reference)
            head = head_of(self.reference)
            return linear_logprob(hidden, targets=batch.targets, temperature=self.args.temperature, **head).logprobs

    def _denominator(self, groups: Sequence[Group]) -> float:
        """The loss's normaliser over the whole batch, so that the gradient does not depend on how it is cut."""
        lengths = [len(c.ids) for group in groups for c in group.completions]
        by_completions = {"grpo": len(lengths), "dr_grpo": len(lengths) * self.args.max_completion_length}
        return by_completions.get(self.args.loss_type, sum(lengths))

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
