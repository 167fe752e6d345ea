"""Hard-sample policies: what is sampled for rows without a solved rollout."""

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
    """What happens to rows without a solved rollout."""

    @property
    def needs_probe(self) -> bool:
        """Whether it acts on what a probe finds; otherwise a probe only measures."""

    def start_round(self, table: HardSamples, hard: Sequence[int], round_index: int) -> None:
        """Prepares the rows that a probe has just found hard."""

    def groups(self, table: HardSamples, row: int) -> list[GroupPlan]:
        """The groups that a step samples for the row."""

    def retry(self, table: HardSamples, groups: Sequence[ScoredGroup]) -> list[tuple[ScoredGroup, GroupPlan]]:
        """Those of a step's groups that it samples again at once, each with what is sampled.

        It is asked again after that, until it names none; a group's ``tries`` tell how often it was named, and
        ``revived`` whether any of these rollouts was solved. Then they join the group, where both are scored on the
        same prompt, and are a further group otherwise; a retry without a solved rollout is left out.
        """


@dataclass(slots=True)
class FewShot(PlainGRPO):
    """Hard rows are sampled with demonstrations in their prompt.

    replace  instead of the raw prompt
    add      besides the raw prompt, as a group of its own
    distill  besides the raw prompt, in one group with it, and the loss scores all of it on the raw prompt: the
             demonstrations' help goes into the weights instead of into the use of demonstrations. Beyond the paper.
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
