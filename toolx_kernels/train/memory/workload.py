"""Workload of a run: prompt lengths, and number of rows sampled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from toolx_kernels.errors import LOADING_ERRORS, InputError
from toolx_kernels.models.load import resolve
from toolx_kernels.models.shape import context_of
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.collect import MAX_ROLLOUTS
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations
from toolx_kernels.train.policies.retry import ShowHint
from toolx_kernels.train.rows import (
    BUILT_IN,
    BUILT_IN_EVAL_ROWS,
    BUILT_IN_TRAIN_ROWS,
    demonstration_rows,
    load_demonstrations,
    load_rows,
)
from toolx_kernels.train.task import prompts_of

MOST_SHOWN = 256  # rows whose prompts are measured with demonstrations
LARGEST_DATASET = 16 << 20  # bytes; prompts of larger files are not measured


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows and prompts of one run.

    prompt_length    tokens of the longest prompt
    shown_length     tokens of the longest prompt with the help that a hard row gets
    train_rows       rows that a probe samples
    eval_rows        rows that an evaluation samples
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
    ) -> Workload:
        """Measures the workload of these rows."""
        longest = max(len(prompts.ids(row)) for row in rows)
        shown = longest
        if args.hints:
            room, some = args.max_completion_length, rows[:MOST_SHOWN]
            hints = [(row, prompts.hint(row, share, room)) for row in some for share in ShowHint.shares]
            shown = max(longest, *(len(prompts.ids(row, (), hint)) for row, hint in hints))
        elif args.hard_sampling != "none":
            drawn = RandomDemonstrations.of(args, index, prompts)
            shown = max(longest, *(len(prompts.ids(row, drawn.draw(row, 0, 0)[0])) for row in rows[:MOST_SHOWN]))
        return cls(longest, shown, len(rows), len(eval_rows))

    @classmethod
    def assumed(cls, args: ToolExpanderConfig, prompt_length: int) -> Workload:
        """Assumes a workload for unknown rows: prompts of ``prompt_length`` tokens, demonstrations included, and as
        many rows as the config says, else the most that are ever sampled together."""
        train, held_out = (BUILT_IN_TRAIN_ROWS, BUILT_IN_EVAL_ROWS) if args.dataset in BUILT_IN else [MAX_ROLLOUTS] * 2
        return cls(prompt_length, prompt_length, args.train_rows or train, args.eval_rows or held_out)

    @classmethod
    def local(cls, args: ToolExpanderConfig, config: PreTrainedConfig) -> Workload | None:
        """Measures the run's rows, without loading weights; None unless rows and tokenizer are on this machine."""
        named = (args.dataset, args.eval_dataset, args.demonstration_dataset)
        if not all(map(_is_local, named)):
            return None
        tokenizer = _local_tokenizer(args.model) if args.model else None
        if tokenizer is None:
            return None
        rows, eval_rows = load_rows(args)
        prompts = prompts_of(args, tokenizer, context_of(config.get_text_config(decoder=True)), args.self_exemplify)
        rows, eval_rows = (prompts.fitting_rows(those, args.overlong) for those in (rows, eval_rows))
        more = load_demonstrations(args)
        index = DemonstrationIndex(demonstration_rows(rows if args.demonstrate_training_rows else (), more))
        return cls.of(args, prompts, index, rows, eval_rows)


def _is_local(dataset: str | None) -> bool:
    file = Path(dataset or "")
    return dataset is None or dataset in BUILT_IN or (file.is_file() and file.stat().st_size <= LARGEST_DATASET)


def _local_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    source = resolve(name)
    if source.kind == "tiny":
        return tiny_tokenizer()
    if source.kind not in ("folder", "adapter"):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.place)
    except LOADING_ERRORS:
        return None  # a folder with only a config can still be planned
