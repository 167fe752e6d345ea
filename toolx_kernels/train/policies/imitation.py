"""Imitation of demonstrations: supervised steps before RL, and a supervised part of RL steps."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.cold_start import supervised
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.task import Task
from toolx_kernels.train.update.batch import PackedGroup, tokens_of
from toolx_kernels.train.update.learner import Learner

HELD_OUT = 10  # one in this many demonstrations is held out to decide when to stop
STATE = ("drawn", "best", "passes", "looked", "ended")


class Imitation:
    """Chooses the demonstrations that a step imitates, and the weight of their loss.

    Each pass imitates every demonstration once, on its raw prompt, in a new order. With ``sft_patience`` a tenth of
    them is held out: its loss decides when the supervised steps end.

    drawn   demonstrations imitated so far
    best    lowest mean negative log-prob of the held-out ones
    passes  checks of the held-out ones since then
    ended   whether the supervised steps have ended

    Raises InputError: imitation is switched on and there is nothing to imitate.
    """

    def __init__(self, args: ToolExpanderConfig, task: Task):
        self.args, self.prompts = args, task.prompts
        rows = task.prompts.fitting_rows(task.demonstration_rows, "drop", answers=True) if args.imitates else []
        random.Random(f"imitation {args.seed}").shuffle(rows)
        held_out = max(1, len(rows) // HELD_OUT) if args.sft_patience else 0
        self.held_out, self.rows = rows[:held_out], rows[held_out:]
        if args.imitates and not self.rows:
            raise InputError(
                f"sft_fraction={args.sft_fraction} and sft_coef={args.sft_coef} imitate demonstrations, and there are "
                f"{len(rows)}: name a demonstration_dataset with more, or leave both at 0."
            )
        self.drawn = self.passes = self.looked = 0
        self.best: float | None = None
        self.ended = not args.sft_fraction

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: dict) -> None:
        for name in STATE:
            setattr(self, name, state[name])

    # ---- supervised steps

    @property
    def over(self) -> bool:
        """Whether the run consists of supervised steps only and they have ended."""
        return self.ended and self.args.sft_fraction == 1

    def end(self, progress: float) -> None:
        """Ends the supervised steps for good once their share of the run, or their patience, is used up; a larger
        budget later does not bring them back."""
        self.ended |= progress >= self.args.sft_fraction or 0 < self.args.sft_patience <= self.passes

    def step(self, learner: Learner, number: int) -> dict[str, Any]:
        """Runs supervised step ``number``: one update on as many demonstrations as an RL step has prompts. Returns the
        metrics of ``Learner.improve``, plus ``held_out_loss`` once a pass."""
        learner.schedule.hold(self.args.sft_learning_rate or self.args.learning_rate)
        told = learner.improve([], number, self._draw(self.args.prompts_per_step), 1.0)
        if self.held_out and self.drawn // len(self.rows) > self.looked:
            self.looked = self.drawn // len(self.rows)
            examples = [self._example(row) for row in self.held_out]
            loss = learner.supervised_loss(examples)
            better = self.best is None or loss < self.best
            self.passes, self.best = (0, loss) if better else (self.passes + 1, self.best)
            told |= {"held_out_loss": loss, "trained_fe": told["trained_fe"] + tokens_of(examples)}
        return told

    # ---- in RL steps

    def beside(self, groups: Sequence[ScoredGroup], progress: float) -> tuple[list[PackedGroup], float]:
        """Returns one demonstration per group, and the weight of their loss at this ``progress`` (share) of the run."""
        weight = self.args.sft_coef
        if self.args.sft_decay:
            weight *= 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return (self._draw(len(groups)), weight) if weight else ([], 0.0)

    def _draw(self, count: int) -> list[PackedGroup]:
        examples = []
        for number, places in groupby(range(self.drawn, self.drawn + count), lambda place: place // len(self.rows)):
            order = random.Random(f"imitation {self.args.seed} {number}").sample(self.rows, len(self.rows))
            examples += [self._example(order[place % len(self.rows)]) for place in places]
        self.drawn += count
        return examples

    def _example(self, row: Row) -> PackedGroup:
        return supervised(self.prompts, Example(row, (), row.answer))[0]
