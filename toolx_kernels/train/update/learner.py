"""The learner: supervised and policy-gradient updates over micro-batches of packed groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import DivergedError, InputError, retry_with_less
from toolx_kernels.models.bridge import checkpointed, head_of, toolx_attention
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.reference import compute_dtype
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.policies.loss import PolicyLoss
from toolx_kernels.train.update.adamw import make_optimizer
from toolx_kernels.train.update.batch import PackedBatch, PackedGroup, micro_batches, pack, tokens_of
from toolx_kernels.train.update.reference_model import ReferenceModel
from toolx_kernels.train.update.results import MicroBatchResult, keep_logprobs, sampler_differences
from toolx_kernels.train.update.schedule import ExponentialDecay

# from the hidden states of a micro-batch to its loss
LossOf = Callable[[Tensor, PackedBatch], tuple[Tensor, MicroBatchResult]]
Work = tuple[Sequence[PackedGroup], LossOf]  # groups and their loss: one term of a gradient


class Learner:
    """The only part of a run that changes the model's weights.

    The model stays in evaluation mode, without dropout: the policy that is trained is exactly the one that sampled.

    optimizer      for the current kind of update; ``begin`` makes a new one
    schedule       of the learning rate
    token_budget   tokens per forward and backward: ``args.micro_batch_tokens``, or less after memory ran out
    reference      the model before RL, if the run needs it

    ``make_room`` frees memory that an update does not need, and returns whether it freed any; it is called when memory
    runs out, and before every update from then on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ToolExpanderConfig,
        loss: PolicyLoss,
        phases: Phases,
        make_room: Callable[[], bool] = lambda: False,
    ):
        self.model, self.args, self.loss, self.phases, self.make_room = model, args, loss, phases, make_room
        self.makes_room = False  # before every update
        self.token_budget = args.micro_batch_tokens
        self.reference: ReferenceModel | None = None
        self._new_optimizer(args.learning_rate)

    def begin(self, learning_rate: float) -> None:
        """Switches to a new optimizer without state."""
        self.optimizer.close()
        self._new_optimizer(learning_rate)

    def _new_optimizer(self, learning_rate: float) -> None:
        self.optimizer = make_optimizer(self.model, self.args, learning_rate)
        self.schedule = ExponentialDecay(self.optimizer.base, self.args.lr_decay, self.args.min_lr_rate)

    def state_dict(self) -> dict:
        """Returns what a resumed run needs besides the weights and the optimizer's tensors."""
        shrunk = self.token_budget < self.args.micro_batch_tokens
        return {"token_budget": self.token_budget if shrunk else None, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.schedule.load_state_dict(state["schedule"])
        if state["token_budget"]:
            self.token_budget = min(self.args.micro_batch_tokens, state["token_budget"])

    # ---- supervised updates

    def imitate(self, groups: Sequence[PackedGroup], number: int) -> dict[str, float]:
        """Runs supervised step ``number``; the loss is the mean negative log-prob of the target tokens."""
        (result,) = self._accumulate([self._supervised(groups)])
        return {"loss": result.loss, "grad_norm": self._apply([result], number)}

    def supervised_loss(self, groups: Sequence[PackedGroup]) -> float:
        """Returns the loss of such a step, without an update."""
        groups, loss_of = self._supervised(groups)
        with torch.no_grad(), toolx_attention(self.model):
            packs = [pack(part, self.model.device) for part in self._cut(groups)]
            return sum(loss_of(batch.hidden(self.model), batch)[1].loss for batch in packs)

    def _supervised(self, groups: Sequence[PackedGroup], coefficient: float = 1.0) -> Work:
        n_tokens = sum(
            len(ids) if mask is None else sum(mask)
            for group in groups
            for ids, mask in zip(group.completions, group.masks or [None] * len(group.completions), strict=True)
        )

        def loss_of(hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, MicroBatchResult]:
            rows = slice(None) if batch.mask is None else batch.mask
            stats = linear_logprob(hidden[rows], targets=batch.targets[rows], **head_of(self.model))
            loss = -stats.logprobs.sum() / n_tokens * coefficient
            return loss, MicroBatchResult(float(loss.detach()), stats.logprobs.detach().cpu())

        return groups, loss_of

    # ---- policy-gradient updates

    def improve(
        self,
        groups: Sequence[ScoredGroup],
        number: int,
        imitated: Sequence[PackedGroup] = (),
        coefficient: float = 0.0,
    ) -> dict[str, Any]:
        """Runs policy-gradient step ``number``: ``args.num_iterations`` updates, skipping groups without a gradient.

        Adds ``coefficient`` times the loss of ``imitate`` on the ``imitated`` examples.

        In the first update the ratio is exactly 1, and its forward pass gives the log-probs that later updates' ratios
        start from; with ``args.old_logprobs`` "sampler" all ratios start from the sampler's. Returns the metrics of the
        first update; with several updates, ``ratio``, ``clip_low`` and ``clip_high`` are the last one's.

        ``trained_tokens`` counts each group's prompt and completions once per update, however it is cut into
        micro-batches; ``trained_fe`` (forward-equivalents) counts them three times, four with gradient checkpointing,
        plus once what passes through the reference model, which runs in the first update only.

        Raises:
            InputError: log-probs of different prompts would be compared, or memory runs out for good.
            DivergedError: a log-prob, the loss or the gradient norm is not finite.
        """
        needed = self.needed(groups)
        share = len(needed) / max(1, len(groups))
        metrics: dict[str, Any] = {"loss": 0.0, "grad_norm": 0.0, "groups_with_gradient": share}
        metrics |= {"entropy": None, "trained_tokens": 0, "trained_fe": 0}
        imitated = imitated if coefficient else ()
        if not needed and not imitated:
            return metrics
        denominator = self.loss.denominator(self._lengths(groups)) if needed else 1.0
        updates, passes = self.args.num_iterations if needed else 1, 4 if self.args.gradient_checkpointing else 3
        corrected = self.args.importance_sampling_mode != "none"
        from_sampler = updates > 1 and self.args.old_logprobs == "sampler"
        rollouts = [rollout for group in needed for rollout in group.rollouts]
        if (from_sampler or corrected) and not all(here for group in needed for here in group.on_policy_prompt):
            raise InputError(
                "old_logprobs=sampler and importance_sampling_mode compare log-probs on one prompt, and the "
                "hard_sample_policy samples on another prompt than it learns on: leave them at their defaults."
            )
        for rollout in rollouts:
            rollout.old_logprobs = torch.tensor(rollout.logprobs, dtype=torch.float64) if from_sampler else None
        means: dict[str, float] = {}
        for update in range(updates):
            together = [packed(group, corrected) for group in needed]
            work: list[Work] = [(together, partial(self._policy_loss, denominator))] if needed else []
            work += [self._supervised(imitated, coefficient)] if imitated else []
            results = self._accumulate(work)
            norm = self._apply(results, number * self.args.num_iterations + update)
            trained = tokens_of(imitated) + tokens_of(together)
            metrics["trained_tokens"] += trained
            metrics["trained_fe"] += passes * trained
            if update == 0:
                metrics |= {"loss": sum(result.loss for result in results), "grad_norm": norm}
                metrics |= {"imitation_loss": results[-1].loss / coefficient} if imitated else {}
            if needed:
                means = results[0].means
            if needed and update == 0:
                metrics |= {name: means[name] for name in ("entropy", "kl") if name in means}
                metrics |= sampler_differences(needed, results[0].logprobs)
                metrics["trained_fe"] += tokens_of(together) if results[0].ref_logprobs is not None else 0
                keep_logprobs(rollouts, results[0], old=not from_sampler)
        if updates > 1:
            metrics |= {name: means[name] for name in ("ratio", "clip_low", "clip_high") if name in means}
        return metrics

    def needed(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Returns the groups that have a gradient."""
        return [group for group in groups if self.args.beta or group.has_gradient]

    def _lengths(self, groups: Sequence[ScoredGroup]) -> list[int]:
        """Written tokens of each completion that divides the loss: of first draws only, so that retries do not change
        the gradient of other groups. With ``args.denominator`` "live", of groups with a gradient only, unless there is
        none and only the KL is learned."""
        live = [n for group in groups if group.has_gradient for n in group.lengths]
        if live and self.args.denominator == "live":
            return live
        return [n for group in groups if group.counted for n in group.lengths]

    def _policy_loss(self, denominator: float, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, MicroBatchResult]:
        ref_logprobs = batch.ref_logprobs
        if self.args.beta and ref_logprobs is None:
            ref_logprobs = self._reference_logprobs(batch)
        output = self.loss(
            hidden,
            targets=batch.targets,
            cu_seqlens=batch.cu_seqlens,
            advantages=batch.advantages,
            old_logprobs=batch.old_logprobs,
            sampler_logprobs=batch.sampler_logprobs,
            ref_logprobs=ref_logprobs,
            mask=batch.mask,
            denominator=denominator,
            **head_of(self.model),
        )
        stats = {name: float(value) for name, value in output.stats.items()}
        return output.loss, MicroBatchResult(
            float(output.loss.detach()),
            output.logprobs.cpu(),
            None if ref_logprobs is None else ref_logprobs.cpu(),
            stats.pop("live_tokens"),
            stats.pop("nonfinite"),
            stats,
        )

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor:
        assert self.reference is not None, "beta needs it"
        with torch.no_grad(), self.reference.active() as reference, toolx_attention(reference):
            hidden, head = batch.hidden(reference), head_of(reference)
            return linear_logprob(hidden, targets=batch.targets, temperature=self.args.temperature, **head).logprobs

    # ---- gradients over micro-batches, and their update

    def _accumulate(self, work: Sequence[Work]) -> list[MicroBatchResult]:
        """Accumulates the gradients of all work over micro-batches.

        When memory runs out, it first frees what rollouts keep, then halves the micro-batches, and starts over.
        """
        if self.makes_room:
            self.make_room()

        def all_of_it() -> list[MicroBatchResult]:
            cut = [(self._cut(groups), loss_of) for groups, loss_of in work]
            self.phases.bar.part("update", sum(len(parts) for parts, _ in cut))
            return [
                MicroBatchResult.together([self._backward(part, loss_of) for part in parts]) for parts, loss_of in cut
            ]

        def give_back(reason: str) -> bool:
            self.optimizer.drop_gradients()
            failed = [part for groups, _ in work for part in self._cut(groups)]
            return self._made_room(reason) or self._halved(failed, reason)

        return retry_with_less(all_of_it, give_back)

    def _cut(self, groups: Sequence[PackedGroup]) -> list[list[PackedGroup]]:
        return micro_batches(groups, self.token_budget)

    def _backward(self, groups: Sequence[PackedGroup], loss_of: LossOf) -> MicroBatchResult:
        """Runs forward and backward of one micro-batch."""
        args, dtype = self.args, compute_dtype(self.model.get_output_embeddings().weight)
        with toolx_attention(self.model), checkpointed(self.model) if args.gradient_checkpointing else nullcontext():
            with self.phases.phase("forward"):
                batch = pack(groups, self.model.device, dtype)
                loss, result = loss_of(batch.hidden(self.model), batch)
            with self.phases.phase("backward"):
                loss.backward()
                self.optimizer.collect()
        self.phases.bar.advance_part()
        return result

    def _apply(self, results: Sequence[MicroBatchResult], number: int) -> float:
        """Clips and applies the accumulated gradient; returns its norm before clipping."""
        for result in results:
            if result.nonfinite or not math.isfinite(result.loss):
                self.optimizer.drop_gradients()
                raise DivergedError(
                    f"{result.nonfinite:.0f} of {result.live:.0f} tokens have a log-prob that is not a number"
                    if result.nonfinite
                    else f"the loss is {result.loss}"
                )
        with self.phases.phase("optimizer"):
            norm = retry_with_less(
                lambda: self.optimizer.apply(self.args.max_grad_norm, (self.args.seed, number), self._made_room),
                no_memory_for_update,
            )
        if not math.isfinite(norm):
            losses = " and ".join(str(result.loss) for result in results)
            raise DivergedError(f"the loss is {losses} and the gradient norm {norm}")
        return norm

    # ---- out of memory

    def _made_room(self, reason: str) -> bool:
        """Frees memory that rollouts keep; returns whether there was any. Warns the first time."""
        if not self.make_room():
            return False
        if not self.makes_room:
            warnings.warn(
                f"Memory ran out in training; from here on each update first frees the KV pool of the rollouts. "
                f"({reason})",
                stacklevel=2,
            )
        self.makes_room = True
        torch.cuda.empty_cache()
        return True

    def _halved(self, failed: Sequence[Sequence[PackedGroup]], reason: str) -> bool:
        """Limits micro-batches to half the tokens of the largest one that ``failed``; warns the first time."""
        largest = max(failed, key=tokens_of)
        if sum(len(group.completions) for group in largest) == 1:
            raise InputError(
                f"memory ran out with one completion at a time ({reason}): shorten max_completion_length or the "
                "prompts, or pass --gradient_checkpointing true; toolx plan says what a run needs."
            )
        tokens = tokens_of(largest)
        if self.token_budget == self.args.micro_batch_tokens:
            warnings.warn(
                f"Memory ran out with {tokens} tokens in a micro-batch; continuing with half as many, which "
                f"changes no gradient: pass --micro_batch_tokens {tokens // 2} next time. ({reason})",
                stacklevel=2,
            )
        self.token_budget = max(1, min(self.token_budget, tokens) // 2)
        torch.cuda.empty_cache()
        return True


def no_memory_for_update(reason: str) -> NoReturn:
    raise InputError(
        f"memory ran out in the optimizer's update ({reason}): choose --optim adamw_8bit or adamw_offload, or "
        "--use_peft true, in a new run, or find more memory and --resume this one from its last checkpoint; toolx plan "
        "says what a run needs."
    )


def packed(group: ScoredGroup, corrected: bool = False) -> PackedGroup:
    """Packs a group's prompt and rollouts with all that the loss needs; the sampler's log-probs if ``corrected``."""
    return PackedGroup(
        group.prompt,
        [rollout.ids for rollout in group.rollouts],
        [rollout.mask for rollout in group.rollouts],
        group.advantages,
        [rollout.old_logprobs for rollout in group.rollouts],
        [rollout.ref_logprobs for rollout in group.rollouts],
        [rollout.logprobs for rollout in group.rollouts] if corrected else [],
    )
