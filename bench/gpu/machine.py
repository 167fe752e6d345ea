"""Machine, its peak rates, and the build: the facts that are found before the package is imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import date
from statistics import median

import torch

from bench.common.machine import package_version
from bench.common.timing import synchronize
from bench.gpu import commands
from bench.gpu.runner import Bench, Command, Fact, printed

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "setuptools",
    "peft",
    "torchao",
    "flash-attn",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "pytest",
    "pytest-xdist",
)


def facts(bench: Bench) -> Sequence[Fact | Command]:
    capability = torch.cuda.get_device_capability() if bench.device.type == "cuda" else (0, 0)
    return [
        Fact("machine", 2, machine),
        commands.build("{}.{}".format(*capability), toy=bench.toy),
        Fact("ceilings", 3, ceilings),
    ]


def machine(bench: Bench) -> dict:
    """Device and versions; no name of a host, user or folder."""
    found = {
        "device": "CPU",
        "toy": bench.toy,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_properties(bench.device)
        found |= {
            "device": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory_gib": round(device.total_memory / 2**30, 1),
            "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown",
            "cuda": torch.version.cuda,
            "nvcc": nvcc_version() or "absent",
        }
    return found | {package: package_version(package) for package in PACKAGES}


def nvcc_version() -> str | None:
    """The version of the nvcc that setup.py will use."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if found is None:
        return None
    output = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    return next(iter(re.findall(r"release ([\d.]+)", output)), None)


def ceilings(bench: Bench) -> dict:
    """Peak rates of this card: matrix products in bf16 and fp32, and a copy, with bytes read plus bytes written."""
    size, nbytes = (256, 1 << 20) if bench.toy else (8192, 1 << 30)
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), bench)
        found[f"{name}_tflops"] = float(f"{2 * size**3 / seconds / 1e12:.4g}")
    source = torch.empty(nbytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return found | {"copy_gb_s": round(2 * nbytes / median_seconds(lambda: target.copy_(source), bench) / 1e9, 1)}


def median_seconds(call: Callable[[], object], bench: Bench, rounds: int = 20) -> float:
    """Median seconds of one call; on a GPU between two events, so that the previous call hides the host's part."""
    times = []
    for _ in range(rounds + 2):
        if bench.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            times.append((begin, end))
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    synchronize(bench.device)
    return median(t if isinstance(t, float) else t[0].elapsed_time(t[1]) / 1e3 for t in times[2:])
