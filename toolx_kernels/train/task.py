"""The task of a run: rows for training and evaluation, their prompts, the judge and the rewards."""

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
from toolx_kernels.train.reward_process import RewardProcess
from toolx_kernels.train.rows import demonstration_rows, digest, shared_rows

REWARDS = "reward functions"  # by name, in what a checkpoint keeps of the task
Solved = Callable[[Rewards], list[bool]]


def solved_by_default(rewards: Rewards) -> list[bool]:
    """Solved by the default reward, whatever its weight: right calls earn 1, a bonus comes on top."""
    (values,) = rewards.parts.values()
    return [value is not None and value >= 1 for value in values]


def solved_by_total(least: float, rewards: Rewards) -> list[bool]:
    """Solved by a user's reward functions: their total is at least ``least``."""
    return [total >= least for total in rewards.total]


def reward_process(args: RewardSettings) -> RewardProcess | None:
    """Starts the process of the reward functions that ``args`` name; None if they name none.

    Raises InputError: see ``RewardProcess``.
    """
    return RewardProcess(args.reward_funcs, args.reward_weights, args.reward_timeout) if args.reward_funcs else None


def judge_and_rewards(
    args: RewardSettings, reward_funcs: Callable | Sequence[Callable] | RewardProcess | None, chat: Chat
) -> tuple[Judge, RewardFunctions | RewardProcess, Solved]:
    """Returns the judge, the rewards and the test for solved rollouts. The default reward depends on ``args`` and on
    the form in which ``chat`` writes calls.

    Raises:
        InputError: the form that ``args`` asks for and the chat template's thoughts exclude each other.
    """
    form = chat.tool_format
    if args.self_exemplify and chat.conventions.opens_thought:
        raise InputError(
            "self_exemplify=True needs the examples before the thought, and the chat template opens a thought first: "
            "switch that off with chat_template_kwargs, or leave out self_exemplify."
        )
    solved = solved_by_default if reward_funcs is None else partial(solved_by_total, args.solved_reward)
    if reward_funcs is None:
        if args.thoughts == "forbidden" and chat.conventions.opens_thought:
            raise InputError(
                "thoughts='forbidden' leaves nothing to earn, as the chat template opens a thought: switch that off "
                "with chat_template_kwargs, or allow thoughts."
            )
        allowed = chat.conventions.thinks if args.thoughts == "auto" else args.thoughts == "allowed"
        if args.self_exemplify:
            reward_funcs = SelfExemplifyingReward(distinct=args.distinct_examples, tool_format=form)
        else:
            reward_funcs = {"exact": CallReward, "similarity": SimilarityReward}[args.reward](form, allowed)
    if isinstance(reward_funcs, RewardProcess):
        rewards: RewardFunctions | RewardProcess = reward_funcs
    else:
        rewards = RewardFunctions(reward_funcs, args.reward_weights, args.reward_timeout)
    return judge_of(chat, args.self_exemplify), rewards, solved


def judge_of(chat: Chat, self_exemplify: bool) -> Judge:
    """Returns the judge of answers in the form in which ``chat`` writes calls."""
    return partial(is_answer_correct if self_exemplify else is_correct, tool_format=chat.tool_format)


def prompts_of(asked: ChatSettings, tokenizer: PreTrainedTokenizerBase, context: int, self_exemplify: bool) -> Prompts:
    """Returns prompts in the form that the settings ``asked`` name, or else that of the tokenizer's chat template."""
    chat = Chat(tokenizer, asked.tool_format, asked.chat_template_kwargs, asked.date)
    return Prompts(chat, context, instructions(chat.tool_format) if self_exemplify else "")


class Task:
    """The task that a run learns.

    Args:
        rows, eval_rows: for training and for evaluation.
        demonstrations: additional rows to take demonstrations from, besides ``rows``.
        prompts: makes token ids of all these rows.
        judge: says whether the calls of an answer are right; an evaluation counts them.
        rewards: compute the rewards of rollouts.
        solved: says which rollouts are solved, given their rewards; decides which rows are hard and which groups dead.
        demonstrate_rows: whether ``rows`` may be demonstrations for one another.
        left_out: number of rows dropped because they do not fit the model's context.

    ``no_examples`` is the number of training rows that the cold start leaves out because their answers do not fit it.
    """

    no_examples = 0

    def __init__(
        self,
        rows: list[Row],
        eval_rows: list[Row],
        demonstrations: Sequence[Row],
        prompts: Prompts,
        judge: Judge,
        rewards: RewardFunctions | RewardProcess,
        solved: Solved = solved_by_default,
        left_out: int = 0,
        demonstrate_rows: bool = True,
    ):
        self.rows, self.eval_rows = rows, eval_rows
        self.prompts, self.judge, self.rewards, self.left_out = prompts, judge, rewards, left_out
        self.solved, self.own_rewards = solved, solved is not solved_by_default
        self.demonstration_rows = demonstration_rows(rows if demonstrate_rows else (), demonstrations)
        self.demonstrations = DemonstrationIndex(self.demonstration_rows)
        self.eval_rows_seen = len(shared_rows(eval_rows, [*rows, *demonstrations]))
        self.digests = {
            "training rows": digest(rows),
            "rows to evaluate on": digest(eval_rows),
            "demonstrations": digest(demonstrations),
            "prompts (chat template, its arguments, date or tokenizer)": prompts.digest([*rows, *eval_rows]),
        }
        self.reward_functions = ", ".join(rewards.names)

    def solves(self, rows: Sequence[Row], rollouts: Sequence[Rollout]) -> list[bool]:
        """Whether ``rollouts[i]`` solves ``rows[i]``."""
        return self.solved(self.rewards(rows, rollouts))

    def try_rewards(self, count: int) -> None:
        """Calls a user's reward functions once, on ``count`` completions with the first row's answer, and once on one
        with that of the first row to evaluate on, so that their mistakes show before the work.

        Raises InputError: see ``RewardFunctions``.
        """
        if not self.own_rewards:
            return
        self._try_rewards(self.rows[0], count)
        if self.eval_rows:
            self._try_rewards(self.eval_rows[0], 1)

    def _try_rewards(self, row: Row, count: int) -> None:
        chat, prompt = self.prompts.chat, self.prompts.ids(row)
        ids = chat.completion_ids(row.answer, prompt)
        text, zeros = chat.written_text(ids[:-1], prompt), [0.0] * len(ids)
        rollout = Rollout(ids, zeros, zeros, None, text, [{"role": "assistant", "content": text}], "stop")
        self.rewards([row] * count, [rollout] * count)

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must share with the original run, apart from settings."""
        return self.digests | {REWARDS: self.reward_functions}

    def check_same(self, run: Path, before: dict[str, str]) -> None:
        """Raises InputError if the run had another ``identity``: other rows, prompts or reward functions."""
        for name, own in self.digests.items():
            if before[name] != own:
                raise InputError(f"{run} was run with other {name}: resume with the same, or start another run.")
        if before[REWARDS] != self.reward_functions:
            raise InputError(
                f"{run} was run with the {REWARDS} {before[REWARDS]}, not {self.reward_functions}: resume with the "
                "same (functions that were passed in Python can only be passed there), or start another run."
            )
