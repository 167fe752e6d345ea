"""Advantage shapers: from rewards to advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.method_settings import RewardSettings


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
    """Observe-R1's (arXiv 2505.12432): advantages times ``4 sigma d (1 - d)`` with d the share of solved rollouts, so
    that prompts of middling difficulty count most and groups that are all right or all wrong not at all."""

    of: AdvantageShaper
    sigma: float = 1.8

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        share = torch.tensor([sum(group.solved) / len(group.solved) for group in groups])
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
