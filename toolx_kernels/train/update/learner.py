"""The two kinds of update, supervised and clipped policy gradient, over micro-batches of packed groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import MEMORY_ERRORS, DivergedError, InputError, first_line, out_of_memory
from toolx_kernels.models.bridge import checkpointed, head_of, toolx_attention
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.reference import compute_dtype
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.policies import PolicyLoss
from toolx_kernels.train.update.adamw import make_updater
from toolx_kernels.train.update.batch import PackedBatch, PackedGroup, Part, micro_batches, pack
from toolx_kernels.train.update.reference_model import ReferenceModel
from toolx_kernels.train.update.schedule import ExponentialDecay

Told = TypeVar("Told")


@dataclass(slots=True)
class Seen:
    """What the loss of a micro-batch told."""

    loss: float
    logprobs: list[list[float]]  # of each completion; NaN where nothing was computed
    live: float  # tokens in the loss
    nonfinite: float
    means: dict[str, float] = field(default_factory=dict)  # over the live tokens
    reference: list[list[float]] | None = None  # the reference's log-probs, as ``logprobs``


class Learner:
    """Changes the model's weights; nobody else does.

    The model stays in evaluation mode: the policy that is trained is exactly the one that sampled, without dropout.

    updater        of the present kind of update; ``begin`` makes another
    schedule       of the learning rate
    token_budget   tokens in one forward and backward: ``args.micro_batch_tokens``, or less once memory ran out
    reference      the model before RL, where the run needs it

    ``make_room`` gives memory back that an update does not need, and says whether there was any; it is called when
    memory runs out, and before every update from then on.
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
        self.short = False  # of memory, beside what rollouts keep
        self.token_budget = args.micro_batch_tokens
        self.reference: ReferenceModel | None = None
        self._set_out(args.learning_rate)

    def begin(self, learning_rate: float) -> None:
        """From here on updates have a new optimizer, without any state yet."""
        self.updater.close()
        self._set_out(learning_rate)

    def _set_out(self, learning_rate: float) -> None:
        self.updater = make_updater(self.model, self.args, learning_rate)
        self.schedule = ExponentialDecay(self.updater.optimizer, self.args.lr_decay, self.args.min_lr_rate)

    def state_dict(self) -> dict:
        """What a resumed run needs besides the weights and the optimizer's tensors."""
        shrunk = self.token_budget < self.args.micro_batch_tokens
        return {"token_budget": self.token_budget if shrunk else None, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.schedule.load_state_dict(state["schedule"])
        if state["token_budget"]:
            self.token_budget = min(self.args.micro_batch_tokens, state["token_budget"])

    # ---- the two updates

    def imitate(self, groups: Sequence[PackedGroup], number: int) -> dict[str, float]:
        """Supervised step ``number``: mean negative log-prob of the completion tokens that the model is to write."""
        n_tokens = sum(
            len(ids) if mask is None else sum(mask)
            for group in groups
            for ids, mask in zip(group.completions, group.masks or [None] * len(group.completions), strict=True)
        )

        def loss_of(hidden: Tensor, batch: PackedBatch, _) -> tuple[Tensor, float]:
            rows = slice(None) if batch.mask is None else batch.mask
            stats = linear_logprob(hidden[rows], targets=batch.targets[rows], **head_of(self.model))
            loss = -stats.logprobs.sum() / n_tokens
            return loss, float(loss.detach())

        loss = sum(told for _, told in self._accumulate(groups, loss_of))
        return {"loss": loss, "grad_norm": self._apply(loss, number)}

    def improve(self, groups: Sequence[ScoredGroup], number: int) -> dict[str, float | None]:
        """Policy-gradient step ``number``: ``args.num_iterations`` updates, without the groups that have no gradient.

        The first update is of the policy as it is, so its ratio is exactly 1, and its forward pass gives the log-probs
        that the ratio of later ones starts from; with ``args.old_logprobs`` "sampler" all start from the sampler's.
        Metrics are the first update's; where there are several, ``ratio``, ``clip_low`` and ``clip_high`` the last's.
        """
        needed = self.needed(groups)
        share = len(needed) / max(1, len(groups))
        metrics = {"loss": 0.0, "grad_norm": 0.0, "groups_with_gradient": share, "entropy": None, "trained_tokens": 0}
        if not needed:
            return metrics
        together = [packed(group) for group in needed]
        denominator = self.loss.denominator([rollout.written for group in groups for rollout in group.rollouts])
        sampled = [[rollout.logprobs for rollout in group.rollouts] for group in needed]
        old = sampled if self.args.num_iterations > 1 and self.args.old_logprobs == "sampler" else None
        reference = None
        for iteration in range(self.args.num_iterations):
            seen = self._update(needed, together, old, sampled, reference, denominator, number, iteration)
            reference = seen["reference"]
            metrics["trained_tokens"] += seen.pop("trained_tokens")
            if iteration == 0:
                metrics |= {name: seen[name] for name in ("loss", "grad_norm", "entropy", "kl") if name in seen}
                metrics |= self._gaps(seen["logprobs"], needed)
                old = old or seen["logprobs"]
        if self.args.num_iterations > 1:
            metrics |= {name: seen[name] for name in ("ratio", "clip_low", "clip_high")}
        return metrics

    def needed(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """The groups that have a gradient."""
        return [group for group in groups if self.args.beta or any(group.advantages)]

    def _update(
        self, needed: Sequence[ScoredGroup], together: Sequence[PackedGroup], old: list[list[list[float]]] | None,
        sampled: list[list[list[float]]], reference: list[list[list[float]]] | None, denominator: float, number: int,
        iteration: int,
    ) -> dict:  # fmt: skip
        """One update; ``old``, ``sampled`` and ``reference`` (found here when None) are log-probs by group, completion
        and token."""
        corrected = self.args.importance_sampling_mode != "none"

        def loss_of(hidden: Tensor, batch: PackedBatch, parts: Sequence[Part]) -> tuple[Tensor, Seen]:
            def tokens(of_group: list[list[list[float]]]) -> Tensor:
                flat = [logp for p in parts for ids in of_group[p.group][p.completions] for logp in ids]
                return torch.tensor(flat, device=hidden.device, dtype=compute_dtype(hidden))

            def by_completion(logprobs: Tensor) -> list[list[float]]:
                return [part.tolist() for part in logprobs.split(batch.cu_seqlens.diff().tolist())]

            advantages = [a for p in parts for a in needed[p.group].advantages[p.completions]]
            ref_logprobs = self._reference_logprobs(batch) if reference is None else tokens(reference)
            output = self.loss(
                hidden,
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                advantages=torch.tensor(advantages, device=hidden.device, dtype=compute_dtype(hidden)),
                old_logprobs=None if old is None else tokens(old),
                sampler_logprobs=tokens(sampled) if corrected else None,
                ref_logprobs=ref_logprobs,
                mask=batch.mask,
                denominator=denominator,
                **head_of(self.model),
            )
            stats = {name: float(value) for name, value in output.stats.items()}
            return output.loss, Seen(
                float(output.loss.detach()),
                by_completion(output.logprobs),
                stats.pop("live_tokens"),
                stats.pop("nonfinite"),
                stats,
                None if ref_logprobs is None else by_completion(ref_logprobs),
            )

        cut, told = zip(*self._accumulate(together, loss_of), strict=True)
        live, nonfinite = sum(seen.live for seen in told), sum(seen.nonfinite for seen in told)
        if nonfinite:
            self.updater.drop_gradients()
            raise DivergedError(f"{nonfinite:.0f} of {live:.0f} tokens have a log-prob that is not a number")
        loss = sum(seen.loss for seen in told)
        means = {
            name: sum(seen.live * seen.means[name] for seen in told if seen.live) / live for name in told[0].means
        } if live else {}  # fmt: skip

        def by_group(of_cut: Sequence[list[list[float]]]) -> list[list[list[float]]]:
            found: list[list[list[float]]] = [[] for _ in needed]
            for parts, completions in zip(cut, of_cut, strict=True):
                rest = iter(completions)
                for part in parts:
                    found[part.group] += [next(rest) for _ in together[part.group].completions[part.completions]]
            return found

        return {
            "loss": loss,
            "grad_norm": self._apply(loss, number * self.args.num_iterations + iteration),
            "logprobs": by_group([seen.logprobs for seen in told]),
            "reference": by_group([seen.reference for seen in told]) if self.args.beta else None,
            "trained_tokens": sum(together[p.group].part(p.completions).n_tokens for parts in cut for p in parts),
            **means,
        }

    def _gaps(self, logprobs: list[list[list[float]]], groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """What the trainer's log-probs differ by from the sampler's: on the prompt that a rollout was sampled on, where
        it is rounding (largest and mean), and on another one (``distill``; largest)."""
        differences: dict[bool, list[float]] = {True: [], False: []}
        for group, of_group in zip(groups, logprobs, strict=True):
            for rollout, here, ours in zip(group.rollouts, group.on_policy_prompt, of_group, strict=True):
                # the loss leaves NaN where it computed nothing
                pairs = zip(ours, rollout.logprobs, strict=True)
                differences[here] += [abs(logp - theirs) for logp, theirs in pairs if not math.isnan(logp)]
        gaps = {}
        if here := differences[True]:
            gaps = {"logp_difference": max(here), "logp_difference_mean": sum(here) / len(here)}
        return gaps | ({"distilled_gap": max(differences[False])} if differences[False] else {})

    def _reference_logprobs(self, batch: PackedBatch) -> Tensor | None:
        if not self.args.beta:
            return None
        with torch.no_grad(), self.reference.active() as reference, toolx_attention(reference):
            hidden, head = batch.hidden(reference), head_of(reference)
            return linear_logprob(hidden, targets=batch.targets, temperature=self.args.temperature, **head).logprobs

    # ---- gradients over micro-batches

    def _accumulate(
        self,
        groups: Sequence[PackedGroup],
        loss_of: Callable[[Tensor, PackedBatch, Sequence[Part]], tuple[Tensor, Told]],
    ) -> list[tuple[list[Part], Told]]:
        """Adds up the gradients of ``loss_of(hidden, batch, its parts)[0]`` over micro-batches; the parts of each, and
        what else it told.

        When memory runs out, all of it is done again without what rollouts keep, or in smaller micro-batches.
        """
        if self.short:
            self.make_room()
        while True:
            cut = micro_batches(groups, self.token_budget)
            pieces = [[groups[part.group].part(part.completions) for part in parts] for parts in cut]
            try:
                return [
                    (parts, self._backward(piece, parts, loss_of)) for piece, parts in zip(pieces, cut, strict=True)
                ]
            except MEMORY_ERRORS as error:
                if not out_of_memory(error):
                    raise
                reason = first_line(error)
            # out here, since the error's traceback keeps the tensors of the batch that failed
            self.updater.drop_gradients()
            if not self._made_room(reason):
                self._halve(max(pieces, key=lambda piece: sum(group.n_tokens for group in piece)), reason)

    def _backward(
        self,
        groups: Sequence[PackedGroup],
        parts: Sequence[Part],
        loss_of: Callable[[Tensor, PackedBatch, Sequence[Part]], tuple[Tensor, Told]],
    ) -> Told:
        """Forward and backward of one micro-batch: ``groups``, which are ``parts`` of the step's."""
        args = self.args
        with toolx_attention(self.model), checkpointed(self.model) if args.gradient_checkpointing else nullcontext():
            with self.phases.phase("forward"):
                batch = pack(groups, self.model.device)
                loss, told = loss_of(batch.hidden(self.model), batch, parts)
            with self.phases.phase("backward"):
                loss.backward()
                self.updater.collect()
        return told

    def _made_room(self, reason: str) -> bool:
        """Whether more memory is free than there was; says so the first time."""
        if not self.make_room():
            return False
        if not self.short:
            warnings.warn(
                f"Memory ran out in training; the KV pool of the rollouts is given back before each update from here "
                f"on. ({reason})",
                stacklevel=2,
            )
        self.short = True
        self._empty_cache()
        return True

    def _empty_cache(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()

    def _halve(self, largest: Sequence[PackedGroup], reason: str) -> None:
        """Goes on with half of the ``largest`` micro-batch's tokens; says so the first time."""
        tokens = sum(group.n_tokens for group in largest)
        if sum(len(group.completions) for group in largest) == 1:
            raise InputError(
                f"memory ran out with one completion at a time ({reason}): shorten max_completion_length or the "
                "prompts, or pass --gradient_checkpointing true; toolx plan tells what a run needs."
            )
        if self.token_budget == self.args.micro_batch_tokens:
            warnings.warn(
                f"Memory ran out with {tokens} tokens in a micro-batch; going on with half of them at a time, which "
                f"changes no gradient: pass --micro_batch_tokens {tokens // 2} next time. ({reason})",
                stacklevel=2,
            )
        self.token_budget = max(1, min(self.token_budget, tokens) // 2)
        self._empty_cache()

    def _apply(self, loss: float, number: int) -> float:
        """Clips and applies the accumulated gradient; returns its norm before clipping."""
        if not math.isfinite(loss):
            self.updater.drop_gradients()
            raise DivergedError(f"the loss is {loss}")
        with self.phases.phase("optimizer"):
            try:
                norm = self.updater.apply(self.args.max_grad_norm, (self.args.seed, number), self._made_room)
            except MEMORY_ERRORS as error:
                if not out_of_memory(error):
                    raise
                raise InputError(
                    f"memory ran out in the optimizer's update ({first_line(error)}): choose --optim adamw_8bit or "
                    "adamw_offload, or --use_peft true, in a new run, or find more memory and --resume this one from "
                    "its last checkpoint; toolx plan tells what a run needs."
                ) from None
        if not math.isfinite(norm):
            raise DivergedError(f"the loss is {loss} and the gradient norm {norm}")
        return norm


def packed(group: ScoredGroup) -> PackedGroup:
    """A group's prompt and rollouts, for the forward pass."""
    return PackedGroup(group.prompt, [r.ids for r in group.rollouts], [r.mask for r in group.rollouts])
