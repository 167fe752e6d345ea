"""Sequences: completions in progress, made from the checked prompts of a call."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from toolx_kernels.engine.pool_size import pages_of
from toolx_kernels.engine.types import Completion, SamplingParams
from toolx_kernels.errors import InputError, short
from toolx_kernels.settings import between, check_number

MOST_SEQUENCES = 1 << 20  # of one call; one costs about 700 bytes besides its tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a prompt. ``stream``, (seed, step, row id, rollout index), selects its random numbers."""

    group: int  # index of its prompt in the call
    prompt: list[int]
    limit: int  # upper limit of its new tokens
    stream: tuple[int, int, int, int]
    completion: Completion = field(default_factory=Completion)
    pages: list[int] = field(default_factory=list)


class Capacity(NamedTuple):
    """The limits of a model and its page pool."""

    vocab_size: int
    context: int  # tokens
    page_size: int  # tokens
    max_pages: int | None


def sequences_of(
    prompts: abc.Sequence[abc.Sequence[int]],
    n: int,
    params: SamplingParams,
    capacity: Capacity,
    *,
    seed: int,
    step: int,
    row_ids: abc.Sequence[int] | None,
    first_rollout: int | abc.Sequence[int],
    limits: abc.Sequence[int] | None,
) -> list[list[Sequence]]:
    """``n`` sequences for each prompt. Arguments and errors are those of ``RolloutEngine.generate``."""
    n = check_number("n", n, between(1, MOST_SEQUENCES))
    if not isinstance(params, SamplingParams):
        raise InputError(f"params is {short(params)}: pass SamplingParams(max_new_tokens=...).")
    given = _listed("prompts", prompts, "a list of prompts, each a list of token ids")
    tokens = [_integers(f"prompt {i}", ids, "a list of token ids") for i, ids in enumerate(given)]
    if n * len(tokens) > MOST_SEQUENCES:
        raise InputError(
            f"n={n} completions of {len(tokens)} prompts are {n * len(tokens):,}: sample at most {MOST_SEQUENCES:,} in "
            "one call."
        )
    rows = list(range(len(tokens))) if row_ids is None else _integers("row_ids", row_ids, "a list of whole numbers")
    firsts: list[Any] = [first_rollout] * len(tokens)
    if hasattr(first_rollout, "__len__"):
        firsts = _integers("first_rollout", first_rollout, "a whole number or a list of them")
    most = [params.max_new_tokens] * len(tokens)
    if limits is not None:
        most = _integers("limits", limits, "a list of whole numbers")
        if wrong := [limit for limit in most if type(limit) is not int]:
            raise InputError(f"limits holds {short(wrong[0])}: give a list of whole numbers.")
    for name, values in (("row_ids", rows), ("first_rollout", firsts), ("limits", most)):
        if len(values) != len(tokens):
            raise InputError(f"{len(values)} {name} for {len(tokens)} prompts: give one for each.")
    most = [
        min(limit, params.max_new_tokens, capacity.context - len(ids)) for ids, limit in zip(tokens, most, strict=True)
    ]
    words: dict[str, abc.Iterable[int]] = {"seed": [seed], "step": [step], "row id": rows, "first_rollout": firsts}
    _check_streams(words)
    _check_streams({"last_rollout": (first + n - 1 for first in firsts)})
    for token in params.stop_token_ids:
        if not 0 <= token < capacity.vocab_size:
            raise InputError(
                f"stop token {token} is outside the vocabulary of {capacity.vocab_size}: remove it, because it cannot "
                "be sampled."
            )
    groups = []
    for place, (ids, limit, row, first) in enumerate(zip(tokens, most, rows, firsts, strict=True)):
        _check_prompt(f"Prompt {place} (row {row})", ids, limit, capacity)
        groups.append([Sequence(place, ids, limit, (seed, step, row, first + i)) for i in range(n)])
    return groups


def _check_streams(words: dict[str, abc.Iterable[int]]) -> None:
    for name, given in words.items():
        for word in given:
            if not (type(word) is int and 0 <= word < 2**32):
                raise InputError(
                    f"{name}={short(word)} must be a whole number from 0 to 2**32 - 1, because it is a seed."
                )


def _check_prompt(name: str, ids: list[int], limit: int, capacity: Capacity) -> None:
    vocab_size, context, page_size, max_pages = capacity
    if not ids:
        raise InputError(f"{name} is empty: give it at least one token.")
    if not (_all_int(ids) and min(ids) >= 0 and max(ids) < vocab_size):
        bad = [token for token in ids if not (type(token) is int and 0 <= token < vocab_size)]
        raise InputError(
            f"{name} holds token id {short(bad[0])}, outside the vocabulary of {vocab_size}: ids are whole numbers."
        )
    if len(ids) >= context:
        raise InputError(f"{name} has {len(ids)} tokens, but the model's context is {context}: shorten it.")
    if limit < 1:
        raise InputError(f"{name} has a limit of {limit} tokens: it must be at least 1.")
    needed = pages_of(len(ids), limit, page_size)
    if max_pages is not None and needed > max_pages:
        raise InputError(
            f"{name} with {len(ids)} tokens needs {needed} pages of {page_size} tokens, but max_pages is {max_pages}: "
            "raise it or shorten the prompt."
        )


def _listed(name: str, values: Any, wanted: str) -> list:
    """The items of a list, an array or a tensor. Raises InputError for anything else."""
    try:
        if hasattr(values, "tolist"):
            values = values.tolist()
        elif isinstance(values, abc.Iterable) and not isinstance(values, str | bytes | abc.Mapping | abc.Set):
            values = list(values)
    except (TypeError, RuntimeError):  # a tensor without values
        pass
    if not isinstance(values, list):
        raise InputError(f"{name} is {short(values)}: give {wanted}.")
    return values


def _integers(name: str, values: Any, wanted: str) -> list[int]:
    """The same, with Python numbers in place of arrays and tensors of one number."""
    values = _listed(name, values, wanted)
    return values if _all_int(values) else list(map(_plain, values))


def _plain(value: Any) -> Any:
    try:
        return value.item() if hasattr(value, "item") else value
    except (ValueError, RuntimeError):  # it holds no single number
        return value


def _all_int(values: list) -> bool:
    """Whether all values are ints; without a Python loop, because a call may have a hundred thousand."""
    return set(map(type, values)) <= {int}
