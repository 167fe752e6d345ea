"""Timing of calls, their peak memory, and rounds in which all providers take turns."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
SLOW = 4  # times our time: a provider that needs more is timed only in the first round


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def resident_bytes(field: str) -> int:
    """The size of this process in bytes: VmRSS (now) or VmHWM (the peak since ``reset_peak``)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # the peak would not show reuse of memory that malloc keeps
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Peak bytes in use since ``reset_peak``: of the process, or of torch's memory on the GPU."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident_bytes("VmHWM")


def added_peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``call`` needs at its peak beyond what was in use before."""
    reset_peak(device)
    before = torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes("VmRSS")
    call()
    synchronize(device)
    return peak(device) - before


def take_rounds(
    ours: Callable[..., object], others: Callable[[], tuple], rounds: int, benchmark: Any | None = None
) -> None:
    """Runs ``others``, and then ``ours`` with what ``others`` returned, ``rounds`` times.

    ``benchmark``, pytest-benchmark's fixture, times ``ours`` too.
    """
    if benchmark is not None:
        benchmark.pedantic(ours, setup=lambda: (others(), {}), rounds=rounds)
        return
    for _ in range(rounds):
        ours(*others())
