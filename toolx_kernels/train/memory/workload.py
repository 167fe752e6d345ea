"""Workload of a run: prompt lengths, and number of rows sampled together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import nlargest
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from toolx_kernels.errors import LOADING_ERRORS, InputError
from toolx_kernels.models.load import resolve
from toolx_kernels.models.shape import context_of
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.datasets.read import is_path, read_dataset
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
MOST_MEASURED = 1000  # rows whose prompts are measured; of more rows the longest
LARGEST_DATASET = 16 << 20  # bytes; prompts of larger files are not measured
ASSUMED_LENGTH = 1000  # tokens of prompts that are not measured


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
    def planned(
        cls, args: ToolExpanderConfig, config: PreTrainedConfig, prompt_length: int | None = None
    ) -> tuple[Workload, str]:
        """The workload of the run with these settings, and what of it is assumed, in words: nothing if rows and
        tokenizer are on this machine, and the rows no more than ``MOST_MEASURED``, because all are measured then.
        ``prompt_length`` is measured if it is None.

        Raises InputError for a dataset that is not there or cannot be read.
        """
        named = [name for name in (args.dataset, args.eval_dataset, args.demonstration_dataset) if name]
        away = [name for name in named if not _is_local(name)]
        if away:
            for name in named:
                if name not in away and name not in BUILT_IN:
                    read_dataset(name)
            assumed = f"{away[0]} is not read, so "
            if prompt_length is None:
                assumed += f"prompts of {ASSUMED_LENGTH:,} tokens are assumed (--prompt_length gives another number)"
            else:
                assumed += "the number of rows is assumed"
            return cls.assumed(args, prompt_length or ASSUMED_LENGTH), assumed
        rows, eval_rows = load_rows(args)
        if prompt_length is not None:
            load_demonstrations(args)
            return cls(prompt_length, prompt_length, len(rows), len(eval_rows)), ""
        tokenizer = _local_tokenizer(args.model) if args.model else None
        if tokenizer is None:
            assumed = f"the tokenizer of {args.model} is not on this machine, so prompts of {ASSUMED_LENGTH:,} tokens"
            assumed += " are assumed (--prompt_length gives another number)"
            return cls(ASSUMED_LENGTH, ASSUMED_LENGTH, len(rows), len(eval_rows)), assumed
        prompts = prompts_of(args, tokenizer, context_of(config.get_text_config(decoder=True)), args.self_exemplify)
        if args.overlong == "drop":  # the length of each row decides
            rows, eval_rows = (prompts.fitting_rows(those, "drop") for those in (rows, eval_rows))
        longest, _ = [prompts.fitting_rows(_longest(those), "error") for those in (rows, eval_rows)]
        assumed = f"of {len(rows):,} rows, the prompts of the {len(longest):,} with most characters are measured"
        more = load_demonstrations(args)
        index = DemonstrationIndex(demonstration_rows(rows if args.demonstrate_training_rows else (), more))
        work = replace(cls.of(args, prompts, index, longest, eval_rows), train_rows=len(rows))
        return work, assumed * (len(longest) < len(rows))


def _longest(rows: Sequence[Row]) -> Sequence[Row]:
    """The ``MOST_MEASURED`` rows with most characters."""
    if len(rows) <= MOST_MEASURED:
        return rows
    return nlargest(MOST_MEASURED, rows, key=lambda row: len(str(row.messages)) + len(str(row.tools)))


def _is_local(dataset: str) -> bool:
    """Whether ``dataset`` is read for a plan: all but large files, folders, and names on the hub.

    Raises InputError for a path of nothing.
    """
    if "," in dataset and not Path(dataset).exists():
        return all([_is_local(part.strip()) for part in dataset.split(",")])
    path = Path(dataset)
    if path.is_file():
        return path.stat().st_size <= LARGEST_DATASET
    if dataset in BUILT_IN or dataset.startswith(("bfcl:", "seal-tools:")) or not dataset.strip():
        return True
    if not path.exists() and (is_path(dataset) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", dataset)):
        raise InputError(
            f"there is no file {dataset}: give the path of a dataset, or its name on the Hugging Face hub."
        )
    return False


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
