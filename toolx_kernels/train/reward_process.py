"""Process of its own for named reward functions, so that nothing they do can hold up or end a run unsaid."""

from __future__ import annotations

import faulthandler
import fcntl
import io
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from types import FrameType
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import background
from toolx_kernels.toolcall.background import one_line
from toolx_kernels.toolcall.reward_runner import Completion, RewardFunctions, Rewards, extent
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.named_rewards import named_rewards

GRACE_S = 5.0  # seconds beyond its limit that a function may hold its interpreter
POLL_S = 0.5  # seconds between two looks at whether the process lives
END_S = 2.0  # seconds that the process may take to end
FIELDS = ("id", "prompt", "tools", "answer")  # of a row, next to its columns
# only built-in modules may be imported before the search path is set: files of the working directory would hide others
START = (
    "import sys; sys.path[:], sys.argv[:] = {path!a}, {argv!a};"
    "from toolx_kernels.train.reward_process import serve; serve(*{fds})"
)


class RewardProcess:
    """``RewardFunctions`` of functions with these names, in a process of their own, which alone imports them.

    The process is a new interpreter: it shares this one's search path, working directory, environment and terminal,
    but no objects, and keeps what the functions' modules hold from call to call. Signals that stop a run are left to
    this process, and the other one ends with it, however it ends. One that died or was interrupted is started anew by
    the next call.

    A function that does not return is given up at its limit. If it holds the interpreter, as an endless regular
    expression does, its process ends ``GRACE_S`` later and prints the stacks of its threads; if it cannot even do that,
    it is killed after twice that time.

    names  of the functions, as in ``RewardFunctions``

    Raises InputError: see ``named_rewards`` and ``RewardFunctions``; the process dies while it imports the functions.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None, timeout: float) -> None:
        self.asked, self.weights, self.timeout = list(names), weights, timeout
        self.names: list[str] = []
        self._folder = os.getcwd()  # a later start finds the same files
        self._start()

    def __call__(self, rows: Sequence[Row], completions: Sequence[Completion]) -> Rewards:
        """See ``RewardFunctions``. Also raises InputError if the process dies, or a column cannot be sent to it."""
        request = _packed(rows, completions)
        if not self._end.alive:
            self._start()
        return self._answer_to(request, rows)

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        # nobody writes to this pipe: the kernel tells the process when its last writer is gone
        reader, writer = os.pipe()
        with theirs:
            fds = theirs.fileno(), reader
            code = START.format(path=[str(place) for place in sys.path], argv=sys.argv, fds=fds)
            self._process = subprocess.Popen([sys.executable, "-c", code], pass_fds=fds, cwd=self._folder)
        os.close(reader)
        self._end = weakref.finalize(self, _end, self._process, self._connection, writer)
        self.names = self._answer_to((self.asked, self.weights, self.timeout, GRACE_S), None)

    def _answer_to(self, request: Any, rows: Sequence[Row] | None) -> Any:
        """The answer to a request about ``rows``, or to the first one, which is about none and may take any time."""
        running: list[str] = []
        heard = time.monotonic()
        try:
            self._connection.send(request)
            while True:
                if self._connection.poll(POLL_S):
                    kind, content = self._connection.recv()
                    heard = time.monotonic()
                    if kind != "running":
                        break
                    running = content
                elif running and time.monotonic() > heard + self.timeout + 2 * GRACE_S:
                    raise EOFError
                elif self._process.poll() is not None and not self._connection.poll():
                    raise EOFError
        except (EOFError, OSError):
            raise self._death(running, rows, time.monotonic() - heard) from None
        except BaseException:  # a signal: nobody will read the answer
            self._process.kill()
            self._end()
            raise
        if kind == "refused":
            sentence, cause = content
            raise InputError(sentence) from (RuntimeError(cause) if cause else None)
        return content

    def _death(self, running: list[str], rows: Sequence[Row] | None, silent: float) -> InputError:
        """Says why the process is dead, or kills it because it holds the interpreter."""
        late = bool(running) and silent > self.timeout
        if late:
            self._process.kill()
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._end()
        if rows is None:
            return InputError(
                f"reward_funcs={', '.join(self.asked)}: the process that imported them {_ended(code)}: repair that."
            )
        named = running or self.names
        who = f"reward function {named[0]!r}" if len(named) == 1 else f"one of the reward functions {', '.join(named)}"
        if late:
            return InputError(
                f"{who} did not return within {self.timeout:g} s for {extent(rows)} and held Python's interpreter, as"
                " an endless regular expression does, so its process was ended: fix it or allow it more time."
            )
        return InputError(f"{who} ended its process, which {_ended(code)}, for {extent(rows)}: fix it.")


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    more = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-code).name}{more}"


def _end(process: subprocess.Popen, connection: Connection, writer: int) -> None:
    connection.close()  # nothing more to read: the process ends
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
    os.close(writer)
    process.wait()


# ---- requests: columns one by one, so that one that cannot be sent is named


@dataclass(slots=True)
class _Written:
    ids: list[int]
    text: str
    messages: list[dict]


def _packed(rows: Sequence[Row], completions: Sequence[Completion]) -> dict[str, bytes]:
    names = {name: None for row in rows for name in row.columns}
    columns: dict[str, list] = {name: [row.columns.get(name) for row in rows] for name in names}
    for field in FIELDS:
        columns[field] = [getattr(row, field) for row in rows]
    columns["completions"] = [_Written(list(each.ids), each.text, each.messages) for each in completions]
    packed = {}
    for name, column in columns.items():
        try:
            packed[name] = pickle.dumps(column)
        except Exception as error:  # whatever its objects raise
            raise _unsendable(name, error) from error
    return packed


def _unpacked(request: dict[str, bytes]) -> tuple[list[Row], list[_Written]]:
    columns: dict[str, list] = {}
    for name, packed in request.items():
        try:
            columns[name] = pickle.loads(packed)
        except Exception as error:  # whatever importing its classes raises
            raise _unsendable(name, error) from error
    completions = columns.pop("completions")
    fields = [columns.pop(field) for field in FIELDS]
    own = [{name: column[n] for name, column in columns.items()} for n in range(len(completions))]
    return [Row(*values) for values in zip(*fields, own, strict=True)], completions


def _unsendable(name: str, error: Exception) -> InputError:
    return InputError(
        f"the column {name!r} cannot be sent to the process of the reward functions ({one_line(error)}): give it plain"
        " data, or pass the functions themselves as reward_funcs."
    )


# ---- in the process


class _Hosted(RewardFunctions):
    def __init__(self, names: Sequence[str], weights: Sequence[float] | None, timeout: float, connection: Connection):
        super().__init__(named_rewards(names), weights, timeout)
        self._connection = connection

    def _waits_for(self, names: Sequence[str]) -> None:
        self._connection.send(("running", list(names)))


def serve(connection_fd: int, lifeline: int) -> None:
    """Answers requests until the connection is closed."""
    for fd in (connection_fd, lifeline):
        os.set_inheritable(fd, False)
    _end_with_parent(lifeline)
    _leave_signals_to_parent()
    faulthandler.enable(file=2)  # says where a process was that died
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # also in a log: what is printed before a death is not lost
    with Connection(connection_fd) as connection:
        names, weights, timeout, background.GRACE_S = connection.recv()
        rewards: _Hosted | None = None
        while True:
            try:
                if rewards is None:
                    rewards = _Hosted(names, weights, timeout, connection)
                    answer: tuple[str, Any] = ("names", rewards.names)
                else:
                    answer = ("rewards", rewards(*_unpacked(connection.recv())))
            except (EOFError, OSError):  # nobody waits for it any more
                return
            except InputError as error:
                cause = error.__cause__
                answer = ("refused", (str(error), "".join(traceback.format_exception(cause)) if cause else ""))
            try:
                connection.send(answer)
            except OSError:
                return
            if rewards is None:
                return


def _end_with_parent(lifeline: int) -> None:
    """Lets the kernel end this process when the other end of the pipe ``lifeline`` is closed, whatever runs here."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def _leave_signals_to_parent() -> None:
    """Signals go to a whole process group, and the step in progress is to be finished. They are handled and not
    ignored, because programs that reward functions start would inherit that."""
    own = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != own:  # a fork
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handle)
