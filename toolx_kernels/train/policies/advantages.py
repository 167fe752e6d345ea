"""Advantage shapers: rewards to advantages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.method_settings import RewardSettings

EPS = 1e-4  # added to a standard deviation


class AdvantageShaper(Protocol):
    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        """Returns one advantage per rollout (B) or one per completion token (N), concatenated group by group."""


@dataclass(frozen=True, slots=True)
class GroupRelative:
    """How much better a rollout is than its siblings (``group_advantages``)."""

    scale: str = "group"
    min_std: float = 0.0  # of a group's rewards; see RewardSettings.min_reward_std

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        rewards = torch.tensor([reward for group in groups for reward in group.rewards])
        min_std = self.min_std if self.scale == "group" else 0.0
        return group_advantages(rewards, group_ids=_group_ids(groups), scale=self.scale, eps=EPS, min_std=min_std)


@dataclass(frozen=True, slots=True)
class DifficultyWeighted:
    """Observe-R1 (arXiv 2505.12432): multiplies advantages by ``4 sigma d (1 - d)``, where d is the share of solved
    rollouts. Prompts of medium difficulty count most; groups that are all right or all wrong count nothing."""

    of: AdvantageShaper
    sigma: float = 1.8

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        share = torch.tensor([sum(group.solved) / len(group.solved) for group in groups])
        weights = (4 * self.sigma * share * (1 - share))[_group_ids(groups)]
        advantages = self.of(groups)
        return advantages * _like(advantages, weights, groups)


@dataclass(frozen=True, slots=True)
class SuccessesOnly:
    """Like ``of``, but in groups where some rollouts were sampled on a different prompt than the one they are learned
    on, all failures get advantage 0, including those sampled on the learned prompt."""

    of: AdvantageShaper

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        counts = [solved or all(group.on_policy_prompt) for group in groups for solved in group.solved]
        advantages = self.of(groups)
        return advantages.where(_like(advantages, torch.tensor(counts), groups), 0.0)


@dataclass(frozen=True, slots=True)
class Routed:
    """Like ``of``, but a group whose first draws all failed imitates its solved retries: each of their tokens gets
    ``1 - H / H_max``, where H is the sampler's entropy at that token, and the group's other rollouts get 0. Groups
    without solved retries are left to ``of``.

    Follows SRPO (arXiv 2604.02288), which sends failures to distillation, but without its teacher. ``H_max`` is the
    largest entropy among all tokens that get a weight in the step, or 1 if that is 0.
    """

    of: AdvantageShaper

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        advantages = _per_token(self.of(groups), groups)
        imitated = []
        for group, parts in _by_group(advantages, groups):
            draws = zip(parts, group.rollouts, group.retried, group.solved, strict=True)
            solved = [(part, rollout, again) for part, rollout, again, right in draws if right]
            if solved and all(again for *_, again in solved):
                for part in parts:
                    part.zero_()
                imitated += [(part, rollout) for part, rollout, _ in solved]
        highest = max((max(rollout.entropies) for _, rollout in imitated), default=0.0) or 1.0
        for part, rollout in imitated:
            part.copy_((1 - torch.tensor(rollout.entropies) / highest).where(_written(rollout), 0.0))
        return advantages


@dataclass(frozen=True, slots=True)
class ZeroVariance:
    """Like ``of``, but groups of equal reward learn from the sampler's entropy H at each token that the model wrote:
    ``alpha H`` for solved rollouts, ``-alpha (max H - H)`` for the others, where the maximum is over the completion.
    Source: RL-ZVP (arXiv 2509.21880, equation 5)."""

    of: AdvantageShaper
    alpha: float = 0.1

    def __call__(self, groups: Sequence[ScoredGroup]) -> Tensor:
        advantages = _per_token(self.of(groups), groups)
        for group, parts in _by_group(advantages, groups):
            if not group.equal_rewards:
                continue
            for part, rollout, solved in zip(parts, group.rollouts, group.solved, strict=True):
                entropies = torch.tensor(rollout.entropies)
                shaped = self.alpha * (entropies if solved else entropies - entropies.max())
                part.copy_(shaped.where(_written(rollout), 0.0))
        return advantages


def give_advantages(groups: Sequence[ScoredGroup], shaper: AdvantageShaper) -> None:
    """Stores each group's advantages in it: one number per rollout, or one list per rollout with a number per token.

    Raises InputError: the shaper returned neither one advantage per rollout nor one per token.
    """
    if not groups:
        return
    advantages = shaper(groups)
    if _is_per_token(advantages, groups):
        for group, parts in _by_group(advantages, groups):
            group.advantages = [part.tolist() for part in parts]
    else:
        values = iter(advantages.tolist())
        for group in groups:
            group.advantages = [next(values) for _ in group.rollouts]
    _note_least_std(groups, shaper)


def chosen_advantage_shaper(args: RewardSettings) -> AdvantageShaper:
    relative = GroupRelative(args.scale_rewards, args.settled().min_reward_std or 0.0)
    shapers: dict[str, Callable[[AdvantageShaper], AdvantageShaper]] = {
        "group": lambda of: of,
        "difficulty": DifficultyWeighted,
        "successes": SuccessesOnly,
        "routed": Routed,
        "zero-variance": ZeroVariance,
    }
    return shapers[args.advantage_shaping](relative)


def shrunk(groups: Sequence[ScoredGroup]) -> list[float]:
    """Returns by how much the advantages of each group with a ``least_std`` are smaller for it, e.g. 17 for rewards of
    .90 and .91 and a least one of .1."""
    floored = [(group.least_std, statistics.stdev(group.rewards)) for group in groups if group.least_std]
    return [(least + EPS) / (std + EPS) for least, std in floored]


def _note_least_std(groups: Sequence[ScoredGroup], shaper: Any) -> None:
    """Notes the least standard deviation in groups where it took the place of theirs: that of ``GroupRelative``, also
    where another shaper works on its advantages (``of``)."""
    while hasattr(shaper, "of"):
        shaper = shaper.of
    if not isinstance(shaper, GroupRelative) or shaper.scale != "group":
        return
    for group in groups:
        smaller = group.has_gradient and not group.equal_rewards and statistics.stdev(group.rewards) < shaper.min_std
        group.least_std = shaper.min_std if smaller else 0.0


def _group_ids(groups: Sequence[ScoredGroup]) -> Tensor:
    return torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group.rollouts) for group in groups]))


# ---- shapes (B) and (N)


def _lengths(groups: Sequence[ScoredGroup]) -> list[int]:
    return [len(rollout.ids) for group in groups for rollout in group.rollouts]


def _is_per_token(advantages: Tensor, groups: Sequence[ScoredGroup]) -> bool:
    """Whether the shape is (N) and not (B); if every completion is one token, both are the same and count as (B)."""
    lengths = _lengths(groups)
    if not isinstance(advantages, Tensor):
        raise InputError(f"The advantage shaper returned a {type(advantages).__name__}: return a tensor of advantages.")
    if advantages.shape not in ((len(lengths),), (sum(lengths),)):
        raise InputError(
            f"The advantage shaper returned advantages of shape {tuple(advantages.shape)}: return one for each of the "
            f"{len(lengths)} rollouts or one for each of their {sum(lengths)} tokens."
        )
    return len(advantages) != len(lengths)


def _per_token(advantages: Tensor, groups: Sequence[ScoredGroup]) -> Tensor:
    """Returns a copy of shape (N)."""
    if _is_per_token(advantages, groups):
        return advantages.clone()
    return advantages.repeat_interleave(torch.tensor(_lengths(groups)))


def _like(advantages: Tensor, values: Tensor, groups: Sequence[ScoredGroup]) -> Tensor:
    """Expands ``values`` (B) to the shape of ``advantages``."""
    return _per_token(values, groups) if _is_per_token(advantages, groups) else values


def _by_group(advantages: Tensor, groups: Sequence[ScoredGroup]) -> Iterator[tuple[ScoredGroup, list[Tensor]]]:
    """Yields each group with its rollouts' views into ``advantages`` (N)."""
    parts = iter(advantages.split(_lengths(groups)))
    for group in groups:
        yield group, [next(parts) for _ in group.rollouts]


def _written(rollout: Rollout) -> Tensor:
    """(tokens) bool: True for tokens that the model wrote."""
    return torch.ones(len(rollout.ids), dtype=torch.bool) if rollout.mask is None else torch.tensor(rollout.mask)
