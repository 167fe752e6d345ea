"""Where the time and the memory of a run go, by phase."""

from __future__ import annotations

import time
from collections import Counter

import torch

from toolx_kernels.train.memory.plan import PeakMemory


class Phases(PeakMemory):
    """Adds up seconds, and keeps the most memory, under the name of what is going on: "rollout", "forward", ...

    A phase inside another one takes its seconds from it, so those of all phases add up to the time spent in any. On a
    GPU a phase ends when its kernels have, which costs one wait for the device at each change.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.seconds: Counter[str] = Counter()
        self._since = 0.0

    def since(self, before: Counter[str]) -> dict[str, float]:
        """The seconds that came since ``seconds`` was ``before``."""
        return {name: spent - before[name] for name, spent in self.seconds.items() if spent > before[name]}

    def _switch(self) -> None:
        """Books time and peak so far for the phase that ends or is interrupted."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
        super()._switch()
