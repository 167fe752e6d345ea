"""Calling the reward functions that users bring, as TRL would: several with weights, plain or async, within a time."""

import asyncio
import concurrent.futures
import copy
import inspect
import itertools
import math
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.rows import Row, short

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class Completion(Protocol):
    """What a reward function is told of a completion."""

    ids: list[int]
    text: str  # for a string prompt
    messages: list[dict]  # for a conversational one


@dataclass(frozen=True, slots=True)
class Rewards:
    """What the functions gave to B completions.

    >>> Rewards(total=[1.5, 0.0], parts={"right": [1.0, None], "short": [0.5, None]}, unrewarded=1)
    ... # doctest: +SKIP
    """

    total: list[float]  # (B) the weighted sum of the parts; a None adds nothing
    parts: dict[str, list[float | None]]  # (B) for each function by its name, unweighted; None: it does not apply
    unrewarded: int  # completions to which no function applied; their total is 0.0


class RewardFunctions:
    """Reward functions in TRL's signature, `f(prompts, completions, completion_ids, **columns) -> list[float | None]`.

    A function gets prompts as the rows have them, completions as strings (for a string prompt) or as lists of chat
    messages, the token ids, and `id`, `tools`, `answer` and the free columns as lists; a column that a row lacks is
    None there. All are copies, one per completion, so what a function does to them stays its own. A reward of None says
    that the function does not apply.

    A function may be async, or return an awaitable: these run concurrently with each other and with the plain functions
    after them, on one event loop that is kept as long as this object, so that their clients' connections stay usable.
    That loop has a thread of its own: the caller may be within another loop, as in a notebook.

    Args:
        funcs: one function or several; those of one name are told apart by a number, in `names` and in the parts.
        weights: one per function, None for 1.0 each; TRL's `reward_weights`.
        timeout: seconds that each call of a function may take; None for no limit. With a limit, plain functions run on
            daemon threads: one that is stuck goes on until the process ends, but does not keep it from ending.

    Raises InputError for no function, one that cannot be called, another number of weights than of functions, a weight
    that is no finite float32, or a timeout that is not positive.
    """

    def __init__(
        self,
        funcs: Callable | Sequence[Callable],
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.funcs = list(funcs) if isinstance(funcs, list | tuple) else [funcs]
        self.weights = [1.0] * len(self.funcs) if weights is None else list(weights)
        self.timeout = timeout
        if not self.funcs:
            raise InputError("reward_funcs is empty; give at least one reward function")
        for func in self.funcs:
            if not callable(func):
                raise InputError(f"the reward function {short(func)} cannot be called; give a function")
        self.names = _distinct([getattr(func, "__name__", type(func).__name__) for func in self.funcs])
        if len(self.weights) != len(self.funcs):
            raise InputError(
                f"reward_weights has {len(self.weights)} entries for {len(self.funcs)} reward functions; give one each"
            )
        for weight, name in zip(self.weights, self.names, strict=True):
            if not _is_number(weight) or not abs(weight) <= _FLOAT32_MAX:
                raise InputError(f"the weight {short(weight)} of reward function {name!r} must be a finite number")
        if timeout is not None and not (_is_number(timeout) and 0 < timeout <= threading.TIMEOUT_MAX):
            raise InputError(f"the reward timeout {short(timeout)} must be a positive number of seconds, or None")

    def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> Rewards:
        """The rewards of `completions[i]`, written for `rows[i]`.

        Raises InputError, naming the function, when it raises or does not return in time (and the rows on which it does
        so, where calling it for each alone tells, within the same time again), when it returns another number of
        rewards than it got completions, or a reward that is no finite float32; and when a weighted sum is none.
        """
        parts: dict[str, list[float | None]] = {}
        awaited: list[tuple[str, Callable, float, Future]] = []
        try:
            for name, func in zip(self.names, self.funcs, strict=True):
                begin = time.monotonic()
                future = self._begin(func, rows, completions, self.timeout)
                if future.done() or self._left(begin) == 0:
                    parts[name] = self._finish(name, func, begin, future, rows, completions)
                else:
                    awaited.append((name, func, begin, future))
            for name, *rest in awaited:
                parts[name] = self._finish(name, *rest, rows, completions)
        finally:
            for *_, future in awaited:
                future.cancel()
        return self._sum(rows, {name: parts[name] for name in self.names})

    def _begin(
        self, func: Callable, rows: Sequence[Row], completions: Sequence[Completion], limit: float | None
    ) -> Future:
        """What `func` returns or raises: at hand, unless it is being awaited or does not return within the limit."""
        arguments = _arguments(rows, completions)
        future: Future = Future()
        future.set_running_or_notify_cancel()  # a plain call cannot be cancelled

        def call() -> None:
            try:
                rewards = func(**arguments)
                future.set_result(rewards if inspect.isawaitable(rewards) else _listed(rewards))
            except BaseException as error:
                future.set_exception(error)

        if limit is None:
            call()
        else:
            threading.Thread(target=call, name="reward function", daemon=True).start()
            concurrent.futures.wait([future], limit)
        if future.done() and future.exception() is None and inspect.isawaitable(future.result()):
            return asyncio.run_coroutine_threadsafe(_awaited(future.result()), self._loop)
        return future

    def _finish(
        self, name: str, func: Callable, begin: float, future: Future, rows: Sequence[Row],
        completions: Sequence[Completion],
    ) -> list[float | None]:  # fmt: skip
        concurrent.futures.wait([future], self._left(begin))
        if not future.done():
            where = self._culprits(func, rows, completions, stuck=True)
            raise InputError(
                f"reward function {name!r} did not return within {self.timeout:g} s{where}; mend it or allow it more"
                " time"
            )
        try:
            rewards = future.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit too
            where = self._culprits(func, rows, completions, stuck=False)
            reason = ": ".join(filter(None, (type(error).__name__, str(error).strip().partition("\n")[0])))
            raise InputError(f"reward function {name!r} raised {reason}{where}; mend it or leave it out") from error
        if not isinstance(rewards, list):
            raise InputError(
                f"reward function {name!r} returned {short(rewards)}; it must return a list with one reward per"
                " completion"
            )
        if len(rewards) != len(completions):
            raise InputError(
                f"reward function {name!r} returned {len(rewards)} rewards for {len(completions)} completions; it must"
                " return one per completion"
            )
        return [_number(reward, name, row) for reward, row in zip(rewards, rows, strict=True)]

    def _culprits(self, func: Callable, rows: Sequence[Row], completions: Sequence[Completion], stuck: bool) -> str:
        """Names the rows on which `func`, called for them alone, is stuck or else raises, unless it is all of several.

        All of that gets the time of one call. Stuck is what takes more than half of it: of many slow rows, the last
        would otherwise be named for being the last.
        """
        begin = time.monotonic()
        trials = []
        for row, completion in zip(rows, completions, strict=True):
            if (left := self._left(begin)) == 0:
                break
            trials.append((row.id, time.monotonic(), self._begin(func, [row], [completion], left)))
        concurrent.futures.wait([future for *_, future in trials], self._left(begin))
        end = time.monotonic()
        found = []
        for row_id, tried, future in trials:
            if not future.done():
                future.cancel()
                if stuck and end - tried > self.timeout / 2:
                    found.append(row_id)
            elif not stuck and (future.cancelled() or future.exception() is not None):
                found.append(row_id)
        if not found or len(found) == len(rows) > 1:
            return ""
        ids = list(dict.fromkeys(found))
        shown = ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
        return f" on row{'s' if len(ids) > 1 else ''} {shown}"

    def _left(self, begin: float) -> float | None:
        """Seconds left of the limit since `begin`."""
        return None if self.timeout is None else max(0.0, begin + self.timeout - time.monotonic())

    def _sum(self, rows: Sequence[Row], parts: dict[str, list[float | None]]) -> Rewards:
        total, unrewarded = [], 0
        for row, *rewards in zip(rows, *parts.values(), strict=True):
            given = [w * r for w, r in zip(self.weights, rewards, strict=True) if r is not None]
            value = sum(given, 0.0)
            if not abs(value) <= _FLOAT32_MAX:
                raise InputError(
                    f"the weighted rewards of row {row.id!r} add up to {value:.3g}, which is no float32; lower the"
                    " weights"
                )
            total.append(value)
            unrewarded += not given
        return Rewards(total, parts, unrewarded)

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name="reward functions", daemon=True).start()
        weakref.finalize(self, loop.call_soon_threadsafe, loop.stop)
        return loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_cancel_all())
    finally:
        loop.close()


async def _cancel_all() -> None:
    """Lets what a timeout has cancelled end before the loop does."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def _awaited(rewards: Awaitable) -> Any:
    return _listed(await rewards)


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
        **{name: [_copy(row.columns.get(name)) for row in rows] for name in names},
    }


def _listed(rewards: Any) -> Any:
    """`rewards` as a list, itself where it cannot be iterated over; a generator runs here, and raises here."""
    try:
        values = iter(rewards)
    except TypeError:
        return rewards
    return list(values)


def _copy(value: Any) -> Any:
    """`copy.deepcopy`, three times as fast on JSON, which is what columns mostly hold."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy(item) for item in value]
    return value if type(value) in (str, int, float, bool) else copy.deepcopy(value)


def _number(reward: object, name: str, row: Row) -> float | None:
    if reward is None:
        return None
    try:
        value = math.nan if isinstance(reward, str) else float(reward)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not abs(value) <= _FLOAT32_MAX:
        raise InputError(
            f"reward function {name!r} gave {short(reward)} for row {row.id!r}; a reward is a finite float32, at most"
            f" {_FLOAT32_MAX:.2g} in size, or None where the function does not apply"
        )
    return value
