"""Group selection: the rollouts of each group that a step learns from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from toolx_kernels.train.config import RolloutSettings
from toolx_kernels.train.groups import ScoredGroup


class GroupSelector(Protocol):
    """Selects what a step learns from, among its sampled and rewarded groups."""

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        """Returns the groups, or parts of them (``ScoredGroup.part``), in the same order."""


class AllRollouts:
    """Selects everything."""

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        return list(groups)


@dataclass(frozen=True, slots=True)
class MaxVariance:
    """Selects ``m = max(2, floor(share G))`` rollouts, retries included, so that their rewards have the largest
    variance; G counts the group's first draws. If all rewards are equal, selects the first m (arXiv 2606.00135).

    These are the k lowest and the m - k highest rewards, for the best k; the smallest k of several.

    >>> MaxVariance().places([0.0, 0.0, 1.0, 0.0, 0.0, 0.5], 3)
    [0, 1, 2]
    """

    share: float = 0.5

    def __call__(self, groups: Sequence[ScoredGroup]) -> list[ScoredGroup]:
        sizes = [max(2, math.floor(self.share * len(group.lengths))) for group in groups]
        return [group.part(self.places(group.rewards, size)) for group, size in zip(groups, sizes, strict=True)]

    def places(self, rewards: Sequence[float], m: int) -> list[int]:
        """Returns the indices of the m selected rollouts in ascending order; all if there are fewer than m."""
        kept = min(len(rewards), m)
        if min(rewards) == max(rewards):
            return list(range(kept))
        order = sorted(range(len(rewards)), key=rewards.__getitem__)
        cuts = (order[:low] + order[len(order) - kept + low :] for low in range(kept + 1))
        return sorted(max(cuts, key=lambda places: statistics.pvariance([rewards[place] for place in places])))


def chosen_group_selector(args: RolloutSettings) -> GroupSelector:
    return {"all": AllRollouts, "max-variance": MaxVariance}[args.rollout_selection]()
