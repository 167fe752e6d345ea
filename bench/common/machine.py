"""Machine and package versions of a measurement."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def machine() -> dict[str, str | int]:
    """Device and versions of a measurement, without host, user or path; ``slug`` names the folder of the results."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        device = slug = torch.cuda.get_device_name()
    else:
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
        device = re.sub(r"\((R|TM)\)", "", cpu[1]) if cpu else platform.machine()
        slug = f"{device} {cores} cores"
    return {
        "slug": slug_of(slug),
        "device": device,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "torch": package_version("torch"),
        "triton": package_version("triton"),
    }


def slug_of(device: str) -> str:
    """The name of a device as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
