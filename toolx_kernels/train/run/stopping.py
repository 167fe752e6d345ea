"""How ``toolx train`` ends when it is told to: SIGTERM, or Ctrl-C.

A step that has begun is finished and saved, because it costs little to wait for. A probe, an evaluation or the cold
start may take long and keep nothing half-done, so they are left at once: what they did since the last checkpoint is
done again, exactly, when the run is resumed. A Ctrl-C after another signal ends the run at once, wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """The run ends because it was told to.

    No ``Exception``: like KeyboardInterrupt it must pass through a reward function or a tool that catches these.
    """

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal = signal.Signals(signal_number)


class Stop:
    """Whether the run was told to stop, and by which signal; one that nobody tells never is."""

    def __init__(self):
        self.requested: int | None = None
        self._deferred = 0

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What runs within is finished first; ``Stopped`` is raised behind it. Blocks may be nested."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1
        self.now()

    def now(self) -> None:
        """Raises ``Stopped`` if the run was told to stop and nothing is to be finished first."""
        if self.requested and not self._deferred:
            raise Stopped(self.requested)

    def handle(self, signal_number: int, _) -> None:
        """The signal handler."""
        if self.requested and signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or signal_number
        if self._deferred and signal_number == signal.SIGINT:  # print() must not be called from a handler
            os.write(2, b"\ntoolx train: finishes the step and saves it; Ctrl-C again ends at once.\n")
        self.now()


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """A ``Stop`` that SIGTERM and SIGINT tell; the handlers before are put back.

    Only the main thread may have handlers: in another one nothing is installed. A signal that is ignored, as in a job
    that nohup or a script started in the background, stays ignored.
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
