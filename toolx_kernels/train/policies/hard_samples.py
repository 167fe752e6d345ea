"""Hard-sample policies: sampling of rows without a solved rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.hard_sampling import Attempt, HardSamples
from toolx_kernels.train.policies.demonstrators import Demonstrator, RandomDemonstrations, VerifiedDemonstrations
from toolx_kernels.train.policies.retry import PlainGRPO, Retry, ShowDemonstrations, ShowHint


class HardSamplePolicy(Protocol):
    """Decides how rows without a solved rollout are sampled."""

    @property
    def needs_probe(self) -> bool:
        """Whether the policy acts on probe results; otherwise a probe only measures."""

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        """Prepares the rows that were hard in the probe just made."""

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        """Returns the groups that a step samples for the row."""

    def retry(self, table: HardSamples, groups: Sequence[ScoredGroup]) -> list[tuple[ScoredGroup, GroupPlan]]:
        """Returns the step's groups to sample again at once, each with the plan of its retry.

        It is called repeatedly until it returns none. A group's ``tries`` counts its retries, and ``revived`` says
        whether one of their rollouts was solved. A retry with a solved rollout joins its group if both are scored on
        the same prompt, and otherwise becomes a separate group; a retry without one is dropped.
        """


@dataclass(slots=True)
class FewShot(PlainGRPO):
    """Samples hard rows with demonstrations in their prompt.

    replace  instead of the raw prompt
    add      in addition to the raw prompt, as a separate group
    distill  in addition to the raw prompt, in one group with it, and the loss scores the whole group on the raw
             prompt: the model learns the answers, not the use of demonstrations. Not in the paper.
    """

    form: str
    demonstrator: Demonstrator
    needs_probe: ClassVar[bool] = True

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        self.demonstrator.choose(table, hard, round_index)

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        shown = Help(table.demonstrations(row))
        if shown == RAW:
            return [GroupPlan(row)]
        if self.form == "distill":
            return [GroupPlan(row, (RAW, shown))]
        replaced = GroupPlan(row, (shown,), shown)
        return [replaced] if self.form == "replace" else [GroupPlan(row), replaced]


def chosen_hard_sample_policy(
    args: ToolExpanderConfig,
    index: DemonstrationIndex,
    prompts: Prompts,
    verification: Callable[[int], Attempt],
) -> HardSamplePolicy:
    """``verification``: see ``VerifiedDemonstrations``."""
    if args.hard_sampling == "none":
        return PlainGRPO()
    drawn = RandomDemonstrations.of(args, index, prompts)
    if args.hard_sampling == "retry":
        hint = partial(prompts.hint, room=args.max_completion_length)
        return Retry(ShowHint(hint) if args.hints else ShowDemonstrations(drawn), args.retry_learns)
    if args.demonstrations == "random":
        return FewShot(args.hard_sampling, drawn)
    verified = VerifiedDemonstrations(drawn, args.demonstration_tries, args.verify_rollouts, verification)
    return FewShot(args.hard_sampling, verified)
