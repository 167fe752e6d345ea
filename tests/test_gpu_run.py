"""``make gpu`` without a GPU: the runner with made-up steps, and the readers of what the real steps print."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu import run, steps
from bench.gpu.run import Findings, Result, Step, run_all, summary
from bench.gpu.training import Peak, Run, take_steps
from bench.gpu.training import runs as gpu_runs
from bench.rollout_work import SHAPES
from bench.step_work import Case
from bench.test_loss import default_cases
from bench.test_rollout import cases as rollout_cases
from tests.ops.cases import DEVICE
from toolx_kernels import _library, cli
from toolx_kernels import doctor as toolx_doctor

ROOT = Path(__file__).resolve().parents[1]
FACTS = {
    "gpu": "NVIDIA GeForce RTX 4090", "machine": "nvidia-geforce-rtx-4090", "capability": "8.9",
    "memory_bytes": 25_252_331_520, "memory_allowed_bytes": 24_000_000_000, "driver": "580.1", "nvcc": None,
    "cuda": "13.0", "python": "3.12.3", "torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0",
    "pytest": "9.0", "commit": "abc1234", "date": "2026-01-01",
}  # fmt: skip
HANGS = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(["sh", "-c", "trap '' INT; exec sleep 60"])
print("child", child.pid, flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("written after the interrupt", flush=True)
"""


def step(name, code="pass", share=1.0, **others):
    return Step(name, [sys.executable, "-S", "-c", code], share, **others)


def running(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_no_failure_stops_the_next_step_and_all_are_told_apart(tmp_path):
    kept = []
    made_up = [
        step("good", "print('fine')", 1, read=lambda code, output: Findings(output.strip(), {"n": 1})),
        step("bad", "print('almost'); raise SystemExit('the reason')", 0.1),
        step("absent", share=0.1, skip="no such tool here"),
        step("hangs", HANGS, 0.1),
        step("after", "print('progress 1%\\rprogress 2%\\rdone in /secret/place')", 2),
    ]
    results = run_all(
        made_up, 4.5, tmp_path, lambda text: text.replace("/secret", "."), lambda done: kept.append(len(done))
    )
    assert [r.status for r in results] == ["ok", "failed", "skipped", "failed", "ok"]
    good, bad, absent, hangs, _ = results
    assert (good.words, good.figures) == ("fine", {"n": 1})
    assert bad.failures == ("exit status 1: the reason",)
    assert absent.words == "no such tool here"
    assert "out of time after" in hangs.failures[0] and 1 < hangs.seconds < 4
    log = (tmp_path / "hangs.log").read_text()
    assert "written after the interrupt" in log
    assert not running(log.split()[1])
    assert (tmp_path / "after.log").read_text() == "done in ./place\n"
    assert kept == [1, 2, 3, 4, 5]


def test_a_step_may_use_what_earlier_ones_left_but_not_what_is_gone(tmp_path, monkeypatch):
    clock, limits = [0.0], []
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])

    def execute(command, env, log, limit):
        log.touch()
        limits.append(limit)
        clock[0] += float(command[-1])
        return 0

    monkeypatch.setattr(run, "_execute", execute)
    planned = [step("quick", "2"), step("slow to end", "27.5"), step("late", "9"), step("last", "1")]
    results = run_all(planned, 40, tmp_path)  # 10 s for each
    assert limits == [10, 18, 10.5]
    assert [r.status for r in results] == ["ok", "ok", "not run", "ok"]
    assert [r.passed for r in results] == [True, True, False, True]
    assert summary("GPU", [], results).endswith("- late: not run, no time left for it\n")


def test_an_interrupt_ends_the_run_with_a_summary(tmp_path, monkeypatch):
    def interrupted(command, env, log, limit):
        log.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_execute", interrupted)
    results = run_all([step("first"), step("second")], 60, tmp_path)
    assert [(r.status, r.failures or r.words) for r in results] == [
        ("failed", ("interrupted",)),
        ("not run", "interrupted"),
    ]


def test_the_summary_ends_with_the_failures_and_fits_a_screen():
    many = tuple(f"test_{i}: wrong" for i in range(40))
    results = [
        Result("build", "failed", 3.0, "exit status 1: no | compiler", failures=("exit status 1: no | compiler",)),
        Result(
            "tests", "failed", 99.0, "800 passed, 40 failed", failures=many, notes=("7 tests or files: need scipy",)
        ),
        Result("loss", "ok", 60.0, "1.10 of the floor"),
    ]
    text = summary("NVIDIA H100", ["80 GiB."], results)
    table, _, failures = text.partition("\nFailures:\n")
    assert "| build | failed | 3 | exit status 1: no / compiler |" in table
    assert "- tests: 7 tests or files: need scipy" in table
    assert failures.split("\n")[1:3] == ["- build: exit status 1: no | compiler", "- tests: test_0: wrong"]
    assert failures.endswith("- and 29 more: see summary.json\n")
    assert len(text.splitlines()) < 40
    assert summary("GPU", [], results[2:]).endswith("No failures.\n")


def test_without_cuda_it_says_so_in_one_sentence_and_writes_nothing():
    before = set((ROOT / "bench/results").iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("make gpu: torch ") and done.stderr.count("\n") == 1
    assert set((ROOT / "bench/results").iterdir()) == before


def test_bad_flags_and_missing_packages_are_one_sentence(monkeypatch, capsys):
    assert gpu.main(["--minutes", "0"]) == 1
    assert capsys.readouterr().err == "make gpu: --minutes 0 must be more than 0.\n"
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "not_here_at_all"))
    assert gpu.main([]) == 1
    assert "has no not_here_at_all: install it, or name another: make gpu PYTHON=" in capsys.readouterr().err


def test_a_whole_run_writes_its_results_and_returns_one_after_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "ask", lambda env=None: dict(FACTS))
    made_up = [step("build", f"raise SystemExit('{tmp_path}/x.cu is wrong')"), step("tests")]
    monkeypatch.setattr(gpu, "steps", lambda facts, capped, scratch: made_up)
    assert gpu.main([]) == 1
    folder = tmp_path / "bench/results/nvidia-geforce-rtx-4090"
    record = json.loads((folder / "summary.json").read_text())
    assert record["steps"]["build"]["failures"] == ["exit status 1: ./x.cu is wrong"]
    assert record["steps"]["tests"]["status"] == "ok" and record["memory_allowed_bytes"] == 24e9
    text = (folder / "summary.md").read_text()
    assert text.startswith("# NVIDIA GeForce RTX 4090\n\n23.5 GiB, sm_89, driver 580.1, nvcc absent; torch 2.11.0")
    assert capsys.readouterr().out.endswith(text + "\n") and text.endswith("- build: exit status 1: ./x.cu is wrong\n")
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.rglob("*") if file.is_file())
    del made_up[0]
    assert gpu.main([]) == 0


FAKE_TORCH = """
import os
from types import SimpleNamespace as Namespace
total = 85_045_149_696
fraction = float(os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "a:1").rpartition(":")[2])
device = Namespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=total)
version = Namespace(cuda="13.0")
cuda = Namespace(
    is_available=lambda: True, get_device_properties=lambda index: device,
    get_per_process_memory_fraction=lambda index: fraction,
)
print("a library's greeting")
"""


def test_facts_of_a_machine_with_a_gpu(tmp_path, monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text(FAKE_TORCH)
    facts = gpu.ask()
    assert facts["machine"] == "nvidia-h100-80gb-hbm3" and facts["capability"] == "9.0"
    assert facts.keys() == FACTS.keys()
    assert "torch did not take the cap of 24 GB" in gpu.lines(facts)[1]
    capped = gpu.ask(gpu.memory_cap(facts["memory_bytes"]))
    assert "may take 24.0 GB of GPU memory" in gpu.lines(capped)[1]
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: no such file')")
    assert gpu.ask() == {"problem": "OSError: libcudart.so.13: no such file"}


def test_memory_is_capped_at_24_gb_on_larger_cards_only(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert gpu.memory_cap(16 * 2**30) == {}
    assert gpu.memory_cap(80_000_000_000) == {"PYTORCH_CUDA_ALLOC_CONF": "per_process_memory_fraction:0.300000"}
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    settings = "expandable_segments:True,per_process_memory_fraction:0.300000"
    assert gpu.memory_cap(80_000_000_000) == {"PYTORCH_ALLOC_CONF": settings}


def test_the_steps_name_what_exists(tmp_path):
    all_steps = {step.name: step for step in steps.steps(FACTS, {"CAP": "1"}, tmp_path)}
    files = (steps.SMALL_SET, "bench/report.py", "bench/report_rollout.py", "bench/test_rollout.py")
    assert all((ROOT / file).exists() for file in files)
    assert {"measure", "length"} <= default_cases().keys() and "measure" in rollout_cases()
    train = cli.parse_train(list(all_steps["train"].command[4:]))
    assert (train.device, train.max_steps, train.model) == ("cuda", 40, "tiny")
    sizes = [f"steps-{size}" for size in gpu_runs()]
    assert [name for name, each in all_steps.items() if "CAP" in each.env] == ["train", "loss", "rollout", *sizes]
    assert all(gpu_runs()[name.removeprefix("steps-")].case.model in SHAPES for name in sizes)
    assert all(all_steps[name].command[2:4] == ["bench.gpu.training", name.removeprefix("steps-")] for name in sizes)
    assert all_steps["build"].env == {"TOOLX_BUILD_EXT": "1", "TORCH_CUDA_ARCH_LIST": "8.9"}


def test_the_report_of_a_test_run(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('i', [0, 1])\n"
        "def test_bad(i): raise ValueError('one is not two')\n"
        "@pytest.mark.skip(reason='no reason')\n"
        "def test_not(): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import not_here_at_all\n")
    (tmp_path / "test_c.py").write_text("import nor_this\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "."]
    done = subprocess.run([*command, "--junitxml=report.xml"], cwd=tmp_path, capture_output=True, text=True)
    monkeypatch.setattr(steps, "TEST_PACKAGES", ("not_here_at_all",))
    found = steps.tests_in(tmp_path / "report.xml")(done.returncode, done.stdout)
    assert found.words == "1 passed, 3 failed, 1 skipped"
    assert found.notes == ("1 tests or files: need not_here_at_all",)
    unreadable, twice = sorted(found.failures, key=lambda failure: "test_a" in failure)
    assert unreadable.startswith("test_c: ")
    assert twice == "test_a::test_bad[0] and 1 more: ValueError: one is not two"
    assert found.figures["failed_tests"]["ValueError: one is not two"] == ["test_a::test_bad[0]", "test_a::test_bad[1]"]
    assert steps.tests_in(tmp_path / "none.xml")(4, "usage error").failures == ("pytest wrote no report: usage error",)


def test_training_that_does_not_raise_accuracy_has_failed(tmp_path):
    read = steps.trained(tmp_path / "summary.json")
    assert read(2, "toolx train: no GPU.").failures == ("exit status 2: toolx train: no GPU.",)
    record = {
        "eval_before": 0.05, "eval_after": 0.4, "steps": 40, "sampled_tokens": 10, "wall_seconds": 61.2,
        "peak_memory_bytes": 1.5e9,
    }  # fmt: skip
    for after, failures in ((0.4, ()), (0.05, ("held-out accuracy did not rise: 0.050 -> 0.050",))):
        (tmp_path / "summary.json").write_text(json.dumps(record | {"eval_after": after}))
        found = read(0, "")
        assert found.failures == failures and found.figures["eval_after"] == after
        assert f"{after:.3f} in 40 steps, 61 s, 1.50 GB of GPU memory" in found.words


@pytest.mark.parametrize(
    "code, output, errors, failures",
    [
        (0, "19 passed\n========= ERROR SUMMARY: 0 errors\n", 0, 0),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, 0),
        (0, "========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warnings)\n", 2, 1),
        (1, "========= ERROR SUMMARY: 0 errors\n1 failed\n", 0, 1),
        (1, "========= Error: Target application terminated before first instrumented API call\n", None, 1),
    ],
)
def test_reports_of_compute_sanitizer(code, output, errors, failures):
    found = steps.sanitized(code, "========= COMPUTE-SANITIZER\n" + output)
    assert found.figures.get("errors") == errors and len(found.failures) == failures


def test_the_first_error_of_compute_sanitizer_is_named():
    output = (
        "========= COMPUTE-SANITIZER\n"
        "========= Invalid __global__ write of size 4 bytes\n"
        "=========     at sweep_kernel+0x2a0\n"
        "========= ERROR SUMMARY: 12 errors\n"
    )
    assert steps.sanitized(0, output).failures == ("12 errors; the first: Invalid __global__ write of size 4 bytes",)
    assert steps.sanitized(1, "========= Error: Device not supported. Refer to ...").skipped


def test_figures_of_the_loss_benchmark(tmp_path):
    def measured(n, frozen, toolx_ms, wrong=False):
        case = dict(what="both", n=n, d=896, v=151_936, dtype="bfloat16", dead=0.0, frozen=frozen)
        ours = {"provider": "toolx", "ms": toolx_ms, "mib_beyond_gradients": 520.0, "wrong": wrong, "errors": {}}
        return {"name": "x", "extra_info": {"case": case, "records": [ours, {"provider": "floor", "ms": 10.0}]}}

    path, benchmarks = tmp_path / "loss.json", [measured(8192, False, 11.5), measured(8192, True, 11.0)]
    path.write_text(json.dumps({"benchmarks": [*benchmarks, measured(65_536, False, 99.0)]}))
    found = steps.timed(path)(0, "")
    assert found.failures == ()
    assert found.words == (
        "time over the bare GEMMs: 1.15 (D=896, trained head), 1.10 (D=896, frozen head); 520 MiB beyond gradients at "
        "N=65536"
    )
    path.write_text(json.dumps({"benchmarks": [measured(8192, False, 11.5, wrong=True)]}))
    found = steps.timed(path)(1, "FAILED bench/test_loss.py::test_loss[y] - OutOfMemoryError\n1 failed")
    assert found.failures[0] == "bench/test_loss.py::test_loss[y] - OutOfMemoryError"
    assert found.failures[1].startswith("wrong: ") and len(found.failures) == 2
    assert steps.timed(tmp_path / "none.json")(4, "usage").failures == ("exit status 4: usage",)


def test_figures_of_the_rollout_benchmark(tmp_path):
    continuous = "transformers continuous batching"

    def measured(model, peer):
        case = dict(model=model, dtype="bfloat16", prompts=32, length=1000, n=10, new=256, kv_duplicated_mib=400.0)
        floor = dict(ms=2.0, gemms_ms=1.5, kv_ms=0.5, bytes_ms=1.0, bandwidth_gb_s=3000.0, kv_mib=1.0, weight_mib=1.0)
        ours = {"provider": "toolx", "tokens_per_s": 40_000.0, "step_ms": 2.5, "kv_mib": 100.0}
        info = {"rollout_case": case, "floor": floor, "versions": {}}
        return {"name": "x", "extra_info": info | {"rollout": [ours, {"provider": continuous} | peer]}}

    path = tmp_path / "rollout.json"
    both = [measured("small", {"tokens_per_s": 10_000.0}), measured("large", {"absent": "9 of 10 tokens after 30 s"})]
    path.write_text(json.dumps({"benchmarks": [*both, {"name": "test_kv_write", "extra_info": {}}]}))
    found = steps.sampled(path)(0, "")
    assert found.failures == () and found.notes == (f"{continuous}: 9 of 10 tokens after 30 s",)
    assert found.words == (
        "small: 40,000 tokens/s, 40% of the bandwidth floor, transformers' continuous batching 4.0 times slower; "
        "large: 40,000 tokens/s, 40% of the bandwidth floor, transformers' continuous batching absent "
        "(9 of 10 tokens after 30 s)"
    )
    assert found.figures["small"]["continuous_batching_slower"] == 4 and found.figures["small"]["kv_share"] == 0.25
    failed = steps.sampled(path)(1, "FAILED bench/test_rollout.py::test_rollout[y] - OutOfMemoryError\n1 failed")
    assert failed.failures == ("bench/test_rollout.py::test_rollout[y] - OutOfMemoryError",)
    assert steps.sampled(tmp_path / "none.json")(4, "usage").failures == ("exit status 4: usage",)


def test_the_steps_of_a_shape_at_a_tiny_one(tmp_path):
    run = Run(Case("tiny", 3, 100, 4, 6, "bfloat16", rounds=2), "adamw")
    found = take_steps(run, DEVICE)
    assert len(found["steps_s"]) == 3 and 0 < sum(found["rollouts_s"]) < sum(found["steps_s"])
    # each prompt once: 96, 100 and 104 tokens, in which a word takes several
    assert all(3 * (96 + 4 * 5) - 12 <= tokens <= 3 * (100 + 4 * 5) for tokens in found["trained_tokens"])
    assert all(norm > 0 for norm in found["grad_norms"]) and 0 < found["moved"] < 1
    assert found["measured_bytes"] > found["planned_bytes"] * (0.5 if DEVICE.type == "cuda" else 1)  # of all of Python
    (tmp_path / "found.json").write_text(json.dumps(found | {"planned_by_measured": 1.05}))
    told = steps.stepped(tmp_path / "found.json")(0, "")
    assert told.words.startswith("tiny, adamw: ") and told.failures == () and told.figures["steps_s"]


@pytest.mark.parametrize(
    "change, failure",
    [
        ({"planned_by_measured": 0.89}, "planned 8.90 GB, measured 10.00 GB"),
        ({"planned_by_measured": 1.11}, "planned 8.90 GB, measured 10.00 GB"),
        ({"moved": 0.0}, "no weight moved in 2 steps with adamw_offload"),
    ],
)
def test_a_plan_far_off_and_weights_that_stay_have_failed(tmp_path, change, failure):
    found = {
        "model": "some-shape", "optim": "adamw_offload", "steps_s": [9.0, 7.0], "step_s": 7.0, "moved": 0.1,
        "trained_tokens": [113_600], "planned_bytes": 8_900_000_000, "measured_bytes": 10_000_000_000,
        "planned_by_measured": 0.95,
    }  # fmt: skip
    path = tmp_path / "found.json"
    path.write_text(json.dumps(found))
    told = steps.stepped(path)(0, "")
    assert told.failures == () and told.words == (
        "some-shape, adamw_offload: 7.0 s a step, 113,600 tokens in its training pass; planned 8.90 GB, "
        "measured 10.00 GB; 10.0% of weights moved"
    )
    path.write_text(json.dumps(found | change))
    assert steps.stepped(path)(0, "").failures == (f"some-shape: {failure}",)
    path.unlink()
    assert steps.stepped(path)(1, "torch.OutOfMemoryError: none left").failures == (
        "exit status 1: torch.OutOfMemoryError: none left",
    )


def test_the_peak_survives_that_others_set_it_back(monkeypatch):
    peaks, resets = iter([5, 9, 3]), []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device=None: resets.append(device))
    peak = Peak(torch.device("cuda"))
    with peak.watched():
        torch.cuda.reset_peak_memory_stats("cuda:0")
        torch.cuda.reset_peak_memory_stats()
    assert peak.bytes == 9 and resets == [None, "cuda:0", None]


def test_the_build_must_be_in_use_where_there_is_nvcc(monkeypatch):
    monkeypatch.setattr(_library, "compiled_error", None)
    monkeypatch.setattr(_library, "_compiled_ops", {"kv_write": {"CPU", "CUDA"}})
    monkeypatch.setattr(_library, "_has_kernel", lambda name, device: True)
    read = steps.doctor(nvcc="13.0")
    assert read(0, toolx_doctor.report()) == Findings("built for CPU and CUDA")
    monkeypatch.setattr(_library, "_compiled_ops", {"kv_write": {"CPU"}})
    assert "are not in use: Compiled part: built for the CPU." in read(0, toolx_doctor.report()).failures[0]
    assert steps.doctor(nvcc=None)(0, toolx_doctor.report()).failures == ()
