"""``make gpu`` without a GPU: the whole run at toy size, its runner with made-up facts, its parsers of output."""

import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import commands, facts, machine, runner
from bench.gpu.runner import Bench, Command, Fact, Journal, find_all, read_journal
from bench.gpu.summary import CLAIMS, summary
from bench.gpu.training import capped
from bench.rollout.cases import SHAPES
from toolx_kernels.engine import engine

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def gpu_run(*arguments, out, **environment):
    env = os.environ | {"OUT": str(out), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)


def test_the_whole_run_at_toy_size(tmp_path):
    done = gpu_run("--toy", "--minutes", "9", out=tmp_path)
    found = read_journal(tmp_path / "facts.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["status"] for line in found.values()} == {"ok", "skipped"}
    suites = {f"tests/{name}" for name in ("every op", "engine", "ops", "train", "toolcall")}
    skipped = {name for name, line in found.items() if line["status"] == "skipped"}
    assert skipped == suites | {"build", "memcheck", "racecheck", "initcheck"}
    assert found["loss/exact bf16"]["weight"] < 4e-3
    assert found["train/steps 0.5b"]["moved"] > 0 and found["train/steps 0.5b"]["measured_bytes"] > 0
    assert found["train/tiny"]["steps"] == 1
    assert found["loss/time D=896 trained"]["to_floor"] > 0
    assert found["rollout/kernels"]["kernels"] and found["train/kernels"]["kernels"]
    text = (tmp_path / "summary.md").read_text()
    assert text in done.stdout and "No failures." in text and "no figure means anything" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["facts.jsonl", "logs.tar.gz", "summary.md"]
    for folder in (str(ROOT), str(Path.home()), sys.prefix):
        assert folder not in text and folder not in (tmp_path / "facts.jsonl").read_text()

    # all requested facts are known, so none is measured again
    again = gpu_run(
        "--toy", "--only", "loss/exact*", "loss/waits", "--known", str(tmp_path / "facts.jsonl"), out=tmp_path / "again"
    )
    assert again.returncode == 0 and "loss/exact bf16: " not in again.stdout
    assert read_journal(tmp_path / "again" / "facts.jsonl") == gpu.kept(found, restarted=False)


# ---- the runner


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "logs").mkdir()
    return Bench(CPU, True, tmp_path, tmp_path / "logs")


def found_of(built_in, bench, seconds=20.0, known=None, restart=None):
    journal = Journal(bench.scratch / "facts.jsonl", known or {})
    find_all(built_in, journal, bench, time.monotonic() + seconds, restart or (lambda: pytest.fail("restarted")))
    assert read_journal(journal.path) == journal.facts
    return journal.facts


def command(name, code="pass", seconds=0.1, read=commands.exit_status, **others):
    return Command(name, seconds, [sys.executable, "-S", "-c", code], read, **others)


def fails(bench):
    raise ValueError("almost")


def running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


HANGS = """
import subprocess, sys, time
child = subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 60"])
try:
    print("child", child.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("written after the interrupt", flush=True)
"""


def test_nothing_stops_the_next_fact_and_all_outcomes_are_told_apart(bench):
    found = found_of(
        [
            Fact("good", 0.1, lambda bench: {"n": 1, "share": 0.25}),
            Fact("raises", 0.1, fails),
            Fact("wrong", 0.1, lambda bench: {"error_of_x": 2.0, "failures": ["x is off by 2"]}),
            command("bad command", "raise SystemExit('the reason')"),
            command("absent", skip="no such tool here"),
            Fact("too long", 90, lambda bench: {}),
            command("progress", "print('1%\\r2%\\rdone')", read=lambda code, output: {"words": output.strip()}),
        ],
        bench,
    )
    assert [line["status"] for line in found.values()] == ["ok", *["failed"] * 3, "skipped", "no time", "ok"]
    assert found["good"]["share"] == 0.25 and found["raises"]["error"] == "ValueError: almost"
    assert found["bad command"]["failures"] == ["exit status 1: the reason"] and found["progress"]["words"] == "done"


def test_a_command_out_of_time_is_interrupted_and_then_killed_with_all_it_started(bench):
    job = runner.Job(command("hangs", HANGS), bench)
    while "child" not in job.log.read_text():
        time.sleep(0.01)
    code, output = job.wait(0.1)
    assert code is None and "written after the interrupt" in output
    while running(output.split()[1]):  # killed, it ends soon; if it never did, neither would this loop
        time.sleep(0.01)


def test_a_measurement_that_takes_too_long_is_given_up(bench):
    found = found_of([Fact("slow", 0.1, lambda bench: time.sleep(30)), Fact("next", 0, lambda bench: {})], bench, 2.0)
    assert found["slow"]["error"].startswith("OutOfTime: given up after 1 s") and found["next"]["status"] == "ok"


def test_a_broken_or_hanging_process_starts_anew(bench, monkeypatch):
    class Restarted(Exception):
        pass

    def restart():
        raise Restarted

    def broken(bench):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(runner, "synchronize", broken)  # like every later call into CUDA
    with pytest.raises(Restarted):
        found_of([Fact("breaks", 0.1, fails), Fact("never reached", 0.1, lambda bench: {})], bench, restart=restart)
    assert list(read_journal(bench.scratch / "facts.jsonl")) == ["breaks"]

    monkeypatch.undo()
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.2)
    restarts = threading.Event()

    def deaf(bench):
        while not restarts.is_set():
            try:
                restarts.wait(5)
            except runner.OutOfTime:  # signals do not interrupt a wait inside the driver
                pass
        return {}

    found_of([Fact("hangs", 0.1, deaf)], bench, seconds=1.5, restart=restarts.set)
    lines = [json.loads(line) for line in (bench.scratch / "facts.jsonl").read_text().splitlines()]
    assert lines[0]["status"] == "failed" and lines[0]["error"].startswith("hangs: nothing came back for ")


def test_a_restart_keeps_what_was_found_and_does_not_repeat_what_failed(tmp_path, monkeypatch):
    executed = []
    monkeypatch.setattr(runner.os, "execv", lambda program, arguments: executed.append(arguments))
    runner.restart_with(["--minutes", "3.00", "--restarted"])
    assert executed == [[sys.executable, "-m", "bench.gpu", "--minutes", "3.00", "--restarted"]]
    known = {name: {"fact": name, "status": name} for name in ("ok", "skipped", "failed", "no time")}
    known["machine"] = {"fact": "machine", "status": "ok"}  # possibly another machine, commit and build
    assert list(gpu.kept(known, restarted=True)) == ["ok", "skipped", "failed", "machine"]
    assert list(gpu.kept(known, restarted=False)) == ["ok", "skipped"]


def test_a_command_runs_beside_the_facts_before_its_turn(bench):
    mark = bench.scratch / "mark"

    def sees_it(bench):
        deadline = time.monotonic() + 10
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return {"seen": mark.exists()}

    found = found_of([Fact("first", 0.1, sees_it), command("job", f"open({str(mark)!r}, 'w')", beside="first")], bench)
    assert found["first"]["seen"] and found["job"]["status"] == "ok"


def test_the_journal_survives_being_cut_off(tmp_path):
    path = tmp_path / "facts.jsonl"
    journal = Journal(path, {"old": {"fact": "old", "status": "ok"}}, lambda text: text.replace("/secret", "."))
    journal.write("new", "failed", error="in /secret/place")
    with open(path, "a") as file:
        file.write('{"fact": "half of a li')
    assert read_journal(path) == {
        "old": {"fact": "old", "status": "ok"},
        "new": {"fact": "new", "status": "failed", "at": 0.0, "commit": "", "error": "in ./place"},
    }


# ---- the command line


def test_bad_arguments_and_missing_packages_are_one_sentence(tmp_path, monkeypatch, capsys):
    done = gpu_run(out=tmp_path / "none")
    assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "none").exists()
    assert done.stderr.startswith("make gpu: torch ") and done.stderr.count("\n") == 1
    for arguments, sentence in (
        (["--minutes", "0"], "--minutes 0 must be more than 0, and at most 10,000."),
        (["--minutes", "inf"], "--minutes inf must be more than 0, and at most 10,000."),
        (["--known", "not/there"], "--known not/there does not exist: name the facts.jsonl of an earlier run."),
    ):
        assert gpu.main(arguments) == 1
        assert capsys.readouterr().err == f"make gpu: {sentence}\n"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--toy", "--only", "nothing"]) == 1
    assert "--only nothing names no fact" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "not_here_at_all"))
    assert gpu.main([]) == 1
    assert "has no not_here_at_all: install it, or use another Python: make gpu PYTHON=" in capsys.readouterr().err


def test_results_are_named_after_the_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.folder_of("NVIDIA H100 80GB HBM3") == tmp_path / "bench/results/nvidia-h100-80gb-hbm3"


# ---- the facts


def test_facts_have_names_of_their_own_and_run_what_exists(bench, monkeypatch):
    whole = Bench(CPU, False, bench.scratch, bench.logs)
    found = [*machine.facts(whole), *facts.facts(whole)]
    names = [fact.name for fact in found]
    assert len(names) == len(set(names))
    assert all(fact.beside in ("", *names) for fact in found if isinstance(fact, Command))
    files = {word for fact in found if isinstance(fact, Command) for word in fact.command if word.startswith("tests")}
    assert files and all((ROOT / file).exists() for file in files)
    shapes = {name.split()[-1] for name in names if name.startswith("rollout/") and "shape" in name}
    assert shapes and shapes <= SHAPES.keys()
    before_peers = found[: names.index("loss/peers D=896 trained")]
    assert {"rollout/time qwen2.5-0.5b-shape", "memcheck", "train/steps 3b"} <= {fact.name for fact in before_peers}
    assert sum(fact.seconds for fact in found[: names.index("train/kernels") + 1]) < 6 * 60


def test_each_claim_is_a_sentence_of_the_readme_and_is_decided_by_facts(bench):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    readme = " ".join(" ".join(page.read_text() for page in pages).split())
    whole = Bench(CPU, False, bench.scratch, bench.logs)
    names = {fact.name for fact in facts.facts(whole)}
    for claim in CLAIMS:
        assert claim.text in readme and set(claim.facts) <= names, claim.text


def line(name, status="ok", **found):
    return {"fact": name, "status": status, "seconds": 1.0, **found}


def test_the_summary_judges_claims_and_ends_with_the_failures():
    loss = "loss/time D=896 "
    built_in = [
        line("machine", device="NVIDIA H100", torch="2.11.0"),
        line(loss + "trained", ms=10.0, floor_ms=9.0, mib_beyond_gradients=900.0, workspace_mib=512),
        line(loss + "50% dead", ms=5.2),
        line(loss + "frozen", ms=9.0),
        line("rollout/exact", "failed", logprob_difference=2e-4, graphs=3, failures=["log-probs | differ"]),
        line("loss/kernels D=896", kernels=[["sweep_kernel", 6, 3.25]]),
        line("train/tiny", "failed", error="ValueError: almost", trace="..."),
    ]
    text = summary({entry["fact"]: entry for entry in built_in})
    claims = {row.split(" | ")[0]: row.split(" | ")[1:] for row in text.splitlines() if row.startswith("| ")}
    assert claims["| groups of equal reward never enter"] == ["yes", "0.52 of the time with half of the groups dead |"]
    assert claims["| a frozen head gets no weight gradient"][0] == "**no**"
    assert claims["| a bounded workspace holds a chunk of them"][0] == "not measured"
    agreement = "| `linear_logprob` on the same tokens gives the same log-probs (1e-4 in fp32, tested)"
    assert claims[agreement][0] == "**no**"
    assert "- sweep_kernel x 6: 3.25" in text and text.startswith("# NVIDIA H100\n\ntorch 2.11.0.\n")
    assert text.endswith("Failures:\n\n- rollout/exact: log-probs | differ\n- train/tiny: ValueError: almost\n")
    many = line("tests/ops", "failed", failures=[f"test_{i}: wrong" for i in range(80)])
    assert summary({"tests/ops": many}).endswith("- and 50 more: see facts.jsonl\n")


# ---- output of commands

SUITE = {
    "test_a.py": "import pytest\n"
    "def test_good(): pass\n"
    "@pytest.mark.parametrize('i', [0, 1])\n"
    "def test_bad(i): raise ValueError('one is not two')\n"
    "@pytest.mark.skip(reason='no reason')\n"
    "def test_not(): pass\n"
    "def test_lacking(): import not_here_at_all\n",
    "test_b.py": "import not_here_at_all\n",
    "test_c.py": "import nor_this\n",
}


@pytest.mark.parametrize("spread", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_the_reader_of_a_test_run(tmp_path, monkeypatch, spread):
    if spread:
        pytest.importorskip("xdist")
    for name, text in SUITE.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(commands, "TEST_PACKAGES", ("not_here_at_all",))
    command, env = [*commands.PYTEST, *spread, "-ra", "."], os.environ | commands.QUIET
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    found = commands.tested(done.returncode, done.stdout)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 3, 1)
    assert found["left_out"] == {"not_here_at_all": 2}
    assert set(found["failed_tests"]) == {"test_a.py::test_bad[0]", "test_a.py::test_bad[1]", "test_c.py"}
    twice = re.compile(r"test_a.py::test_bad\[.\] and 1 more: ValueError: one is not two")
    assert any(map(twice.match, found["failures"]))
    cut_off = done.stdout[: done.stdout.index("===== FAILURES")]
    found = commands.tested(None, cut_off)
    assert found["passed"] == 1 and found["failures"][-1] == "out of time"
    assert commands.tested(4, "usage error")["failures"] == ["pytest ended with status 4: usage error"]


@pytest.mark.parametrize(
    "code, output, errors, failures",
    [
        (0, "t.py::a PASSED\n========= ERROR SUMMARY: 0 errors\n", 0, 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, 0),
        (0, "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warnings)\n", 2, 1),
        (1, "========= ERROR SUMMARY: 0 errors\n1 failed\n", 0, 1),
        (1, "========= Error: Target application terminated before first instrumented API call\n", None, 1),
        (None, "t.py::a PASSED\n", None, 1),
    ],
)
def test_reports_of_compute_sanitizer(code, output, errors, failures):
    found = commands.sanitized(code, "========= COMPUTE-SANITIZER\n" + output)
    assert found.get("errors") == errors and len(found.get("failures", ())) == failures


def test_the_first_error_of_compute_sanitizer_is_named():
    output = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ write of size 4 bytes\n"
        "=========     at sweep_kernel+0x2a0\n"
        "========= ERROR SUMMARY: 12 errors\n"
    )
    assert commands.sanitized(0, output)["failures"] == [
        "12 errors; the first: Invalid __global__ write of size 4 bytes"
    ]
    assert commands.sanitized(1, "========= Error: Device not supported. Refer to ...")["why"]


def test_sanitizers_run_without_graphs(monkeypatch):
    monkeypatch.setattr(commands.shutil, "which", lambda name: "/cuda/bin/compute-sanitizer")
    watched = commands.sanitizer("memcheck", 60, toy=False)
    plugin = watched.command[watched.command.index("bench.gpu.eager") - 1 :][:2]
    assert plugin == ["-p", "bench.gpu.eager"] and watched.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
    monkeypatch.setattr(engine, "capture_cuda_graph", engine.capture_cuda_graph)  # restored afterwards
    importlib.reload(importlib.import_module("bench.gpu.eager"))
    assert engine.capture_cuda_graph is None


# ---- training


def test_training_may_take_24_gb_of_a_larger_card(monkeypatch):
    class Card:
        total_memory = 80_000_000_000

    fractions = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with capped(torch.device("cuda")):
        assert fractions == [0.3]
    assert fractions == [0.3, 1.0]
