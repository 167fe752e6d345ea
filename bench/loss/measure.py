"""How a case is measured: every provider is checked against float64, then all are timed in turn in one process.

A round calls each provider once, so that a change of clock or a neighbour's load meets all of them; the figure is
each provider's median over the rounds. Peak memory comes from calls of their own, which also warm up. On
a CPU a peer that needs several times our time is timed in the first round alone, because some take half a minute.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from bench.loss.providers import PEERS, Absent, Floor, LiveFloor, Problem, Provider, Toolx, make_problem
from toolx_kernels import reference
from toolx_kernels.loss_config import GRPOLossConfig

MIB = 2**20
SLOW = 4  # times our time
# Relative errors (absolute for log-probs) beyond which a provider is called wrong: several times what the rounding of
# its inputs, TF32 in fp32, and sums in bf16 explain.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the benchmark. ``what`` is forward, backward or both; ``dead`` the share of rows without gradient."""

    what: str
    n: int
    d: int
    v: int
    dtype: str = "bfloat16"
    dead: float = 0.0
    frozen: bool = False

    def __str__(self) -> str:
        head = "frozen" if self.frozen else "trained"
        dtype = {"bfloat16": "bf16", "float32": "fp32"}[self.dtype]
        return f"{self.what}-N{self.n}-D{self.d}-V{self.v}-{dtype}-dead{self.dead:.0%}-{head}"


def errors(provider: Provider, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Largest log-prob error and relative (Frobenius) gradient errors against float64 on a small ragged shape."""
    p = make_problem(192, 128, 5003, dtype=dtype, device=device, dead=0.25)
    hidden, weight = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))
    truth = reference.linear_grpo_loss(
        hidden, weight, p.targets, cu_seqlens=p.cu_seqlens, advantages=p.advantages.double(),
        config=GRPOLossConfig(compute_all_logprobs=True),
    )  # fmt: skip
    truth.loss.backward()
    provider.stage("both", p)()
    found = {
        "hidden": float((p.hidden.grad - hidden.grad).norm() / hidden.grad.norm()),
        "weight": float((p.weight.grad - weight.grad).norm() / weight.grad.norm()),
    }
    if "forward" in provider.passes:
        found["logprobs"] = float((provider.stage("forward", p)() - truth.logprobs).abs().max())
    return found


def why_absent(package: str | None, error: Exception) -> str:
    """One line on why a provider cannot run."""
    if isinstance(error, Absent):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install {package}"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


@lru_cache
def load(kind: type[Provider], dtype: torch.dtype, device: torch.device) -> tuple[Provider | None, str | dict]:
    """The provider and its errors, or None and the reason why it cannot run here."""
    try:
        provider = kind(device)
        return provider, {} if issubclass(kind, Floor) else errors(provider, dtype, device)
    except Exception as error:  # a peer may fail in any way of its own, and is then named with it
        if kind not in PEERS:
            raise
        return None, why_absent(kind.package, error)


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def added_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``call`` needs at its peak beyond what was in use before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # memory that malloc kept would be filled again unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


def gradient_bytes(p: Problem, what: str) -> int:
    """Bytes of the gradients, and of an fp32 accumulator of the weight's gradient where that is not fp32 itself."""
    if what == "forward":
        return 0
    total = p.hidden.nbytes
    if p.weight.requires_grad:
        total += p.weight.nbytes + (4 * p.weight.numel() if p.weight.itemsize < 4 else 0)
    return total


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def admit(kind: type[Provider], case: Case, problem: Problem, device: torch.device) -> tuple[Provider | None, dict]:
    """Checks a provider, runs it once and measures its memory. Returns None where it cannot run, and its record."""
    dtype = problem.hidden.dtype
    provider, found = load(kind, dtype, device)
    if provider is None:
        return None, {"provider": kind.name, "absent": found}
    try:
        # On a GPU the first call also tunes, which needs memory of its own.
        for _ in range(2 if device.type == "cuda" else 1):
            peak = added_peak(provider.stage(case.what, problem), device)
    except Exception as error:  # out of memory, mostly: that is a result, not a fault of the benchmark
        if kind is Toolx:
            raise
        return None, {"provider": kind.name, "absent": why_absent(kind.package, error)}
    finally:
        problem.hidden.grad = problem.weight.grad = None
    wrong = any(not error <= TOLERANCE[dtype] for error in found.values())
    record = {"provider": kind.name, "errors": found, "wrong": wrong}
    if not isinstance(provider, Floor) and case.what != "backward":
        record["mib"] = round(peak / MIB, 1)
        record["mib_beyond_gradients"] = round((peak - gradient_bytes(problem, case.what)) / MIB, 1)
    return provider, record


def measure(benchmark, case: Case, kinds: Sequence[type[Provider]], device: torch.device, rounds: int = 3) -> list:
    """Times ``kinds`` on one case and returns a record each; one that cannot run has ``absent``, the reason, instead.

    ``benchmark`` is pytest-benchmark's fixture. It times ours; the others run in the set-up of each of its rounds.
    """
    dtype = getattr(torch, case.dtype)
    problem = make_problem(case.n, case.d, case.v, dtype=dtype, device=device, dead=case.dead, frozen=case.frozen)
    records, runners, times = {}, {}, {}
    for kind in kinds:
        if case.what not in kind.passes or (kind is LiveFloor and not case.dead):
            continue
        provider, records[kind.name] = admit(kind, case, problem, device)
        if provider is not None:
            runners[kind.name], times[kind.name] = provider, []

    def run(name, call):
        times[name].append(seconds(call, device))
        problem.hidden.grad = problem.weight.grad = None

    def once_is_enough(name):
        ours = times[Toolx.name]
        return device.type == "cpu" and ours and isinstance(runners[name], PEERS) and times[name][0] > SLOW * ours[0]

    def others():
        for name, provider in runners.items():
            if name != Toolx.name and not once_is_enough(name):
                run(name, provider.stage(case.what, problem))
        return (Toolx.name, runners[Toolx.name].stage(case.what, problem)), {}

    benchmark.pedantic(run, setup=others, rounds=rounds, iterations=1)
    for name, taken in times.items():
        records[name] |= {"ms": round(1e3 * median(taken), 3), "rounds_ms": [round(1e3 * t, 3) for t in taken]}
    benchmark.extra_info |= {"case": asdict(case), "records": list(records.values())}
    return list(records.values())


def machine() -> dict[str, str | int]:
    """What was measured on and with; ``slug`` names the folder of the results. No host, user or path."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        device = slug = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        device = re.sub(r"\((R|TM)\)", "", cpu[1]) if cpu else platform.machine()
        slug = f"{device} {cores} cores"
    facts = {
        "slug": re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-"),
        "device": device,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
    }
    for package in ("torch", "triton", *dict.fromkeys(kind.package for kind in PEERS if kind.package)):
        facts[package] = package_version(package)
    return facts


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
