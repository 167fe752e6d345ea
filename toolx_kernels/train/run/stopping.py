"""Stopping ``toolx train`` by SIGTERM or Ctrl-C.

A step in progress is finished and saved, because that is quick. A probe, an evaluation or the cold start may take long
and keeps nothing half-done, so it ends at once: a resumed run repeats exactly what it did since the last checkpoint.
Ctrl-C after another signal ends the run at once, wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """The run ends because a signal asked it to.

    Not an ``Exception``: like KeyboardInterrupt it must pass through reward functions and tools that catch those.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


class Stop:
    """The pending stop request of a run: the signal that asked for it, or None."""

    def __init__(self):
        self.requested: int | None = None
        self._deferred = 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context that finishes its block before ``Stopped`` is raised. Blocks may be nested."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        self.now()

    def now(self) -> None:
        """Raises ``Stopped`` if a stop is requested and no ``deferred`` block is open."""
        if self.requested and not self._deferred:
            raise Stopped(self.requested)

    def handle(self, signal_number: int, _) -> None:
        """The signal handler."""
        if self.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal_number
        if self._deferred and signal_number == signal.SIGINT:  # print() must not be called from a handler
            os.write(2, b"\ntoolx train: finishing and saving this step; press Ctrl-C again to end at once.\n")
        self.now()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Context with a ``Stop`` that SIGTERM and SIGINT request; restores the previous handlers after.

    Only the main thread may have handlers: in other threads nothing is installed. An ignored signal, e.g. in a job that
    nohup or a script started in the background, stays ignored.
    """
    stop = Stop()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
