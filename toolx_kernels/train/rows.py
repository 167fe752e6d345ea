"""Rows for training and evaluation, loaded by dataset name."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets import builtin, builtin_facts, builtin_turns
from toolx_kernels.toolcall.datasets.read import read_dataset
from toolx_kernels.toolcall.rows import Row, with_calls
from toolx_kernels.train.config import DataSettings, ToolExpanderConfig

# tasks that need no data, by name
BUILT_IN = {"builtin": builtin, "builtin-turns": builtin_turns, "builtin-facts": builtin_facts}
BUILT_IN_TRAIN_ROWS = 640
BUILT_IN_EVAL_ROWS = 480
MOST_BUILT_IN_ROWS = 100_000  # a row takes 4 to 6 KiB


def load_rows(config: ToolExpanderConfig) -> tuple[list[Row], list[Row]]:
    """Loads the training and held-out rows that the config names.

    A built-in task generates both; from any other dataset ``eval_fraction`` of the rows is held out unless
    ``eval_dataset`` is given.

    Raises:
        InputError: a dataset cannot be read, or leaves no rows for training or evaluation.
    """
    dataset = config.dataset or "builtin"
    if built_in := BUILT_IN.get(dataset):
        train = built_in.train_rows(_few("train_rows", config.train_rows or BUILT_IN_TRAIN_ROWS), config.seed)
    else:
        train = _read(dataset)
    if config.calls is not None:
        train = with_calls(train, config.calls)
    if config.eval_dataset is not None:
        held_out = load_eval_rows(config.eval_dataset)
    elif built_in:
        held_out = load_eval_rows(dataset, config.eval_rows)
    else:
        train, held_out = split_rows(train, config.eval_fraction)
    return some_rows(train, config.train_rows, config.seed), some_rows(held_out, config.eval_rows)


def load_eval_rows(dataset: str, count: int | None = None) -> list[Row]:
    """Loads ``count`` rows of a dataset (default: all), or held-out rows of a built-in task, always the same."""
    if built_in := BUILT_IN.get(dataset):
        return built_in.heldout_rows(_few("eval_rows", count or BUILT_IN_EVAL_ROWS), seed=0)
    return some_rows(_read(dataset), count)


def load_demonstrations(config: DataSettings) -> list[Row]:
    """Loads additional rows for demonstrations: ``demonstration_dataset``, else those that come with the task."""
    dataset = config.demonstration_dataset
    if dataset in BUILT_IN:
        raise InputError(f"demonstration_dataset={dataset} holds the evaluation rows of {dataset}: name a file.")
    if dataset is None and config.dataset == "builtin-facts":
        return builtin_facts.documentation()
    return read_dataset(dataset) if dataset else []


def demonstration_rows(rows: Sequence[Row], more: Sequence[Row]) -> list[Row]:
    """Returns ``rows`` plus those of ``more`` whose ids are not among theirs."""
    ids = {row.id for row in rows}
    return [*rows, *(row for row in more if row.id not in ids)]


def _few(name: str, count: int) -> int:
    if count > MOST_BUILT_IN_ROWS:
        raise InputError(f"{name}={count}: a built-in task generates at most {MOST_BUILT_IN_ROWS:,} rows.")
    return count


def _read(dataset: str) -> list[Row]:
    for name in dataset.split(","):
        if name.strip() in BUILT_IN:
            raise InputError(f"{name.strip()} in {dataset!r} is generated for each run: name it alone.")
    return read_dataset(dataset)


def _content(row: Row) -> str:
    return json.dumps([row.messages, row.tools, row.answer], sort_keys=True)


def digest(rows: Sequence[Row]) -> str:
    """Returns a hash of these rows in this order."""
    state = hashlib.sha256()
    for row in rows:
        state.update(f"{row.id}\n{_content(row)}\n".encode())
    return state.hexdigest()


def shared_rows(rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
    """Returns those of ``rows`` whose content also occurs in ``others``."""
    contents = {_content(row) for row in others}
    return [row for row in rows if _content(row) in contents]


def split_rows(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Splits rows into (train, held out) by their content alone.

    So the split of a row does not depend on the rest of the dataset or its place, and equal rows are on one side.
    """

    def place(row: Row) -> float:
        return int.from_bytes(hashlib.sha256(_content(row).encode()).digest()[:8], "big") / 2**64

    held_out = [row for row in rows if place(row) < fraction]
    train = [row for row in rows if place(row) >= fraction]
    if not train or not held_out:
        raise InputError(
            f"A dataset of {len(rows)} rows leaves {len(train)} for training and {len(held_out)} for evaluation at "
            f"eval_fraction={fraction}: give more rows, another fraction, or an eval_dataset."
        )
    return train, held_out


def some_rows(rows: list[Row], count: int | None, seed: int = 0) -> list[Row]:
    """Returns ``count`` random rows in their order (default: all); the same for the same seed."""
    if count is None or count >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(f"rows {seed}").sample(range(len(rows)), count))]
