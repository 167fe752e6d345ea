"""Group selectors: which rollouts of a group a step learns from."""

from __future__ import annotations

from collections.abc import Sequence
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


def chosen_group_selector(args: RolloutSettings) -> GroupSelector:
    return AllRollouts()
