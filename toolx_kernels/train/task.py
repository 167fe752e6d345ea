"""The task of a run: rows to train and to evaluate on, their prompts, what is right and what is rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.evaluate import Judge
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.reward_runner import RewardFunctions
from toolx_kernels.toolcall.rewards import is_correct, no_think_reward
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.self_exemplify import SelfExemplifyingReward, is_answer_correct
from toolx_kernels.train.config import RewardSettings
from toolx_kernels.train.rows import digest, shared_rows


def judge_and_rewards(
    args: RewardSettings, reward_funcs: Callable | Sequence[Callable] | None
) -> tuple[Judge, RewardFunctions]:
    """What is right and what is rewarded, by default in the form that ``args`` choose."""
    if reward_funcs is None:
        reward_funcs = (
            SelfExemplifyingReward(distinct=args.distinct_examples) if args.self_exemplify else no_think_reward
        )
    rewards = RewardFunctions(reward_funcs, args.reward_weights, args.reward_timeout)
    return is_answer_correct if args.self_exemplify else is_correct, rewards


class Task:
    """What a run learns.

    Args:
        rows, eval_rows: to train and to evaluate on.
        demonstrations: more rows that demonstrations are taken from, besides ``rows``.
        prompts: of all these rows, as token ids.
        judge: whether an answer is right, which decides what is hard and what an evaluation counts.
        rewards: what rollouts earn.

    Raises:
        InputError: a row's prompt leaves no room for an answer.
    """

    def __init__(
        self,
        rows: list[Row],
        eval_rows: list[Row],
        demonstrations: Sequence[Row],
        prompts: Prompts,
        judge: Judge,
        rewards: RewardFunctions,
    ):
        prompts.check([*rows, *eval_rows])
        self.rows, self.eval_rows = rows, eval_rows
        self.prompts, self.judge, self.rewards = prompts, judge, rewards
        self.demonstrations = DemonstrationIndex.of(rows, demonstrations)
        self.eval_rows_seen = len(shared_rows(eval_rows, [*rows, *demonstrations]))
        self.digests = {
            "training rows": digest(rows),
            "rows to evaluate on": digest(eval_rows),
            "demonstrations": digest(demonstrations),
        }

    def check_same(self, run: Path, digests: dict[str, str]) -> None:
        """Raises InputError when the run was on other rows than these."""
        for name, own in self.digests.items():
            if digests[name] != own:
                raise InputError(f"{run} was run on other {name}: resume with the same, or start another run.")
