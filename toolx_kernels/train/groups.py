"""Groups of rollouts that are compared with each other: plans, and scored groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.rows import Row


class Help(NamedTuple):
    """What a prompt shows in addition to its row; if nothing, the prompt is raw."""

    demonstrations: tuple[Row, ...] = ()
    hint: str = ""  # the beginning of the answer, see ``Prompts.hint``


RAW = Help()


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group that a step is to sample: rollouts that are compared with each other.

    row          index of the training row
    shown        help for the first ``num_generations`` rollouts, for the next, ...
    scored_with  help in the prompt on which the loss scores all rollouts

    >>> GroupPlan(7).shown[0].demonstrations  # raw
    ()
    """

    row: int
    shown: tuple[Help, ...] = (RAW,)
    scored_with: Help = RAW


PER_ROLLOUT = ("rollouts", "shown", "retried", "rewards", "correct", "solved")  # fields of a group


@dataclass(slots=True)
class ScoredGroup:
    """A sampled group with the rewards of its rollouts.

    Every list except ``prompt`` has one entry per rollout.
    """

    plan: GroupPlan
    prompt: list[int]  # on which the loss scores the rollouts
    rollouts: list[Rollout] = field(default_factory=list)
    shown: list[Help] = field(default_factory=list)  # the help in its prompt
    retried: list[bool] = field(default_factory=list)  # whether it was sampled because the first draws had failed
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # of the rewards, by function
    correct: list[bool] = field(default_factory=list)  # the calls are right, whatever other text there is
    solved: list[bool] = field(default_factory=list)  # its reward is that of a solution, see ``Task.solved``
    advantages: list[float | list[float]] = field(default_factory=list)  # one number, or one per token
    least_std: float = 0.0  # took the place of its rewards' smaller standard deviation; 0: none did
    tries: int = 0  # retries of the whole group
    revived: bool = False  # whether a rollout of a retry was solved
    retry_of: ScoredGroup | None = None  # the dead group that this one retries without joining it
    lengths: list[int] = field(default_factory=list)  # written tokens of the completions that divide its loss
    counted: bool = True  # whether ``lengths`` count among those of all groups

    def __post_init__(self) -> None:
        self.lengths = self.lengths or [rollout.written for rollout in self.rollouts]

    @property
    def equal_rewards(self) -> bool:
        """Whether all rewards are equal; compares min and max, as the mean of equal floats may differ from them."""
        return min(self.rewards) == max(self.rewards)

    @property
    def dead(self) -> bool:
        """Whether no rollout is solved."""
        return not any(self.solved)

    @property
    def on_policy_prompt(self) -> list[bool]:
        """Whether each rollout was sampled on ``prompt``."""
        return [shown == self.plan.scored_with for shown in self.shown]

    @property
    def first_places(self) -> list[int]:
        """Indices of the first draws, without retries."""
        return [place for place, again in enumerate(self.retried) if not again]

    @property
    def has_gradient(self) -> bool:
        """Whether some advantage is not 0."""
        return any(any(a) if isinstance(a, list) else a for a in self.advantages)

    def extend(self, other: ScoredGroup) -> None:
        """Adds the rollouts of another group of the same row, scored on the same prompt."""
        assert self.prompt == other.prompt
        for name in PER_ROLLOUT:
            getattr(self, name).extend(getattr(other, name))
        for name, values in self.parts.items():
            values.extend(other.parts[name])

    def part(self, places: Sequence[int]) -> ScoredGroup:
        """Returns the group with only these rollouts, which also divide its loss."""
        group = replace(self, parts={name: [of[place] for place in places] for name, of in self.parts.items()})
        for name in (*PER_ROLLOUT, "advantages"):
            values = getattr(self, name)
            setattr(group, name, [values[place] for place in places] if values else [])
        group.lengths = [rollout.written for rollout in group.rollouts]
        return group
