"""Three of the trainer's four policies: which prompts, which advantages, which objective (the fourth: demonstrators).

Each is a small protocol with ToolExpander's choice and another system's; ``ToolExpanderTrainer`` takes any object that
fits instead.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.objective import loss_denominator
from toolx_kernels.reference import GRPOOutput
from toolx_kernels.train.config import RewardSettings, ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup

# ---- which prompts a step learns from


class PromptOrder(Protocol):
    """Which training rows come next, and which of the groups sampled for a step it learns from."""

    @property
    def max_batches(self) -> int:
        """Batches of rows that one step may sample."""

    def rows(self, batch: int) -> list[int]:
        """Indices of batch number ``batch`` of the run; a pure function, so that a resumed run draws the same."""

    def keeps(self, group: ScoredGroup) -> bool:
        """Whether a step learns from the group; what it keeps too few of is sampled anew, up to ``max_batches``."""


@lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"epoch {seed} {epoch}").shuffle(order)
    return tuple(order)


@dataclass(frozen=True, slots=True)
class EpochOrder:
    """Each epoch is a permutation of the rows, cut into equal batches; a step is a batch."""

    count: int  # training rows
    size: int  # rows in a batch
    seed: int
    max_batches: int = 1

    def rows(self, batch: int) -> list[int]:
        epoch, place = divmod(batch, max(1, self.count // self.size))
        return list(_permutation(self.count, self.seed, epoch)[place * self.size :][: self.size])

    def keeps(self, group: ScoredGroup) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class DynamicSampling(EpochOrder):
    """DAPO's (arXiv 2503.14476, 3.2): groups of equal reward are dropped and the step is filled up with the next rows,
    for at most ten batches."""

    max_batches: int = 10

    def keeps(self, group: ScoredGroup) -> bool:
        return not group.equal_rewards


def chosen_prompt_order(args: ToolExpanderConfig, count: int) -> PromptOrder:
    order = {"epochs": EpochOrder, "dynamic": DynamicSampling}[args.prompt_sampling]
    return order(count, args.prompts_per_step, args.seed)


# ---- from rewards to advantages


class AdvantageShaper(Protocol):
    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        """One advantage per rollout, group after group."""


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """How much better a rollout is than its siblings (``group_advantages``)."""

    scale: str = "group"
    min_std: float = 0.0  # of a group's rewards; see RewardSettings.min_reward_std

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        min_std = self.min_std if self.scale == "group" else 0.0
        return group_advantages(rewards, group_ids=_group_ids(groups), scale=self.scale, min_std=min_std)


@dataclass(frozen=True, slots=True)
class DifficultyWeighted:
    """Observe-R1's (arXiv 2505.12432): advantages times ``4 sigma d (1 - d)`` with d the share of correct rollouts, so
    that prompts of middling difficulty count most and groups that are all right or all wrong not at all."""

    of: AdvantageShaper
    sigma: float = 1.8

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        share = torch.tensor([sum(group.correct) / len(group.correct) for group in groups])
        return self.of(groups) * (4 * self.sigma * share * (1 - share))[_group_ids(groups)]


def give_advantages(groups: Sequence[ScoredGroup], shaper: AdvantageShaper) -> None:
    """Puts the advantages of its rollouts into each group."""
    advantages = iter(shaper(groups).tolist() if groups else ())
    for group in groups:
        group.advantages = [next(advantages) for _ in group.rollouts]


def chosen_advantage_shaper(args: RewardSettings) -> AdvantageShaper:
    relative = GroupRelative(args.scale_rewards, args.min_reward_std)
    return DifficultyWeighted(relative) if args.advantage_shaping == "difficulty" else relative


def _group_ids(groups: Sequence[ScoredGroup]) -> Tensor:
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.rollouts) for group in groups]))


# ---- the objective


class PolicyLoss(Protocol):
    def denominator(self, lengths: Sequence[int]) -> float:
        """What the whole batch's loss is divided by, given the written tokens of all its completions, so that the
        gradient does not depend on how the batch is cut."""

    def __call__(self, hidden: Tensor, *, denominator: float, ref_logprobs: Tensor | None, **batch) -> GRPOOutput:
        """The loss of a micro-batch; ``batch`` is what ``linear_grpo_loss`` takes, the head included; its
        ``old_logprobs`` are None in the first of several updates, and where there is only one."""


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """``linear_grpo_loss`` of any ``loss_type``."""

    config: GRPOLossConfig

    def denominator(self, lengths: Sequence[int]) -> float:
        return loss_denominator(self.config.loss_type, lengths, self.config.max_completion_length)

    def __call__(self, hidden: Tensor, **batch) -> GRPOOutput:
        return linear_grpo_loss(hidden, config=self.config, **batch)
