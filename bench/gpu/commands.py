"""Commands, the facts that other processes find: the build, the tests, and the tests under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections import Counter, defaultdict
from pathlib import Path

from bench.gpu.runner import Command, last_line

# Only the tests use them: tests that need an absent one are left out and counted.
TEST_PACKAGES = ("build", "datasets", "hypothesis", "ruff", "scipy", "torchao", "trl", "wheel")
EVERY_OP = "tests/ops/test_every_op.py"
# racecheck reports hazards inside NVIDIA's own matrix kernels and needs minutes for each of them.
LIBRARY_KERNELS = "kns=gemm,kns=cublas,kns=cutlass,kns=nvjet"
LISTED_FAILURES = 40


def build(capability: str, *, toy: bool) -> Command:
    """Builds the extension for this GPU in place; it needs only the CPU and runs alongside the first facts."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    env = {"TOOLX_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": capability, "MAX_JOBS": "8"}
    skip = "toy: the extension is left as it is" if toy else ""
    return Command("build", 60, command, exit_status, env=env, beside="machine", skip=skip)


def tests(name: str, seconds: float, *selection: str, workers: int, toy: bool, beside: str = "") -> Command:
    """Runs a part of the test suite, in ``workers`` processes if pytest-xdist is installed."""
    spread = ["-n", str(workers)] if importlib.util.find_spec("xdist") else []
    skip = "toy: the tests are run as such" if toy else ""
    return Command(name, seconds, [*PYTEST, *spread, *selection], tested, env=QUIET, beside=beside, skip=skip)


def sanitizer(tool: str, seconds: float, *options: str, toy: bool) -> Command:
    """Runs a test of every op under one tool; each error that it reports is a failure.

    Errors of CUDA API calls do not count: libraries look for functions that the driver lacks, and continue without.
    """
    next_to_nvcc = Path("/usr/local/cuda/bin/compute-sanitizer")
    binary = shutil.which("compute-sanitizer") or (str(next_to_nvcc) if next_to_nvcc.exists() else None)
    skip = "" if binary else "there is no compute-sanitizer here: it comes with the CUDA toolkit"
    skip = "toy: there is no GPU to watch" if toy else skip
    watched = [str(binary), "--tool", tool, *SANITIZER.split(), *options, *PYTEST, "-p", "bench.gpu.eager", EVERY_OP]
    # Without torch's cache every tensor is a separate allocation, whose bounds the tool can check. Such allocations
    # are forbidden while a graph is captured, hence bench.gpu.eager.
    env = QUIET | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Command(tool, seconds, watched, sanitized, env=env, skip=skip)


SANITIZER = "--target-processes all --launch-timeout 120 --print-limit 20 --report-api-errors no"
# A kernel that hangs cannot be interrupted: the timeout names the test.
PYTEST_OPTIONS = "-v --tb=short -p no:cacheprovider --continue-on-collection-errors -o faulthandler_timeout=60"
PYTEST = (sys.executable, "-m", "pytest", *PYTEST_OPTIONS.split())
QUIET = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "400"}


def exit_status(code: int | None, output: str) -> dict:
    """The result of a command that reports only by its exit status."""
    if code == 0:
        return {}
    return {"failures": [f"{'out of time' if code is None else f'exit status {code}'}: {last_line(output)}"]}


def tested(code: int | None, output: str) -> dict:
    """Counts what ``pytest -v`` printed, so that a run that was stopped counts too.

    A test that fails only because one of ``TEST_PACKAGES`` is absent counts as left out.
    """
    outcomes = {}
    for line in output.splitlines():
        if found := re.match(r"\[gw\d+\](?: \[ *\d+%\])? (PASSED|FAILED|ERROR|SKIPPED) (.+?)\s*$", line):
            outcomes[found[2]] = found[1]
        elif found := re.match(r"(\S+::.+) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            outcomes[found[1]] = found[2]
    reasons = {name: why for _, name, why in re.findall(r"^(FAILED|ERROR) (.+?)(?: - (.*))?$", output, re.MULTILINE)}
    for name in reasons:
        outcomes.setdefault(name, "ERROR")  # a file that could not be read
    counts: Counter[str] = Counter()
    absent: Counter[str] = Counter()
    failed: defaultdict[str, list[str]] = defaultdict(list)
    for name, outcome in outcomes.items():
        why = reasons.get(name, "")
        if outcome in ("PASSED", "SKIPPED"):
            counts[outcome.lower()] += 1
        elif package := lacking(why) or lacking(text_of(name, output)):
            absent[package] += 1
        else:
            counts["failed"] += 1
            failed[why[:160]].append(name)
    failures = [  # one cause may fail many tests
        names[0] + (f" and {len(names) - 1} more" if names[1:] else "") + f": {why}" for why, names in failed.items()
    ]
    if code is None:
        failures.append("out of time")
    elif code not in (0, 1) or not outcomes:
        failures.append(f"pytest ended with status {code}: {last_line(output)}")
    named = [name for names in failed.values() for name in names]
    totals = {name: counts[name] for name in ("passed", "failed", "skipped")} | {"failures": failures[:LISTED_FAILURES]}
    return totals | ({"left_out": dict(absent)} if absent else {}) | ({"failed_tests": named} if named else {})


def text_of(name: str, output: str) -> str:
    """The output of pytest on a failed test, or on a file that it could not read, up to the next headline."""
    found = re.search(rf"^_+ .*{re.escape(name.rpartition('::')[2])} _+$(.*?)(?=^[_=]{{5}}|\Z)", output, re.M | re.S)
    return found[1] if found else ""


def lacking(text: str) -> str | None:
    """The package of ``TEST_PACKAGES`` that a failure's text names as missing."""
    named = set(re.findall(r"No module named '?(\w+)", text))
    return next((p for p in TEST_PACKAGES if p in named and importlib.util.find_spec(p) is None), None)


def sanitized(code: int | None, output: str) -> dict:
    if "Device not supported" in output:
        return {"why": "compute-sanitizer does not support this device or its virtual machine"}
    tests_found = {k: v for k, v in tested(code, output).items() if k != "failures"}
    reports = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", output, re.MULTILINE)
    if not reports:
        status = "out of time" if code is None else f"no report, status {code}: {last_line(output)}"
        return tests_found | {"failures": [status]}
    errors = sum(int(count) for report in reports for count in re.findall(r"(\d+) errors?\b", report))
    found = tests_found | {"errors": errors, "report": reports[-1]}
    failures = [] if code == 0 else [f"exit status {code}: {last_line(output)}"]
    if errors:
        kinds = r"^=+ ((?:Error: )?(?:Invalid|Uninitialized|Race|Program|Misaligned).*)$"
        first = re.search(kinds, output, re.MULTILINE)
        failures.insert(0, f"{errors} errors; the first: {first[1] if first else reports[0]}")
    return found | ({"failures": failures} if failures else {})
