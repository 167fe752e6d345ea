"""Groups of rollouts that are compared with each other: planned, and scored."""

from __future__ import annotations

from dataclasses import dataclass, field

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.rows import Row


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group that a step is to sample: rollouts that are compared with each other.

    row             index of the training row
    demonstrations  those in the prompt of the first ``num_generations`` rollouts, of the next, ...
    scored_with     the demonstrations in the prompt on which the loss scores all of them

    >>> GroupPlan(7).demonstrations  # raw
    ((),)
    """

    row: int
    demonstrations: tuple[tuple[Row, ...], ...] = ((),)
    scored_with: tuple[Row, ...] = ()


@dataclass(slots=True)
class ScoredGroup:
    """A sampled group with what its rollouts earned."""

    plan: GroupPlan
    prompt: list[int]  # on which the loss scores the rollouts
    rollouts: list[Rollout]
    on_policy_prompt: list[bool]  # whether a rollout was sampled on ``prompt``
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # of the rewards, by function
    correct: list[bool] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    @property
    def equal_rewards(self) -> bool:
        """Nothing can be learned from it; decided by comparing, as the mean of equal floats may differ from them."""
        return min(self.rewards) == max(self.rewards)
