"""Runner of facts: measures them in order, within a time limit, and keeps each one as soon as it is known.

A fact that fails, hangs or has no time left is a line in the file too, and does not stop the others. All measurements
run in this process. If a kernel breaks the CUDA context, or hangs, the process restarts itself and continues with the
next fact.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.common.timing import synchronize

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10.0  # from the interrupt to the kill: pytest uses it to write its results so far
PATIENCE = 2  # times the expected seconds, after which a fact is given up


@dataclass(frozen=True, slots=True)
class Bench:
    """Device and folders of measurements. ``toy``: every size is tiny, for a machine without a GPU."""

    device: torch.device
    toy: bool
    scratch: Path  # an existing folder for temporary files
    logs: Path  # an existing folder for the output of commands
    python_path: str = str(ROOT)  # for the processes that facts start


@dataclass(frozen=True, slots=True)
class Fact:
    """A measurement: ``measure`` returns numbers, words, lists; the fact has failed if there are ``failures``."""

    name: str
    seconds: float  # expected on an H100; with less time left it is not started
    measure: Callable[[Bench], dict]


@dataclass(frozen=True, slots=True)
class Command:
    """A fact that another process finds; ``read`` receives its exit status (None: out of time) and its output.

    beside: the fact with which it starts; it runs in parallel with that and all that follow, until its own turn.
    skip: why it cannot run here.
    """

    name: str
    seconds: float
    command: Sequence[str]
    read: Callable[[int | None, str], dict]
    env: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""
    skip: str = ""


class Journal:
    """The file of facts, one JSON line each, written as soon as they are known; the last line of a fact counts.

    clean: removes this machine's folders from a text, because the file is committed.
    commit: of the source; it is in each line, because a file may hold facts of several commits.
    """

    def __init__(self, path: Path, known: Mapping[str, dict], clean: Callable[[str], str] = str, commit: str = ""):
        self.path, self.clean, self.commit, self.started = path, clean, commit, time.monotonic()
        self.facts = dict(known)
        fresh = path.with_suffix(".new")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in self.facts.values()), encoding="utf-8")
        fresh.replace(path)

    def write(self, name: str, status: str, **found) -> None:
        """``status``: ok, failed, skipped (cannot run here) or no time."""
        at = round(time.monotonic() - self.started, 1)
        line = {"fact": name, "status": status, "at": at, "commit": self.commit, **found}
        text = self.clean(json.dumps(line))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.facts[name] = json.loads(text)
        print(f"{line['at']:>6.1f} {status:<7} {name}: {self.clean(words(found))}"[:400], flush=True)


def read_journal(path: Path) -> dict[str, dict]:
    """The facts of a file by name, without a last line that is incomplete."""
    facts = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            facts[line["fact"]] = line
    return facts


def words(found: Mapping[str, Any]) -> str:
    """A fact in one line: failures first, then every plain value."""
    failures = [str(found[name]) for name in ("error",) if name in found] + list(map(str, found.get("failures", ())))
    plain = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in found.items()
        if isinstance(value, (int, float, str)) and name not in ("error", "trace", "seconds")
    ]
    return "; ".join([*failures, *plain])


class OutOfTime(Exception):
    pass


def find_all(
    facts: Sequence[Fact | Command], journal: Journal, bench: Bench, deadline: float, restart: Callable[[], None]
) -> None:
    """Measures the facts that the journal does not have yet.

    Args:
        deadline: in terms of ``time.monotonic``.
        restart: restarts this process; does not return.
    """
    jobs: dict[str, Job] = {}

    def begin(beside: str) -> None:
        for other in facts:
            if isinstance(other, Command) and other.beside == beside and other.name not in journal.facts:
                if not other.skip:
                    jobs[other.name] = Job(other, bench)

    def start_anew() -> None:
        for job in jobs.values():
            job.end()
        restart()

    try:
        for fact in facts:
            begin(fact.name)
            left = deadline - time.monotonic()
            limit = max(0.1, min(PATIENCE * fact.seconds + 20, left - 1))
            if fact.name in journal.facts:
                continue
            if isinstance(fact, Command) and fact.skip:
                journal.write(fact.name, "skipped", why=fact.skip)
            elif fact.name not in jobs and left < fact.seconds:
                journal.write(fact.name, "no time")
            elif isinstance(fact, Command):
                job = jobs.pop(fact.name, None) or Job(fact, bench)
                began = time.monotonic()
                code, output = job.wait(limit)
                keep(journal, fact.name, began, fact.read(code, output))
            elif not measured(fact, journal, bench, limit, start_anew):
                start_anew()
    finally:
        for job in jobs.values():
            job.end()


def keep(journal: Journal, name: str, began: float, found: dict) -> None:
    status = "failed" if found.get("failures") else "skipped" if found.get("why") else "ok"
    journal.write(name, status, seconds=round(time.monotonic() - began, 1), **found)


def measured(fact: Fact, journal: Journal, bench: Bench, limit: float, start_anew: Callable[[], None]) -> bool:
    """Measures one fact; returns False if this process can measure no more."""
    began = time.monotonic()

    def hangs() -> None:  # nothing can interrupt a wait for a kernel that never ends
        faulthandler.dump_traceback(all_threads=True)
        journal.write(fact.name, "failed", error=f"hangs: nothing came back for {time.monotonic() - began:.0f} s")
        start_anew()

    watchdog = threading.Timer(limit + GRACE_SECONDS, hangs)
    watchdog.daemon = True
    watchdog.start()
    try:
        with time_limit(limit):
            found = fact.measure(bench)
            synchronize(bench.device)
        keep(journal, fact.name, began, found)
    except Exception as error:
        what = f"{type(error).__name__}: {str(error)[:400]}"
        trace = "".join(traceback.format_exception(error))[-2000:]
        journal.write(fact.name, "failed", seconds=round(time.monotonic() - began, 1), error=what, trace=trace)
        try:
            synchronize(bench.device)
        except Exception:  # an illegal access stays with the context until the process ends
            return False
    finally:
        watchdog.cancel()
        if bench.device.type == "cuda":
            with suppress(Exception):
                torch.cuda.empty_cache()
    return True


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``OutOfTime`` in the block after ``seconds``."""

    def stop(signum, frame):
        raise OutOfTime(f"given up after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Job:
    """The process of a command and its children; their output goes to a file."""

    def __init__(self, command: Command, bench: Bench):
        self.log = bench.logs / (re.sub(r"[^a-z0-9.]+", "-", command.name.lower()) + ".log")
        with open(self.log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                list(command.command),
                cwd=ROOT,
                # unbuffered, or a command's output comes after the error that ended it
                env=os.environ | {"PYTHONPATH": bench.python_path, "PYTHONUNBUFFERED": "1"} | dict(command.env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A background job of a shell ignores interrupts, and its children would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """The exit status, or None if the process was stopped after ``seconds``, and the output."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            self._signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)
        finally:
            self.end()
        return code, re.sub(r"[^\n]*\r(?!\n)", "", self.log.read_bytes().decode(errors="replace"))

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def printed(*command: str) -> str | None:
    """The first line that a command prints, or None."""
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.partition("\n")[0] or None


def commit() -> str:
    return printed("git", "describe", "--always", "--dirty") or "unknown"


def last_line(output: str) -> str:
    """The last line of a command's output that is not blank, at most 200 characters of it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def restart_with(arguments: Sequence[str]) -> None:
    """Restarts this process with other arguments, which ends every thread and the CUDA context."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *arguments])
