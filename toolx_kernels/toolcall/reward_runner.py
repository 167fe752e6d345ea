"""Reward runner for users' functions, as in TRL: several with weights, plain or async, within a time limit."""

import copy
import inspect
import itertools
import math
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from toolx_kernels.errors import InputError, name_of, short
from toolx_kernels.toolcall.background import Background, in_time, one_line, run
from toolx_kernels.toolcall.rows import Row

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127
# Advantages divide by the root of a sum of squares: those of a million rewards of this size stay far below the largest
# float32, wherever they are added up. Beyond 1e19 a square is infinite in float32, and all advantages become 0.
_LARGEST = 1e15


class Completion(Protocol):
    """The parts of a completion that reward functions receive."""

    ids: list[int]
    text: str  # for a string prompt
    messages: list[dict]  # for a conversational one


@dataclass(frozen=True, slots=True)
class Rewards:
    """The rewards of B completions.

    >>> Rewards(total=[1.5, 0.0], parts={"right": [1.0, None], "short": [0.5, None]}, unrewarded=1).total
    [1.5, 0.0]
    """

    total: list[float]  # (B) the weighted sum of the parts; a None adds nothing
    parts: dict[str, list[float | None]]  # name of a function -> (B), unweighted; None: it does not apply
    unrewarded: int  # number of completions to which no function applied; their total is 0.0


class RewardFunctions:
    """Reward functions ``f(prompts, completions, completion_ids, **columns) -> list[float | None]``, as in TRL.

    A function receives the rows' prompts, completions as strings (for a string prompt) or as lists of chat messages,
    the token ids, and ``id``, ``tools``, ``answer`` and the free columns as lists, with None where a row lacks a
    column. All are copies, one per completion, so a function may modify them. A reward of None says that the function
    does not apply.

    A function may be async, or return an awaitable: these run concurrently with each other and with the plain functions
    after them, on one event loop that lasts as long as this object (``Background``).

    The functions run in this process. A stuck one is given up at its limit; if it also holds Python's interpreter, as
    an endless regular expression does, it ends the process ``GRACE_S`` later (``Watchdog``): in a notebook, the kernel.
    Functions that are named (``ToolExpanderConfig.reward_funcs``) run in a process of their own instead.

    Args:
        funcs: one function or several; functions of the same name get a number, in ``names`` and in the parts.
        weights: one per function, None for 1.0 each; TRL's ``reward_weights``.
        timeout: seconds that each call of a function may take; None for no limit. With a limit, each plain function
            runs on a new thread, which a stuck function keeps until the process ends.

    Raises InputError for no function, one that is not callable, a number of weights that differs from that of
    functions, a weight that is not a finite float32, or a timeout that is not positive.
    """

    def __init__(
        self,
        funcs: Callable | Sequence[Callable],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.funcs: list[Any] = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        self.weights = [1.0] * len(self.funcs) if weights is None else list(weights)
        self.timeout = timeout
        if not self.funcs:
            raise InputError("reward_funcs is empty: give at least one reward function.")
        for func in self.funcs:
            if not callable(func):
                raise InputError(f"the reward function {short(func)} cannot be called: give a function.")
        self.names = _distinct([name_of(func) for func in self.funcs])
        if len(self.weights) != len(self.funcs):
            raise InputError(
                f"reward_weights has {len(self.weights)} entries for {len(self.funcs)} reward functions: give one each."
            )
        for weight, name in zip(self.weights, self.names, strict=True):
            if not _is_number(weight) or not abs(weight) <= _FLOAT32_MAX:
                raise InputError(f"the weight {short(weight)} of reward function {name!r} must be a finite number.")
        if timeout is not None and not (_is_number(timeout) and 0 < timeout <= threading.TIMEOUT_MAX):
            raise InputError(f"the reward timeout {short(timeout)} must be a positive number of seconds, or None.")
        self._background = Background("reward functions", timeout)

    def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> Rewards:
        """Returns the rewards of B completions; ``completions[i]`` was written for ``rows[i]``.

        Raises InputError, naming the function and the call, if a function raises, does not return in time, or returns a
        wrong number of rewards or a reward beyond 1e15; also if a weighted sum is.
        """
        parts: dict[str, list[float | None]] = {}
        awaited: list[tuple[str, float, Future]] = []
        try:
            for name, func in zip(self.names, self.funcs, strict=True):
                begin = time.monotonic()
                self._waits_for([name, *_running(awaited)])
                rewards = self._in_time(name, self._call(func, rows, completions), begin, rows)
                if inspect.isawaitable(rewards):
                    awaited.append((name, begin, self._background.schedule(_awaited(rewards, len(rows)))))
                else:
                    parts[name] = _checked(name, rewards, rows)
            for name, begin, future in awaited:
                self._waits_for(_running(awaited))
                parts[name] = _checked(name, self._in_time(name, future, begin, rows), rows)
        finally:
            for *_, future in awaited:
                future.cancel()
        return self._sum(rows, {name: parts[name] for name in self.names})

    def _waits_for(self, names: Sequence[str]) -> None:
        """Called before each wait, with the names of the functions that may be running; for subclasses."""

    def _call(self, func: Callable, rows: Sequence[Row], completions: Sequence[Completion]) -> Future:
        """Calls ``func``, on a thread if there is a time limit; the future holds a list or an awaitable."""
        arguments = _arguments(rows, completions)

        def call() -> Any:
            rewards = func(**arguments)
            return rewards if inspect.isawaitable(rewards) else _listed(rewards, len(rows))

        if self.timeout is not None:
            return self._background.start([call])[0]
        future: Future = Future()
        run(future, call)
        return future

    def _in_time(self, name: str, future: Future, begin: float, rows: Sequence[Row]) -> Any:
        """The result of ``future``, within ``timeout`` seconds after ``begin``."""
        if not in_time(future, begin, self.timeout):
            raise InputError(
                f"reward function {name!r} did not return within {self.timeout:g} s for {extent(rows)}: fix it or"
                " allow it more time."
            )
        try:
            return future.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including SystemExit
            raise InputError(
                f"reward function {name!r} raised {one_line(error)} for {extent(rows)}: fix it or leave it out."
            ) from error

    def _sum(self, rows: Sequence[Row], parts: dict[str, list[float | None]]) -> Rewards:
        total, unrewarded = [], 0
        for row, *rewards in zip(rows, *parts.values(), strict=True):
            given = [w * r for w, r in zip(self.weights, rewards, strict=True) if r is not None]
            value = sum(given, 0.0)
            if not abs(value) <= _LARGEST:
                raise InputError(
                    f"the weighted rewards of row {row.id!r} add up to {value:.3g}, and advantages need sums of at most"
                    f" {_LARGEST:g} in size: lower the weights."
                )
            total.append(value)
            unrewarded += not given
        return Rewards(total, parts, unrewarded)


def _running(awaited: Sequence[tuple[str, float, Future]]) -> list[str]:
    return [name for name, _, future in awaited if not future.done()]


def extent(rows: Sequence[Row]) -> str:
    """Describes the rows of a call."""
    if len(rows) == 1:
        return f"row {rows[0].id!r}"
    return f"{len(rows)} completions" + (f", the first of row {rows[0].id!r}" if rows else "")


def _checked(name: str, rewards: Any, rows: Sequence[Row]) -> list[float | None]:
    if not isinstance(rewards, list):
        raise InputError(
            f"reward function {name!r} returned {short(rewards)}: it must return a list with one reward per completion."
        )
    if len(rewards) != len(rows):
        raise InputError(
            f"reward function {name!r} returned {len(rewards)} rewards for {len(rows)} completions: it must return one"
            " per completion."
        )
    return [_number(reward, name, row) for reward, row in zip(rewards, rows, strict=True)]


async def _awaited(rewards: Awaitable, count: int) -> Any:
    return _listed(await rewards, count)


def _distinct(names: list[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidates = itertools.chain([name], (f"{name}_{n}" for n in itertools.count(2)))
        unique.append(next(candidate for candidate in candidates if candidate not in unique))
    return unique


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _arguments(rows: Sequence[Row], completions: Sequence[Completion]) -> dict:
    names = {name: None for row in rows for name in row.columns}
    return {
        "prompts": [_copy(row.prompt) for row in rows],
        "completions": [
            completion.text if isinstance(row.prompt, str) else _copy(completion.messages)
            for row, completion in zip(rows, completions, strict=True)
        ],
        "completion_ids": [list(completion.ids) for completion in completions],
        "id": [row.id for row in rows],
        "tools": [_copy(row.tools) for row in rows],
        "answer": [_copy(row.answer) for row in rows],
        **{name: _copies(name, rows) for name in names},
    }


def _copies(name: str, rows: Sequence[Row]) -> list:
    """Copies of a column's values."""
    try:
        return [_copy(row.columns.get(name)) for row in rows]
    except (Exception, SystemExit) as error:  # whatever its objects raise
        raise InputError(
            f"the column {name!r} cannot be copied for the reward functions ({one_line(error)}): give it plain data."
        ) from error


def _listed(rewards: Any, count: int) -> Any:
    """``rewards`` as a list, or unchanged if they have no order or are not iterable. A generator runs here, and raises
    here; of an endless one only the first ``count + 1`` values are taken."""
    if isinstance(rewards, str | bytes | bytearray | Mapping | Set) or _is_table(rewards):
        return rewards
    try:
        values = iter(rewards)
    except TypeError:
        return rewards
    return list(values if isinstance(rewards, Sized) else itertools.islice(values, count + 1))


def _is_table(rewards: Any) -> bool:
    """Whether iterating gives keys: in mappings of other libraries and in data frames, but not in a pandas Series."""
    return hasattr(rewards, "keys") and getattr(rewards, "ndim", 0) != 1


def _copy(value: Any) -> Any:
    """``copy.deepcopy``, three times as fast on JSON, which most columns hold."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    return value if type(value) in (str, int, float, bool) else copy.deepcopy(value)


def _number(reward: Any, name: str, row: Row) -> float | None:
    if reward is None:
        return None
    try:
        value = math.nan if isinstance(reward, str | bytes | bytearray) else float(reward)
    except (Exception, SystemExit):  # each library has its own
        value = math.nan
    if not abs(value) <= _LARGEST:
        raise InputError(
            f"reward function {name!r} gave {short(reward)} for row {row.id!r}: a reward must be a number of at most"
            f" {_LARGEST:g} in size, or None where the function does not apply."
        )
    return value
