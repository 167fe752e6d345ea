"""Background threads and an event loop for user functions, which may be slow, stuck or async; a watchdog over them."""

import asyncio
import faulthandler
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cached_property
from typing import Any

from toolx_kernels.errors import first_line

GRACE_S = 30.0  # seconds beyond its limit that a function may hold the interpreter; a busy machine needs some


class Watchdog:
    """Ends the process if user functions hold Python's interpreter for longer than their limit and ``GRACE_S``.

    A call of C code, such as that of an endless regular expression, may keep the interpreter to itself: then no other
    thread runs, and no signal handler either. So as long as functions with a limit run, also after they were given up,
    a thread sets faulthandler's timer anew every few seconds. If it cannot, that timer, which needs no interpreter,
    prints the stacks of all threads to stderr and ends the process with code 1. A process has one such timer: user code
    must not set it too. Time for which the process is stopped (Ctrl-Z) counts.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._limits: list[float] = []  # of the functions that run, in seconds
        self._set_for = 0.0  # the limit for which the timer is set; 0.0 if it is not
        self._thread = threading.Thread()  # not started

    def watch(self, limit: float | None) -> Callable[..., None]:
        """Begins to watch a function, which must not have begun yet: else it could hold the interpreter unwatched.
        Returns what to call when it has ended. Without a limit nothing is watched."""
        if limit is None:
            return lambda *_: None
        with self._changed:
            self._limits.append(limit)
            if limit > self._set_for:
                self._set_timer()
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=self._keep_setting, name="watchdog", daemon=True)
                self._thread.start()
        return lambda *_: self._leave(limit)

    def _leave(self, limit: float) -> None:
        with self._changed:
            self._limits.remove(limit)

    def _keep_setting(self) -> None:
        with self._changed:
            while True:  # most functions end before it looks: a timer for each would cost more than they
                self._changed.wait(GRACE_S / 6 if self._set_for else None)
                self._set_timer()

    def _set_timer(self) -> None:
        self._set_for = max(self._limits, default=0.0)
        if self._set_for:
            # a notebook's sys.stderr is no file: 2 is stderr
            faulthandler.dump_traceback_later(min(self._set_for + GRACE_S, threading.TIMEOUT_MAX), exit=True, file=2)
            self._changed.notify()
        else:
            faulthandler.cancel_dump_traceback_later()


_watchdog = Watchdog()


class Background:
    """Daemon threads, one for each ``start``, and one event loop on another thread.

    Python cannot stop a thread: a stuck one runs until the process ends, but does not keep the process alive. All
    coroutines share the loop, so that clients which they open stay usable. The caller may be inside another loop, as in
    a notebook. The loop ends with this object, and coroutines that still run on it are cancelled.

    Args:
        name: of the threads.
        timeout: the caller's limit for one function, in seconds. With a limit the process ends if a function holds the
            interpreter for much longer (``Watchdog``).
    """

    def __init__(self, name: str, timeout: float | None = None) -> None:
        self.name, self.timeout = name, timeout

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        started: Future = Future()
        ended = threading.Event()
        threading.Thread(target=_serve, args=(started, ended), name=self.name, daemon=True).start()
        loop = started.result()
        weakref.finalize(self, _end, loop, ended)
        return loop

    def start(self, calls: Sequence[Callable[[], Any]], lock: AbstractContextManager | None = None) -> list[Future]:
        """Starts a thread that runs ``calls`` in order while it holds ``lock``; returns a future for each call.

        A call does not run if its future is cancelled before its turn.
        """
        futures: list[Future] = [Future() for _ in calls]
        work = futures, calls, lock, _watchdog.watch(self.timeout)
        threading.Thread(target=_run_all, args=work, name=self.name, daemon=True).start()
        return futures

    def schedule(self, awaitable: Awaitable) -> Future:
        """Schedules ``awaitable`` on the event loop; cancelling the returned future cancels it."""

        async def awaited() -> Any:
            return await awaitable

        ended = _watchdog.watch(self.timeout)
        future = asyncio.run_coroutine_threadsafe(awaited(), self._loop)
        future.add_done_callback(ended)
        return future


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
    """The type of an error and the first line of its message (``first_line``)."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def _run_all(
    futures: list[Future],
    calls: Sequence[Callable[[], Any]],
    lock: AbstractContextManager | None,
    ended: Callable[[], None],
) -> None:
    try:
        with lock or nullcontext():
            for future, call in zip(futures, calls, strict=True):
                run(future, call)
    finally:
        ended()


def _serve(started: Future, ended: threading.Event) -> None:
    """Runs an event loop until ``ended``; then cancels what still runs on it."""
    loop = asyncio.new_event_loop()
    started.set_result(loop)
    try:
        while not ended.is_set():
            # a task stores such an error as its result, and then raises it out of the loop all the same
            with suppress(SystemExit, KeyboardInterrupt):
                loop.run_forever()
        loop.run_until_complete(_cancel_others())
    finally:
        loop.close()


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


def _end(loop: asyncio.AbstractEventLoop, ended: threading.Event) -> None:
    ended.set()
    loop.call_soon_threadsafe(loop.stop)
