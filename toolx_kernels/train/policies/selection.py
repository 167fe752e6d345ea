"""Group selectors: which rollouts of a group a step learns from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from toolx_kernels.train.config import RolloutSettings
from toolx_kernels.train.groups import ScoredGroup


class GroupSelector(Protocol):
    """What is learned of the groups that were sampled and rewarded."""

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """The groups, or parts of them (``ScoredGroup.part``), in their order."""


class AllRollouts:
    """Everything."""

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        return list(groups)


@dataclass(frozen=True, slots=True)
class MaxVariance:
    """Of a group that was drawn with G rollouts the ``m = max(2, floor(share G))`` whose rewards have the largest
    variance, retries among them, in their order; where all rewards are equal, the first m (arXiv 2606.00135).

    These are the k of lowest and the m - k of highest reward, for the best k; the smallest of several.

    >>> MaxVariance().places([0.0, 0.0, 1.0, 0.0, 0.0, 0.5], 3)
    [0, 1, 2]
    """

    share: float = 0.5

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        sizes = [max(2, math.floor(self.share * len(group.lengths))) for group in groups]
        return [group.part(self.places(group.rewards, size)) for group, size in zip(groups, sizes, strict=True)]

    def places(self, rewards: Sequence[float], m: int) -> list[int]:
        """Where the m stand; all, where there are no more."""
        kept = min(len(rewards), m)
        if min(rewards) == max(rewards):
            return list(range(kept))
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        cuts = (order[:low] + order[len(order) - kept + low :] for low in range(kept + 1))
        return sorted(max(cuts, key=lambda places: statistics.pvariance([rewards[place] for place in places])))


def chosen_group_selector(args: RolloutSettings) -> GroupSelector:
    return {"all": AllRollouts, "max-variance": MaxVariance}[args.rollout_selection]()
