"""Imitation of demonstrations: supervised steps before RL, and a supervised part of the steps of RL."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.cold_start import supervised
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.task import Task
from toolx_kernels.train.update.batch import PackedGroup
from toolx_kernels.train.update.learner import Learner

HELD_OUT = 10  # one of so many demonstrations is not imitated and tells when to stop


class Imitation:
    """Which demonstrations a step imitates, and how much that counts.

    Each demonstration is imitated once a pass, on its raw prompt, in an order of the pass's own. With ``sft_patience``
    a tenth of them never is: it tells when the supervised steps end.

    drawn   demonstrations imitated so far
    best    lowest mean negative log-prob of those held out; ``passes`` how often it was looked at since

    Raises:
        InputError: imitation is asked for and there is nothing to imitate, or another form than that of answers.
    """

    def __init__(self, args: ToolExpanderConfig, task: Task):
        self.args, self.prompts = args, task.prompts
        rows: list[Row] = []
        if args.sft_fraction or args.sft_coef:
            rows = task.prompts.fitting_rows(task.demonstration_rows, "drop", answers=True)
        random.Random(f"imitation {args.seed}").shuffle(rows)
        held_out = max(1, len(rows) // HELD_OUT) if args.sft_patience else 0
        self.held_out, self.rows = rows[:held_out], rows[held_out:]
        if (args.sft_fraction or args.sft_coef) and not self.rows:
            raise InputError(
                f"sft_fraction={args.sft_fraction} and sft_coef={args.sft_coef} imitate demonstrations, and there are "
                f"{len(rows)}: name a demonstration_dataset with more, or leave both at 0."
            )
        self.drawn = self.passes = self._looked = 0
        self.best = math.inf

    def state_dict(self) -> dict:
        best = None if math.isinf(self.best) else self.best
        return {"drawn": self.drawn, "best": best, "passes": self.passes, "looked": self._looked}

    def load_state_dict(self, state: dict) -> None:
        self.drawn, self.passes, self._looked = state["drawn"], state["passes"], state["looked"]
        self.best = math.inf if state["best"] is None else state["best"]

    # ---- supervised steps

    def leads(self, progress: float) -> bool:
        """Whether the next step is a supervised one, with this share of the run done."""
        return progress < self.args.sft_fraction and not self._stopped

    @property
    def over(self) -> bool:
        """Whether supervised steps alone were asked for and have ended."""
        return self.args.sft_fraction == 1 and self._stopped

    @property
    def _stopped(self) -> bool:
        return 0 < self.args.sft_patience <= self.passes

    def step(self, learner: Learner, number: int) -> dict[str, Any]:
        """Supervised step ``number``, an update on as many demonstrations as a step of RL has prompts; what
        ``Learner.improve`` tells, and ``held_out_loss`` once a pass."""
        learner.schedule.hold(self.args.sft_learning_rate or self.args.learning_rate)
        told = learner.improve([], number, self._draw(self.args.prompts_per_step), 1.0)
        if self.held_out and self.drawn // len(self.rows) > self._looked:
            self._looked = self.drawn // len(self.rows)
            examples = [self._example(row) for row in self.held_out]
            loss = learner.supervised_loss(examples)
            self.passes = 0 if loss < self.best else self.passes + 1
            self.best = min(self.best, loss)
            forward = sum(example.n_tokens for example in examples)
            told |= {"held_out_loss": loss, "trained_fe": told["trained_fe"] + forward}
        return told

    # ---- beside RL

    def beside(self, groups: Sequence[ScoredGroup], progress: float) -> tuple[list[PackedGroup], float]:
        """As many demonstrations as there are groups, and the weight of their loss, with this share of the run done."""
        weight = self.args.sft_coef
        if self.args.sft_decay:
            weight *= 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return (self._draw(len(groups)), weight) if weight else ([], 0.0)

    def _draw(self, count: int) -> list[PackedGroup]:
        places = range(self.drawn, self.drawn + count)
        self.drawn += count
        examples = []
        for number, place in (divmod(place, len(self.rows)) for place in places):
            order = random.Random(f"imitation {self.args.seed} {number}").sample(range(len(self.rows)), len(self.rows))
            examples.append(self._example(self.rows[order[place]]))
        return examples

    def _example(self, row: Row) -> PackedGroup:
        return supervised(self.prompts, Example(row, (), row.answer))[0]
