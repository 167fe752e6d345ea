"""Groups of rollouts that are compared with each other: planned, and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.rows import Row


class Help(NamedTuple):
    """What a prompt shows besides its row; nothing: the prompt is raw."""

    demonstrations: tuple[Row, ...] = ()
    hint: str = ""  # how the answer begins, see ``Prompts.hint``


RAW = Help()


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group that a step is to sample: rollouts that are compared with each other.

    row          index of the training row
    shown        what helps the first ``num_generations`` rollouts, the next, ...
    scored_with  what helps in the prompt on which the loss scores all of them

    >>> GroupPlan(7).shown[0].demonstrations  # raw
    ()
    """

    row: int
    shown: tuple[Help, ...] = (RAW,)
    scored_with: Help = RAW


PER_ROLLOUT = ("rollouts", "shown", "retried", "rewards", "correct", "solved")  # fields of a group


@dataclass(slots=True)
class ScoredGroup:
    """A sampled group with what its rollouts earned.

    Of every list but ``prompt``, one entry belongs to each rollout.
    """

    plan: GroupPlan
    prompt: list[int]  # on which the loss scores the rollouts
    rollouts: list[Rollout] = field(default_factory=list)
    shown: list[Help] = field(default_factory=list)  # what helped
    retried: list[bool] = field(default_factory=list)  # whether it was sampled because the first ones had failed
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # of the rewards, by function
    correct: list[bool] = field(default_factory=list)  # the calls are right, whatever stands beside them
    solved: list[bool] = field(default_factory=list)  # it earned what a solution earns, see ``Task.solved``
    advantages: list[float | list[float]] = field(default_factory=list)  # a number, or one for each token
    tries: int = 0  # retries of the whole group
    revived: bool = False  # whether one of them was solved
    retry_of: ScoredGroup | None = None  # the dead group whose retry it is, where it does not join that
    lengths: list[int] = field(default_factory=list)  # written tokens of the completions that divide the loss for it
    counted: bool = True  # whether they do beside those of all other groups

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [rollout.written for rollout in self.rollouts]

    @property
    def equal_rewards(self) -> bool:
        """Its rollouts do not tell right from wrong; compared, as the mean of equal floats may differ from them."""
        return min(self.rewards) == max(self.rewards)

    @property
    def dead(self) -> bool:
        """No rollout is solved."""
        return not any(self.solved)

    @property
    def on_policy_prompt(self) -> list[bool]:
        """Whether a rollout was sampled on ``prompt``."""
        return [shown == self.plan.scored_with for shown in self.shown]

    @property
    def first_places(self) -> list[int]:
        """Where the rollouts stand that the step planned, without retries."""
        return [place for place, again in enumerate(self.retried) if not again]

    @property
    def has_gradient(self) -> bool:
        """Whether some advantage is not 0."""
        return any(any(a) if isinstance(a, list) else a for a in self.advantages)

    def extend(self, other: ScoredGroup) -> None:
        """Takes up the rollouts of another group of the same row, scored on the same prompt."""
        assert self.prompt == other.prompt
        for name in PER_ROLLOUT:
            getattr(self, name).extend(getattr(other, name))
        for name, values in self.parts.items():
            values.extend(other.parts[name])

    def part(self, places: Sequence[int]) -> ScoredGroup:
        """The group of some of its rollouts, which also divide the loss."""
        group = replace(self, parts={name: [of[place] for place in places] for name, of in self.parts.items()})
        for name in (*PER_ROLLOUT, "advantages"):
            values = getattr(self, name)
            setattr(group, name, [values[place] for place in places] if values else [])
        group.lengths = [rollout.written for rollout in group.rollouts]
        return group
