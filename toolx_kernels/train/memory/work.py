"""What the rows of a run ask of its memory: the lengths of their prompts, and how many are sampled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from toolx_kernels.errors import InputError
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.collect import MAX_ROLLOUTS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.demonstrators import RandomDemonstrations
from toolx_kernels.train.rows import MADE_UP, MADE_UP_EVAL_ROWS, MADE_UP_TRAIN_ROWS

MOST_SHOWN = 256  # rows whose prompts are looked at with demonstrations


@dataclass(frozen=True, slots=True)
class Work:
    """Of one run.

    prompt_length    tokens of its longest prompt
    shown_length     of the longest one with the demonstrations that a hard row gets
    train_rows       that a probe asks
    eval_rows        that an evaluation asks
    """

    prompt_length: int
    shown_length: int
    train_rows: int
    eval_rows: int

    def __post_init__(self):
        if self.prompt_length < 1:
            raise InputError(f"prompt_length={self.prompt_length} must be at least 1 token.")

    @classmethod
    def of(
        cls,
        args: ToolExpanderConfig,
        prompts: Prompts,
        index: DemonstrationIndex,
        rows: Sequence[Row],
        eval_rows: Sequence[Row],
    ) -> Work:
        """Of these rows."""
        longest = max(len(prompts.ids(row)) for row in rows)
        shown = longest
        if args.hard_sampling != "none":
            fitting = partial(prompts.fitting, room=args.max_completion_length)
            drawn = RandomDemonstrations.of(args, index, fitting)
            shown = max(longest, *(len(prompts.ids(row, drawn.draw(row, 0, 0)[0])) for row in rows[:MOST_SHOWN]))
        return cls(longest, shown, len(rows), len(eval_rows))

    @classmethod
    def assumed(cls, args: ToolExpanderConfig, prompt_length: int) -> Work:
        """Of rows that nobody has seen: prompts of ``prompt_length`` tokens, demonstrations included, and as many as
        the config says, or else as are ever sampled together."""
        train, held_out = (MADE_UP_TRAIN_ROWS, MADE_UP_EVAL_ROWS) if args.dataset in MADE_UP else [MAX_ROLLOUTS] * 2
        return cls(prompt_length, prompt_length, args.train_rows or train, args.eval_rows or held_out)
