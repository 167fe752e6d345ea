"""Runs steps one after the other, each within its own time, and says what came of them. No failure stops the next."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GRACE_SECONDS = 10.0  # from the interrupt to the kill: pytest uses it to write what it has found so far
LISTED_FAILURES = 12  # more would push the table off the screen; summary.json has all


@dataclass(frozen=True, slots=True)
class Findings:
    """What a step's output says. Anything in ``failures`` makes the step failed, whatever its exit status was."""

    words: str = ""  # for the table
    figures: dict = field(default_factory=dict)  # for summary.json
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # parts that were left out, and why
    skipped: str = ""  # why the step could not do its work here


Reader = Callable[[int | None, str], Findings]  # from the exit status (None: out of time) and the output


def exit_status(code: int | None, output: str) -> Findings:
    """The reader of a command that says all with its exit status."""
    return Findings(failures=(f"exit status {code}: {last_line(output)}",) if code else ())


@dataclass(frozen=True, slots=True)
class Step:
    """A command. ``share`` is its part of the whole run's time; what a step leaves of it, later steps may use."""

    name: str
    command: Sequence[str]
    share: float
    read: Reader = exit_status
    env: Mapping[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot run here


@dataclass(frozen=True, slots=True)
class Result:
    """``status``: ok, failed, skipped (cannot run here) or not run (no time left, or interrupted before it)."""

    step: str
    status: str
    seconds: float
    words: str = ""
    figures: dict = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.status in ("ok", "skipped")


def run_all(
    steps: Sequence[Step],
    seconds: float,
    logs: Path,
    clean: Callable[[str], str] = str,
    keep: Callable[[list[Result]], None] = lambda results: None,
) -> list[Result]:
    """Runs every step within ``seconds`` in all.

    Args:
        logs: an existing folder; the output of each step goes to ``<name>.log`` in it, passed through ``clean``.
        keep: is given the results so far after each step, so that a run that is killed leaves them behind.
    """
    started, shares, interrupted, results = time.monotonic(), 0.0, False, []
    for step in steps:
        shares += step.share
        limit = started + seconds * shares / sum(each.share for each in steps) - time.monotonic()
        print(f"{step.name:<12}", end="", flush=True)
        if step.skip:
            result = Result(step.name, "skipped", 0.0, step.skip)
        elif interrupted or limit < 1:
            result = Result(step.name, "not run", 0.0, "interrupted" if interrupted else "no time left for it")
        else:
            result, interrupted = _run(step, limit, logs / f"{step.name}.log", clean)
        print(f"{result.status:<8}{result.seconds:>5.0f} s  {result.words}", flush=True)
        results.append(result)
        keep(results)
    return results


def _run(step: Step, limit: float, log: Path, clean: Callable[[str], str]) -> tuple[Result, bool]:
    """The result, and whether the user interrupted the run."""
    began, code, interrupted = time.monotonic(), None, False
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # for processes that tests start
    try:
        code = _execute(step.command, os.environ | {"PYTHONPATH": path} | step.env, log, limit)
    except KeyboardInterrupt:
        interrupted = True
    seconds = time.monotonic() - began
    output = clean(re.sub(r"[^\n]*\r(?!\n)", "", log.read_bytes().decode(errors="replace")))
    log.write_text(output, encoding="utf-8")
    found = step.read(code, output)
    failures = tuple(map(clean, found.failures))
    if code is None:
        failures = ("interrupted" if interrupted else f"out of time after {limit:.0f} s", *failures)
    status = "failed" if failures else "skipped" if found.skipped else "ok"
    words = found.skipped or found.words or (failures[0] if failures else "")
    return Result(step.name, status, round(seconds, 1), words, found.figures, failures, found.notes), interrupted


def _execute(command: Sequence[str], env: Mapping[str, str], log: Path, limit: float) -> int | None:
    """The exit status, or None after ``limit`` seconds: then everything the command started is ended."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            # unbuffered, or what a step printed comes behind the error that ended it
            env=dict(env) | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell's background job ignores interrupts, and what it starts would too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return process.wait(limit)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
            if isinstance(stop, KeyboardInterrupt):
                raise
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def summary(title: str, lines: Sequence[str], results: Sequence[Result]) -> str:
    """One screen of Markdown: the machine, a row per step, what was left out, and the failures last."""
    text = [f"# {title}", "", *lines, "", "| step | result | seconds | what it found |", "|---|---|---|---|"]
    text += [f"| {r.step} | {r.status} | {r.seconds:.0f} | {r.words.replace('|', '/')} |" for r in results]
    if notes := [f"- {r.step}: {note}" for r in results for note in r.notes]:
        text += ["", "Left out:", "", *notes]
    failures = [f"- {r.step}: {failure}" for r in results for failure in r.failures]
    failures += [f"- {r.step}: not run, {r.words}" for r in results if r.status == "not run"]
    if len(failures) > LISTED_FAILURES:
        more = len(failures) - LISTED_FAILURES
        failures = [*failures[:LISTED_FAILURES], f"- and {more} more: see summary.json"]
    text += ["", "Failures:", "", *failures] if failures else ["", "No failures."]
    return "\n".join(text) + "\n"


def last_line(output: str) -> str:
    """The last line of a command's output that says something, at most 200 characters of it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"
