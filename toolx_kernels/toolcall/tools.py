"""Tools made of Python functions and environments: their schemas for prompts, and the execution of calls.

A tool is a function with type hints and a Google-style docstring, sync or async. An environment is an object with a
method ``reset``; its other public methods are tools that see the state of one episode. The result of a call is always
text for the model: a string unchanged, any other value as JSON, and an error as ``{"error": "..."}``.
"""

from __future__ import annotations

import copy
import inspect
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from toolx_kernels.errors import InputError, first_line, short
from toolx_kernels.toolcall.background import Background, in_time, one_line
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.strict_json import encodable

MAX_THREADS = 128  # concurrent calls of all episodes together


@dataclass(slots=True, eq=False)
class Session:
    """The functions that one episode can call, by name, and which of them share the environment's state."""

    row: Row
    functions: dict[str, Callable]
    stateful: frozenset[str] = frozenset()
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the environment works


@dataclass(slots=True, eq=False)
class _Job:
    """One call in progress. It ends with a ``result``, or with an ``error`` in one line."""

    work: Callable[[], Any]  # not called if there is an error already
    convert: Callable[[Any], str]  # from what ``work`` returns, awaited if it is awaitable
    stateful: bool = False  # it shares the environment's state
    result: str = ""
    error: str | None = None


class _Outcome(NamedTuple):
    result: str
    error: str | None
    end: float  # ``time.monotonic`` when the work ended


class Toolbox:
    """Functions and an environment that answer the calls of many episodes.

    Args:
        tools: functions with type hints and Google-style docstrings, from which transformers makes their schemas.
        environment_factory: a callable without arguments that makes a new environment for every episode. ``reset``
            receives those of the row's columns, id and answer that its parameters name; all of them with ``**kwargs``.
        timeout: seconds for one call, or for making and resetting an environment. A call that takes longer is
            abandoned, because Python cannot stop a thread; an async one is cancelled. One that also holds the
            interpreter, as an endless regular expression does, ends the process ``GRACE_S`` later (``Watchdog``).

    Raises:
        InputError: neither tools nor environment; a tool that is not a function, lacks a hint or a description, or
            shares its name with another one; an environment without ``reset``, or with ``get_reward``, which would
            never be called; an environment that cannot be made in time; a timeout that is not positive and finite.
    """

    def __init__(
        self,
        tools: Sequence[Callable] = (),
        environment_factory: Callable[[], Any] | None = None,
        *,
        timeout: float,
    ):
        if not 0 < timeout <= threading.TIMEOUT_MAX:
            raise InputError(f"timeout={timeout} of a tool call must be positive and finite, in seconds.")
        if callable(tools):
            raise InputError(f"tools={short(tools)} must be a list of functions: put it in brackets.")
        if not tools and environment_factory is None:
            raise InputError("There are neither tools nor an environment_factory: give one of them.")
        self.timeout, self.environment_factory = timeout, environment_factory
        self._background = Background("tools", timeout)
        methods = {}
        if environment_factory is not None:
            methods = environment_methods(self._environment(environment_factory))
        functions: dict[str, Callable] = {}
        for tool in (*tools, *methods.values()):
            if not (inspect.isfunction(tool) or inspect.ismethod(tool)):
                raise InputError(f"tools holds {short(tool)}: give functions that have a name, made with def.")
            if tool.__name__ in functions:
                raise InputError(f"Two tools are called {tool.__name__!r}: rename one of them.")
            functions[tool.__name__] = tool
        self.schemas = {name: tool_schema(tool) for name, tool in functions.items()}
        self.functions = {name: tool for name, tool in functions.items() if name not in methods}

    def offer(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the rows as prompts must show them.

        Each offers its own tools and then all of ours that it does not name itself. For a tool that both name, prompts
        show the row's schema and our function runs. A text that ``reset`` returns for the row is added to the user's
        last message.

        Raises:
            InputError: ``reset`` fails for a row; names the row.
        """
        texts = self._begin([Session(row, dict(self.functions)) for row in rows])
        missing = [[s for name, s in self.schemas.items() if name not in row.tool_names] for row in rows]
        return [
            replace(row, prompt=_with_text(row, text), tools=row.tools + tools)
            for row, text, tools in zip(rows, texts, missing, strict=True)
        ]

    def open(self, rows: Sequence[Row]) -> list[Session]:
        """Opens a session with a new environment for each of ``rows``, which come from ``offer``.

        Raises:
            InputError: ``reset`` fails, or returns a text that differs from the one that ``offer`` put into the prompt:
                the episodes of a prompt are compared with each other, so they must begin alike.
        """
        sessions = [Session(row, dict(self.functions)) for row in rows]
        for row, text in zip(rows, self._begin(sessions), strict=True):
            if not row.user_text.endswith(text):
                raise InputError(
                    f"reset returned {short(text)} for row {row.id!r}, whose prompt does not end with that: make it "
                    "depend on the row's columns only, and sample rows that offer() returned."
                )
        return sessions

    def answer(self, turns: Sequence[tuple[Session, list[dict]]]) -> list[list[str]]:
        """Runs the calls of each turn; returns their results as text, in the order of the calls.

        Functions run in parallel with everything else. Methods of one environment run one after another, because each
        may change what the next one sees. If one takes too long, the next ones of its turn do not run, and those of
        later turns wait until it ends.
        """
        of_turns = [[_job(session, call) for call in calls] for session, calls in turns]
        queues: list[tuple[list[_Job], threading.Lock | None]] = []
        for (session, _), jobs in zip(turns, of_turns, strict=True):
            ready = [job for job in jobs if job.error is None]
            queues.append(([job for job in ready if job.stateful], session.lock))
            queues += [([job], None) for job in ready if not job.stateful]
        self._run([queue for queue in queues if queue[0]])
        return [[job.result if job.error is None else error_text(job.error) for job in jobs] for jobs in of_turns]

    def _environment(self, factory: Callable[[], Any]) -> Any:
        begin, (made,) = time.monotonic(), self._background.start([factory])
        if not in_time(made, begin, self.timeout):
            raise InputError(f"environment_factory did not return within {self.timeout:g} s: fix it.")
        try:
            return made.result()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # including SystemExit
            raise InputError(
                f"environment_factory raised {type(error).__name__} ({first_line(error)}): fix it."
            ) from error

    def _begin(self, sessions: Sequence[Session]) -> list[str]:
        """Gives each session its environment; returns the texts of ``reset``, which are mostly empty."""
        if self.environment_factory is None:
            return [""] * len(sessions)
        jobs = [_Job(partial(_reset, session, self.environment_factory), _opening) for session in sessions]
        self._run([([job], None) for job in jobs])
        for session, job in zip(sessions, jobs, strict=True):
            if job.error is not None:
                raise InputError(f"The environment cannot be reset for row {session.row.id!r} ({job.error}): fix it.")
        return [job.result for job in jobs]

    def _run(self, queues: Sequence[tuple[list[_Job], threading.Lock | None]]) -> None:
        """Runs all queues in parallel, the jobs of a queue in order; every job then has a result or an error."""
        for first in range(0, len(queues), MAX_THREADS):
            begun = []
            for jobs, lock in queues[first : first + MAX_THREADS]:
                begin = time.monotonic()
                outcomes = self._background.start([partial(self._outcome, job) for job in jobs], lock)
                begun.append((jobs, outcomes, begin))
            for together in begun:
                self._collect(*together)

    def _outcome(self, job: _Job) -> _Outcome:
        """Does the work of ``job``, on a thread."""
        result, error = "", None
        try:
            result = job.convert(self._awaited(job.work()))
        except BaseException as raised:  # including SystemExit, which would end a thread
            error = one_line(raised)
        return _Outcome(result, error, time.monotonic())

    def _awaited(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        future = self._background.schedule(value)
        if not in_time(future, time.monotonic(), self.timeout):
            future.cancel()
            raise TimeoutError(self._too_late)
        return future.result()

    def _collect(self, jobs: list[_Job], outcomes: list[Future], begin: float) -> None:
        """Waits for the jobs of a queue, for each as long as one call may take."""
        late = False
        for job, outcome in zip(jobs, outcomes, strict=True):
            if late and outcome.cancel():
                job.error = "not run, as the call before it took too long"
            elif in_time(outcome, begin, self.timeout):
                job.result, job.error, begin = outcome.result()
            else:
                late = True
                outcome.cancel()  # in case it still waits for the environment
                job.error = f"TimeoutError: {self._too_late}"

    @property
    def _too_late(self) -> str:
        return f"no answer within {self.timeout:g} s"


def tool_schema(function: Callable) -> dict:
    """The JSON schema of a function, made by transformers from its hints and docstring.

    Raises:
        InputError: the function has no docstring, or a parameter has no hint or no line in it.
    """
    from transformers.utils import get_json_schema

    try:
        return get_json_schema(function)
    except Exception as error:  # its own errors, and whatever evaluating a hint raises
        raise InputError(
            f"No schema can be made for the tool {function.__name__!r} ({one_line(error)}): give it a docstring in "
            "Google's style and every parameter a type hint and a line under Args."
        ) from error


def environment_methods(environment: Any) -> dict[str, Callable]:
    """The public methods of an environment by name, without ``reset``.

    Raises:
        InputError: there is no method ``reset``, or one called ``get_reward``.
    """
    kind = type(environment)
    names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]
    if "reset" not in names:
        raise InputError(f"The environment {kind.__name__} has no method reset: add one, which begins an episode.")
    if "get_reward" in names:
        raise InputError(f"get_reward of {kind.__name__} would never be called: make it a reward function.")
    return {name: getattr(environment, name) for name in names if name != "reset"}


def error_text(error: str) -> str:
    """The text that the model reads of an error."""
    return encodable(json.dumps({"error": error}, ensure_ascii=False))


def _reset(session: Session, environment_factory: Callable[[], Any]) -> Any:
    row, environment = session.row, environment_factory()
    methods = environment_methods(environment)
    session.functions |= methods
    session.stateful = frozenset(methods)
    fields = {"id": row.id, "answer": row.answer, **row.columns}
    parameters = inspect.signature(environment.reset).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        fields = {parameter.name: fields[parameter.name] for parameter in parameters if parameter.name in fields}
    return environment.reset(**copy.deepcopy(fields))


def _job(session: Session, call: dict) -> _Job:
    name, arguments = call["name"], call["arguments"]
    function = session.functions.get(name)
    if function is None:
        offered = name in session.row.tool_names
        return _Job(str, _as_text, error=f"{name} cannot be run here" if offered else f"there is no tool {name}")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        return _Job(str, _as_text, error=f"{name}: {error}")
    return _Job(lambda: function(**arguments), _as_text, name in session.stateful)


def _as_text(value: Any) -> str:
    return encodable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def _opening(value: Any) -> str:
    if not isinstance(value, str | None):
        raise TypeError(f"reset returned {short(value)}, neither a string nor None")
    return encodable(value or "")


def _with_text(row: Row, text: str) -> str | list[dict]:
    """The prompt of ``row`` with ``text`` appended to the user's last message."""
    if isinstance(row.prompt, str):
        return row.prompt + text
    messages = list(row.prompt)
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    messages[last] = messages[last] | {"content": messages[last]["content"] + text}
    return messages
