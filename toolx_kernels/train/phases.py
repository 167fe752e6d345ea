"""Phases of a run: their seconds and peak memory, and the bar that shows them."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from toolx_kernels.progress import ProgressBar


class Phases:
    """Measures seconds and peak memory of a run by phase: "rollout", "forward", ...

    A nested phase is not part of the outer one: its seconds and its peak count only for itself. So the seconds of all
    phases add up to the total time in phases. On a GPU a phase ends when its kernels have finished, which costs one
    wait for the device at each change.

    seconds   by phase
    peaks     bytes by phase: on a GPU of torch's tensors; on a CPU the resident memory of the process, or, if its
              high-water mark cannot be reset, the maximum since the process began
    bar       the progress bar of the run; by default a hidden one
    """

    def __init__(self, device: torch.device, bar: ProgressBar | None = None):
        self.device, self.bar = device, bar or ProgressBar(shown=False)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._switch()
        self._running.append(name)
        try:
            yield
        finally:
            self._switch()
            self._running.pop()

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """Returns the seconds added since ``seconds`` was ``before``."""
        return {n: spent - before.get(n, 0.0) for n, spent in self.seconds.items() if spent > before.get(n, 0.0)}

    def _switch(self) -> None:
        """Records time and peak of the phase that ends or is interrupted, and resets both."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            name = self._running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
            self.peaks[name] = max(self.peaks.get(name, 0), self._peak())
        self._since = now
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # not Linux, or a container that does not allow it
                pass

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
