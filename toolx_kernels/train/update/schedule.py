"""The learning-rate schedule: exponential decay."""

from __future__ import annotations

import math

from torch.optim import Optimizer

from toolx_kernels.errors import InputError


class ExponentialDecay:
    """``lr_k = lr_0 * max(factor**k, floor)`` with k the number of ``step()`` calls.

    ToolExpander decays by 0.8 (arXiv 2510.07737); the caller decides when to step (per round, epoch or update). Has the
    methods of torch's schedulers that a training loop calls. The rate is computed from k, not from the previous rate,
    so a resumed run gets the same rate to the last bit.

    Args:
        optimizer: its current rates are lr_0, one per parameter group.
        factor: in (0, 1].
        floor: minimum rate as a share of lr_0, in [0, 1].
    """

    def __init__(self, optimizer: Optimizer, factor: float, floor: float = 0.0):
        self.optimizer, self.factor, self.floor = optimizer, factor, floor
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.count = 0

    def step(self) -> None:
        self.count += 1
        self._set()

    def advance_to(self, count: int) -> None:
        """Calls ``step()`` until ``count`` is reached; never goes back."""
        while self.count < count:
            self.step()
        self._set()

    def hold(self, rate: float) -> None:
        """Sets this rate until the next ``step()`` or ``advance_to()``."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def get_last_lr(self) -> list[float]:
        rate = max(self.factor**self.count, self.floor)
        return [base * rate for base in self.base_lrs]

    def state_dict(self) -> dict:
        return {"count": self.count, "base_lrs": self.base_lrs}

    def load_state_dict(self, state: dict) -> None:
        count, base_lrs = state["count"], state["base_lrs"]
        if count < 0 or len(base_lrs) != len(self.base_lrs) or not all(map(math.isfinite, base_lrs)):
            raise InputError(f"{state} does not fit this learning-rate schedule: resume from another checkpoint.")
        self.count, self.base_lrs = count, list(base_lrs)
        self._set()

    def _set(self) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            group["lr"] = rate
