"""Background threads and an event loop for user functions, which may be slow, stuck or async."""

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any


class Background:
    """Daemon threads, one for each ``start``, and one event loop on another thread.

    Python cannot stop a thread: a stuck one runs until the process ends, but does not keep the process alive. All
    coroutines share the loop, so that clients which they open stay usable. The caller may be inside another loop, as in
    a notebook. The loop ends with this object, and coroutines that still run on it are cancelled.
    """

    def __init__(self, name: str) -> None:
        self.name = name  # of the threads

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        started: Future = Future()
        threading.Thread(target=asyncio.run, args=(_serve(started),), name=self.name, daemon=True).start()
        loop, stop = started.result()
        weakref.finalize(self, loop.call_soon_threadsafe, stop.set)
        return loop

    def start(self, calls: Sequence[Callable[[], Any]], lock: AbstractContextManager | None = None) -> list[Future]:
        """Starts a thread that runs ``calls`` in order while it holds ``lock``; returns a future for each call.

        A call does not run if its future is cancelled before its turn.
        """
        futures: list[Future] = [Future() for _ in calls]
        threading.Thread(target=_run_all, args=(futures, calls, lock), name=self.name, daemon=True).start()
        return futures

    def schedule(self, awaitable: Awaitable) -> Future:
        """Schedules ``awaitable`` on the event loop; cancelling the returned future cancels it."""

        async def awaited() -> Any:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop)


def run(future: Future, call: Callable[[], Any]) -> None:
    """Runs ``call`` on this thread and stores its result or exception in ``future``, unless that is cancelled."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(call())
        except BaseException as error:  # including SystemExit, which would end a thread
            future.set_exception(error)


def in_time(future: Future, begin: float, timeout: float | None) -> bool:
    """Waits for ``future`` until ``timeout`` s after ``begin`` (``time.monotonic``); returns whether it is done."""
    left = None if timeout is None else max(0.0, begin + timeout - time.monotonic())
    return bool(wait([future], left).done)


def one_line(error: BaseException) -> str:
    """The type of an error and the first line of its message."""
    return ": ".join(filter(None, (type(error).__name__, str(error).strip().partition("\n")[0])))


def _run_all(futures: list[Future], calls: Sequence[Callable[[], Any]], lock: AbstractContextManager | None) -> None:
    with lock or nullcontext():
        for future, call in zip(futures, calls, strict=True):
            run(future, call)


async def _serve(started: Future) -> None:
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    await stop.wait()
