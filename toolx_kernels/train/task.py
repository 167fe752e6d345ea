"""The task of a run: rows to train and to evaluate on, their prompts, what is right and what is rewarded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.evaluate.evaluate import Judge
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.reward_runner import RewardFunctions, Rewards
from toolx_kernels.toolcall.rewards import CallReward, SimilarityReward, is_correct
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.self_exemplify import SelfExemplifyingReward, instructions, is_answer_correct
from toolx_kernels.train.config import ChatSettings
from toolx_kernels.train.method_settings import RewardSettings
from toolx_kernels.train.named_rewards import named_rewards
from toolx_kernels.train.rows import demonstration_rows, digest, shared_rows

Solved = Callable[[Rewards], list[bool]]


def solved_by_default(rewards: Rewards) -> list[bool]:
    """By the default reward, whatever its weight: 1 is for the right calls, a bonus is beyond."""
    (values,) = rewards.parts.values()
    return [value is not None and value >= 1 for value in values]


def solved_by_total(least: float, rewards: Rewards) -> list[bool]:
    """By a user's reward functions."""
    return [total >= least for total in rewards.total]


def judge_and_rewards(
    args: RewardSettings, reward_funcs: Callable | Sequence[Callable] | None, chat: Chat
) -> tuple[Judge, RewardFunctions, Solved]:
    """What is right, what is rewarded and what counts as solved; by default in the form that ``args`` choose and
    ``chat`` writes calls in."""
    form = chat.tool_format
    if args.reward_funcs:
        reward_funcs = named_rewards(args.reward_funcs)
    if args.self_exemplify and chat.conventions.opens_thought:
        raise InputError(
            "self_exemplify=True wants the examples before the thought, and the chat template opens a thought first: "
            "tell it not to with chat_template_kwargs, or leave self_exemplify out."
        )
    solved = solved_by_default if reward_funcs is None else partial(solved_by_total, args.solved_reward)
    if reward_funcs is None:
        if args.thoughts == "forbidden" and chat.conventions.opens_thought:
            raise InputError(
                "thoughts='forbidden' leaves nothing to earn, as the chat template opens a thought: tell it not to "
                "with chat_template_kwargs, or allow thoughts."
            )
        allowed = chat.conventions.thinks if args.thoughts == "auto" else args.thoughts == "allowed"
        if args.self_exemplify:
            reward_funcs = SelfExemplifyingReward(distinct=args.distinct_examples, tool_format=form)
        else:
            reward_funcs = {"exact": CallReward, "similarity": SimilarityReward}[args.reward](form, allowed)
    rewards = RewardFunctions(reward_funcs, args.reward_weights, args.reward_timeout)
    return judge_of(chat, args.self_exemplify), rewards, solved


def judge_of(chat: Chat, self_exemplify: bool) -> Judge:
    """What is right, in the form in which ``chat`` writes calls."""
    return partial(is_answer_correct if self_exemplify else is_correct, tool_format=chat.tool_format)


def prompts_of(asked: ChatSettings, tokenizer: PreTrainedTokenizerBase, context: int, self_exemplify: bool) -> Prompts:
    """Prompts in the form that is ``asked`` for or that the tokenizer's chat template wants."""
    chat = Chat(tokenizer, asked.tool_format, asked.chat_template_kwargs, asked.date)
    return Prompts(chat, context, instructions(chat.tool_format) if self_exemplify else "")


class Task:
    """What a run learns.

    Args:
        rows, eval_rows: to train and to evaluate on.
        demonstrations: more rows that demonstrations are taken from, besides ``rows``.
        prompts: of all these rows, as token ids.
        judge: whether the calls of an answer are right, which an evaluation counts.
        rewards: what rollouts earn.
        solved: which rollouts are solved, given what they earned, which decides what is hard and what is dead.
        demonstrate_rows: whether ``rows`` may be demonstrations for one another.
        left_out: how many rows do not fit the model's context, and are not among these.
    """

    def __init__(
        self,
        rows: list[Row],
        eval_rows: list[Row],
        demonstrations: Sequence[Row],
        prompts: Prompts,
        judge: Judge,
        rewards: RewardFunctions,
        solved: Solved = solved_by_default,
        left_out: int = 0,
        demonstrate_rows: bool = True,
    ):
        self.rows, self.eval_rows = rows, eval_rows
        self.prompts, self.judge, self.rewards, self.left_out = prompts, judge, rewards, left_out
        self.solved = solved
        self.demonstration_rows = demonstration_rows(rows if demonstrate_rows else (), demonstrations)
        self.demonstrations = DemonstrationIndex(self.demonstration_rows)
        self.eval_rows_seen = len(shared_rows(eval_rows, [*rows, *demonstrations]))
        self.digests = {
            "training rows": digest(rows),
            "rows to evaluate on": digest(eval_rows),
            "demonstrations": digest(demonstrations),
            "prompts (chat template, its arguments, date or tokenizer)": prompts.digest([*rows, *eval_rows]),
        }

    def solves(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether ``rollouts[i]`` solves ``rows[i]``."""
        return self.solved(self.rewards(rows, rollouts))

    def check_same(self, run: Path, digests: dict[str, str]) -> None:
        """Raises InputError when the run was on other rows than these."""
        for name, own in self.digests.items():
            if digests[name] != own:
                raise InputError(f"{run} was run on other {name}: resume with the same, or start another run.")
