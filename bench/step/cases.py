"""Cases of the step benchmark, the same for every trainer: prompts, rewards, and a count of the work.

Each step has new prompts, so that no trainer finds the last step's prefixes in a cache. A reward depends only on a
completion's place in its group, so that all trainers learn from the same rewards whatever they sample: every second
completion is right, and every group has a gradient, except for the dead ones of a case.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from bench.common.tables import DTYPES
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets.builtin import train_rows
from toolx_kernels.toolcall.rows import Row

REQUEST = "Here are requests that came in today. Answer the last one.\n"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of every trainer's update: GRPO as in TRL, on the policy that sampled, with AdamW."""

    learning_rate: float = 1e-6
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    loss_type: str = "grpo"
    scale_rewards: str = "group"


SETTINGS = Settings()


@dataclass(frozen=True, slots=True)
class Case:
    """One update from ``n`` completions of up to ``new`` tokens for each of ``prompts`` prompts of about ``length``."""

    model: str  # a name that load_model knows
    prompts: int = 2
    length: int = 500
    n: int = 10
    new: int = 96
    dtype: str = "float32"
    stop: bool = False  # completions end with the model's end of turn; else all of them have ``new`` tokens
    dead: float = 0.0  # share of groups whose rewards are equal
    rounds: int = 1  # timed steps, after one to warm up
    limit_s: float = 1200.0  # a trainer that needs longer for one step is given up

    @property
    def rows(self) -> int:
        return self.prompts * self.n

    @property
    def dead_groups(self) -> int:
        return round(self.dead * self.prompts)

    @property
    def steps(self) -> int:
        return 1 + self.rounds

    @property
    def group_tokens(self) -> int:
        """Tokens of the largest group, with its prompt once."""
        return math.ceil(1.04 * self.length) + self.n * self.new

    def __str__(self) -> str:
        extra = "-stop" * self.stop + f"-dead{self.dead:.0%}" * bool(self.dead)
        return f"{self.model}-{self.prompts}x{self.length}-n{self.n}-new{self.new}-{DTYPES[self.dtype]}{extra}"


def make_rows(case: Case, chat: Chat) -> list[Row]:
    """The prompts of all steps in order, ``case.prompts`` for each; their lengths in tokens spread by 4 % around
    ``case.length``, so that padding is part of the work."""
    words = [word for row in train_rows(400, seed=0) for word in row.user_text.split()]
    rows = []
    for step in range(case.steps):
        for place in range(case.prompts):
            spread = 0.96 + 0.08 * place / (case.prompts - 1) if case.prompts > 1 else 1.0
            start = random.Random(f"{step} {place}").randrange(len(words))
            text = words[start:] + words[:start]
            rows.append(_row(f"{step}-{place}", text, round(case.length * spread), chat))
    return rows


def _row(name: str, words: Sequence[str], length: int, chat: Chat) -> Row:
    """A row with as many of the words as fit a prompt of ``length`` tokens."""

    def made(count: int) -> Row:
        return Row(name, [{"role": "user", "content": REQUEST + " ".join(words[:count])}], [], [])

    low, high = 1, min(length, len(words))  # a word is at least one token
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(chat.prompt_ids(made(middle))) <= length else (low, middle - 1)
    return made(low)


@dataclass(slots=True)
class Count:
    """The work of one trainer, step by step, counted between ``begin`` and ``end`` of each step."""

    case: Case
    prompt_lengths: list[int]  # of all steps
    steps: list[dict] = field(default_factory=list)
    _processed: int = 0
    _lengths: list[int] = field(default_factory=list)
    _rewards: list[float] = field(default_factory=list)
    _began: float = 0.0
    _rewarded: float = 0.0

    def watch(self, model: PreTrainedModel) -> None:
        """Counts the tokens, padding included, of each forward pass with gradients."""

        def hook(_module, _inputs, output):
            self._processed += output.last_hidden_state[..., 0].numel() * torch.is_grad_enabled()

        model.get_decoder().register_forward_hook(hook)

    @property
    def reward(self) -> Callable:
        """The reward function, in TRL's signature: the completions come group after group."""

        def by_place(prompts, completions, completion_ids, **columns) -> list[float]:
            self._rewarded = time.perf_counter()
            self._lengths += [len(ids) for ids in completion_ids]
            rewards = [
                float(place % 2 if place // self.case.n >= self.case.dead_groups else 0)
                for place in range(len(completion_ids))
            ]
            self._rewards += rewards
            return rewards

        return by_place

    def begin(self) -> None:
        self._processed, self._lengths, self._rewards = 0, [], []
        self._began = time.perf_counter()

    def end(self) -> dict:
        """The record of the step."""
        seconds = time.perf_counter() - self._began
        case, lengths = self.case, self._lengths
        prompts = self.prompt_lengths[len(self.steps) * case.prompts :][: case.prompts]
        groups = [lengths[at : at + case.n] for at in range(0, len(lengths), case.n)]
        pairs = list(zip(prompts, groups, strict=True))
        record = {
            "step_s": seconds,
            "rollout_s": self._rewarded - self._began,
            "lengths": lengths,
            "rewards": self._rewards,
            "trained_tokens": self._processed,
            # if each completion has its own prompt; if each live group has its prompt once
            "unshared_tokens": sum(prompt * len(group) + sum(group) for prompt, group in pairs),
            "shared_tokens": sum(prompt + sum(group) for prompt, group in pairs[case.dead_groups :]),
        }
        self.steps.append(record)
        return record
