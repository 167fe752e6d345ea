"""What ``make gpu`` runs, in order, and how the output of each command is read."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

from bench import report_rollout
from bench.gpu.run import Findings, Step, exit_status, last_line
from bench.report import case_name, rows_of

# The tests use them, the package does not: where one is absent, the tests that need it are left out and named.
TEST_PACKAGES = ("build", "datasets", "hypothesis", "ruff", "scipy", "wheel")
PLAN_TOLERANCE = 0.1  # of the measured peak
SMALL_SET = "tests/test_every_op.py"
# racecheck reports hazards inside NVIDIA's own matrix kernels and needs minutes for each of them.
LIBRARY_KERNELS = "kns=gemm,kns=cublas,kns=cutlass,kns=nvjet"


def steps(facts: dict, capped: dict[str, str], scratch: Path) -> list[Step]:
    """The steps on the machine that ``facts`` describes. Add a benchmark here: one more Step, with its reader.

    Args:
        capped: environment that caps the GPU memory which torch may take, for claims about 24 GB cards.
        scratch: an existing folder for what need not be kept.
    """
    build = {"TOOLX_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": facts["capability"]}
    pytest = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(scratch / "pytest"),
        "-o", "faulthandler_timeout=60",  # a kernel that hangs cannot be interrupted: this names the test
    ]  # fmt: skip
    tests = [*pytest, "tests", "--continue-on-collection-errors", "--junitxml", str(scratch / "tests.xml")]
    train = [sys.executable, "-m", "toolx_kernels.cli", "train", "--device", "cuda", "--max_steps", "40"]
    losses, rollouts = scratch / "loss.json", scratch / "rollout.json"
    return [
        Step(
            "build", [sys.executable, "setup.py", "build_ext", "--inplace", "--force"], 80, env=build,
            read=built(facts["nvcc"]),
        ),
        Step("doctor", [sys.executable, "-m", "toolx_kernels.cli", "doctor"], 15, read=doctor(facts["nvcc"])),
        Step("tests", tests, 160, read=tests_in(scratch / "tests.xml")),
        Step(
            "train", [*train, "--output_dir", str(scratch / "train")], 90, env=capped,
            read=trained(scratch / "train" / "summary.json"),
        ),
        sanitizer("memcheck", 60, [*pytest, SMALL_SET]),
        Step(
            "loss", [*pytest, "bench/test_loss.py", "-k", "measure or length", "--benchmark-json", str(losses)], 90,
            env=capped, read=timed(losses),
        ),
        Step("report", [sys.executable, "-m", "bench.report", str(losses)], 20, read=reported("loss")),
        Step(
            "rollout", [*pytest, "bench/test_rollout.py", "-k", "measure", "--benchmark-json", str(rollouts)], 120,
            env=capped, read=sampled(rollouts),
        ),
        Step(
            "rollout-csv", [sys.executable, "-m", "bench.report_rollout", str(rollouts)], 10,
            read=reported("rollout"),
        ),
        *(training(size, share, capped, scratch) for size, share in (("0.5b", 45), ("1.5b", 75), ("3b", 120))),
        # Slow and picky, so they come last and get what time is left.
        sanitizer("racecheck", 30, [*pytest, SMALL_SET], "--kernel-name-exclude", LIBRARY_KERNELS),
        sanitizer("initcheck", 25, [*pytest, SMALL_SET]),
    ]  # fmt: skip


def built(nvcc: str | None) -> Callable:
    def read(code, output):
        found = exit_status(code, output)
        words = "for CPU and GPU" if nvcc else "for the CPU alone: there is no nvcc here"
        return found if found.failures else Findings(words)

    return read


def doctor(nvcc: str | None) -> Callable:
    """What the package says of its own build; with nvcc at hand the CUDA kernels must have been found."""

    def read(code, output):
        words = next((line for line in output.splitlines() if line.startswith("Compiled part: ")), "")
        failures = exit_status(code, output).failures
        if not failures and nvcc and words != "Compiled part: built for CPU and CUDA.":
            failures = (f"the compiled CUDA kernels are not in use: {words or last_line(output)}",)
        return Findings(words.removeprefix("Compiled part: ").rstrip("."), failures=failures)

    return read


def tests_in(report: Path) -> Callable:
    """Reads pytest's JUnit report. A test that only lacks one of TEST_PACKAGES is left out, not failed."""

    def read(code, output):
        if not report.exists():
            return Findings(failures=(f"pytest wrote no report: {last_line(output)}",))
        counts, absent, failed = Counter(), Counter(), defaultdict(list)
        for case in ElementTree.parse(report).iter("testcase"):
            bad = [node for node in case if node.tag in ("failure", "error")]
            if not bad:
                counts["skipped" if case.find("skipped") is not None else "passed"] += 1
            elif package := lacking(bad[0].text or ""):
                absent[package] += 1
            else:
                counts["failed"] += 1
                where = "::".join(filter(None, (case.get("classname", "").replace(".", "/"), case.get("name"))))
                failed[first_line(bad[0].get("message") or bad[0].text or "")].append(where)
        failures = [  # one cause may fail many tests
            names[0] + (f" and {len(names) - 1} more" if names[1:] else "") + f": {why}"
            for why, names in failed.items()
        ]
        if code not in (None, 0, 1):
            failures.append(f"pytest ended with status {code}: {last_line(output)}")
        notes = [f"{count} tests or files: need {package}" for package, count in sorted(absent.items())]
        words = ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped"))
        return Findings(
            words, dict(counts) | {"left_out": dict(absent), "failed_tests": failed}, tuple(failures), tuple(notes)
        )

    return read


def lacking(text: str) -> str | None:
    """The package of TEST_PACKAGES whose absence the text of a failure names."""
    named = set(re.findall(r"No module named '?(\w+)", text))
    return next((p for p in TEST_PACKAGES if p in named and importlib.util.find_spec(p) is None), None)


def trained(summary: Path) -> Callable:
    """Reads the run's summary.json; training that did not raise held-out accuracy has failed."""

    def read(code, output):
        if code != 0 or not summary.exists():
            return exit_status(code, output)
        run = json.loads(summary.read_text(encoding="utf-8"))
        before, after = run["eval_before"], run["eval_after"]
        words = (
            f"held-out accuracy {before:.3f} -> {after:.3f} in {run['steps']} steps, {run['wall_seconds']:.0f} s, "
            f"{run['peak_memory_bytes'] / 1e9:.2f} GB of GPU memory at most"
        )
        failures = () if after > before else (f"held-out accuracy did not rise: {before:.3f} -> {after:.3f}",)
        names = ("eval_before", "eval_after", "steps", "sampled_tokens", "wall_seconds", "peak_memory_bytes")
        return Findings(words, {name: run[name] for name in names}, failures)

    return read


def timed(measurements: Path) -> Callable:
    """Reads the loss benchmark's measurements: ours over the bare GEMMs at the main shapes, memory at the longest."""

    def read(code, output):
        failures = tuple(failed_tests(code, output))
        if not measurements.exists():
            return Findings(failures=failures or (f"nothing was measured: {last_line(output)}",))
        rows = rows_of(json.loads(measurements.read_text(encoding="utf-8"))["benchmarks"])
        ours = [row for row in rows if row["provider"] == "toolx" and row["what"] == "both" and not row["dead"]]
        ratios = [
            f"{row['to_floor']:.2f} (D={row['d']}, {'frozen' if row['frozen'] else 'trained'} head)"
            for row in ours if row["n"] == 8192 and row["to_floor"]
        ]  # fmt: skip
        memory = {row["n"]: row["mib_beyond_gradients"] for row in ours}
        wrong = [f"wrong: {case_name(row)}" for row in rows if row["provider"] == "toolx" and row["wrong"]]
        words = f"time over the bare GEMMs: {', '.join(ratios) or 'not measured'}"
        if memory:
            words += f"; {memory[max(memory)]:.0f} MiB beyond gradients at N={max(memory)}"
        return Findings(words, {"to_floor": ratios, "mib_beyond_gradients": memory}, (*failures, *wrong))

    return read


def sampled(measurements: Path) -> Callable:
    """Reads the rollout benchmark's measurements: ours at every shape, beside transformers' continuous batching."""

    def read(code, output):
        failures = tuple(failed_tests(code, output))
        if not measurements.exists():
            return Findings(failures=failures or (f"nothing was measured: {last_line(output)}",))
        rows = report_rollout.rows_of(json.loads(measurements.read_text(encoding="utf-8"))["benchmarks"])
        peers = {row["model"]: row for row in rows if row["provider"] == "transformers continuous batching"}
        words, figures = [], {}
        for row in (row for row in rows if row["provider"] == "toolx"):
            peer = peers.get(row["model"], {"speedup_of_toolx": None, "absent": "not measured"})
            faster = peer["speedup_of_toolx"]
            slower = f"{faster:.1f} times slower" if faster else f"absent ({peer['absent']})"
            words.append(
                f"{row['model']}: {row['tokens_per_s']:,.0f} tokens/s, {row['share_of_bandwidth']:.0%} of the "
                f"bandwidth floor, transformers' continuous batching {slower}"
            )
            names = ("tokens_per_s", "step_ms", "share_of_bandwidth", "step_to_floor", "kv_mib", "kv_share", "peak_mib")
            figures[row["model"]] = {name: row[name] for name in names} | {"continuous_batching_slower": faster}
        notes = dict.fromkeys(f"{row['provider']}: {row['absent']}" for row in rows if row["absent"])
        return Findings("; ".join(words) or "not measured", figures, failures, tuple(notes))

    return read


def training(size: str, share: float, capped: dict[str, str], scratch: Path) -> Step:
    """Five optimizer steps of one shape under the cap; see ``bench.gpu.training``."""
    found = scratch / f"steps-{size}.json"
    command = [sys.executable, "-m", "bench.gpu.training", size, str(found)]
    return Step(f"steps-{size}", command, share, env=capped, read=stepped(found))


def stepped(found: Path) -> Callable:
    """Reads what the steps of one shape took; a plan that is off by more than a tenth has failed."""

    def read(code, output):
        if code != 0 or not found.exists():
            return exit_status(code, output)
        run = json.loads(found.read_text(encoding="utf-8"))
        peaks = f"planned {run['planned_bytes'] / 1e9:.2f} GB, measured {run['measured_bytes'] / 1e9:.2f} GB"
        words = (
            f"{run['model']}, {run['optim']}: {run['step_s']:.1f} s a step, {run['trained_tokens'][0]:,} tokens in its "
            f"training pass; {peaks}; {run['moved']:.1%} of weights moved"
        )
        failures = []
        if not abs(run["planned_by_measured"] - 1) <= PLAN_TOLERANCE:
            failures.append(f"{run['model']}: {peaks}")
        if not run["moved"] > 0:
            failures.append(f"{run['model']}: no weight moved in {len(run['steps_s'])} steps with {run['optim']}")
        return Findings(words, run, tuple(failures))

    return read


def failed_tests(code: int | None, output: str) -> Sequence[str]:
    """The tests that pytest names as failed; without one, what its exit status says."""
    return re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE) or exit_status(code, output).failures


def reported(name: str) -> Callable:
    def read(code, output):
        return exit_status(code, output) if code else Findings(f"{name}.csv, {name}.md and plots")

    return read


def sanitizer(tool: str, share: float, command: list[str], *options: str) -> Step:
    """``command`` under one tool of NVIDIA's compute-sanitizer; every error that it reports is a failure.

    Except for errors of CUDA API calls: libraries look for newer functions than the driver has, and go on without.
    """
    beside_nvcc = Path("/usr/local/cuda/bin/compute-sanitizer")
    binary = shutil.which("compute-sanitizer") or (str(beside_nvcc) if beside_nvcc.exists() else None)
    return Step(
        tool,
        [
            str(binary), "--tool", tool, "--target-processes", "application-only", "--print-limit", "20",
            "--report-api-errors", "no", *options, *command,
        ],
        share,
        # Without torch's cache every tensor is an allocation of its own, whose bounds the tool can see.
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        read=sanitized,
        skip="" if binary else "there is no compute-sanitizer here: it comes with the CUDA toolkit",
    )  # fmt: skip


def sanitized(code: int | None, output: str) -> Findings:
    if "Device not supported" in output:
        return Findings(skipped="compute-sanitizer does not support this device or its virtual machine")
    reports = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", output, re.MULTILINE)
    if not reports:
        return Findings(failures=() if code is None else (f"no report, status {code}: {last_line(output)}",))
    errors = sum(int(count) for report in reports for count in re.findall(r"(\d+) errors?\b", report))
    failures = exit_status(code, output).failures
    if errors:
        first = re.search(
            r"^=+ ((?:Error: )?(?:Invalid|Uninitialized|Race|Program|Misaligned).*)$", output, re.MULTILINE
        )
        failures = (f"{errors} errors; the first: {first[1] if first else reports[0]}", *failures)
    return Findings(f"{SMALL_SET}: {reports[-1]}", {"errors": errors}, failures)


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:160]
