"""Finds facts in the order of their worth, within a time, and keeps each one the moment it is known.

A fact that fails, hangs or has no time left is a line in the file too, and stops none of the others. All measuring is
done in this process. Where a kernel has broken the CUDA context, or hangs, the process starts itself anew and goes on
with the next fact.
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
GRACE_SECONDS = 10.0  # from the interrupt to the kill: pytest uses it to write what it has found so far
PATIENCE = 2  # times the expected seconds, then a fact is given up


@dataclass(frozen=True, slots=True)
class Bench:
    """Where facts are measured. ``toy``: every size is tiny, for a machine without a GPU."""

    device: torch.device
    toy: bool
    scratch: Path  # an existing folder for what need not be kept
    logs: Path  # an existing folder for the output of commands
    python_path: str = str(ROOT)  # for the processes that facts start


@dataclass(frozen=True, slots=True)
class Fact:
    """``measure`` returns what is found: numbers, words, lists; ``failures`` among them makes the fact failed."""

    name: str
    seconds: float  # expected on an H100; with less time left it is not begun
    measure: Callable[[Bench], dict]


@dataclass(frozen=True, slots=True)
class Command:
    """A fact that a process of its own finds; ``read`` gets its exit status (None: out of time) and its output.

    beside: the fact with which it starts, to run beside it and all that follow until its own turn.
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
    """The facts, one JSON line each, on the disk as soon as they are known; of two lines of a fact the later counts.

    clean: takes this machine's folders out of a text; the file is made to be committed.
    commit: of the source, in each line, as a file may hold facts of several.
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
    """The facts of a file by name; a last line that was cut off is left out."""
    facts = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            line = json.loads(text)
            facts[line["fact"]] = line
    return facts


def words(found: Mapping[str, Any]) -> str:
    """What fits a line: failures first, then every plain value."""
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
    """Finds what the journal does not hold yet.

    Args:
        deadline: of time.monotonic().
        restart: starts this process anew; does not return.
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
    """Measures one fact; False if this process can measure no more."""
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
    """Raises OutOfTime in the block after ``seconds``."""

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
    """The process of a command, with all that it starts; its output is a file."""

    def __init__(self, command: Command, bench: Bench):
        self.log = bench.logs / (re.sub(r"[^a-z0-9.]+", "-", command.name.lower()) + ".log")
        with open(self.log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                list(command.command),
                cwd=ROOT,
                # unbuffered, or what a command printed comes behind the error that ended it
                env=os.environ | {"PYTHONPATH": bench.python_path, "PYTHONUNBUFFERED": "1"} | dict(command.env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell's background job ignores interrupts, and what it starts would too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait(self, seconds: float) -> tuple[int | None, str]:
        """The exit status, None where it had to be ended after ``seconds``, and the output."""
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
    """The last line of a command's output that says something, at most 200 characters of it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


def restart_with(arguments: Sequence[str]) -> None:
    """This process, from its beginning, with other arguments: ends every thread and the CUDA context."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *arguments])
