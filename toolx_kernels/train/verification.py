"""Verification of demonstrations: rollouts with them, by the model before RL or the current one."""

from __future__ import annotations

import copy
from collections.abc import Callable

from toolx_kernels.engine import RolloutEngine
from toolx_kernels.rollout.rollout import Rollouter
from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import Attempt
from toolx_kernels.train.update.learner import Learner
from toolx_kernels.train.update.reference_model import ReferenceRollouter

# Verifications draw from other random streams than everything else (see ``rounds``).
VERIFY_STREAM = 3 << 30


class Verification:
    """Verifies each draw of demonstrations in a round; ``round_index`` returns the round."""

    def __init__(
        self, args: ToolExpanderConfig, collector: Collector, learner: Learner, round_index: Callable[[], int]
    ):
        self.args, self.collector, self.learner, self.round_index = args, collector, learner, round_index
        self._cautious: Rollouter | None = None  # of the model before RL

    def __call__(self, number: int) -> Attempt:
        """Returns the attempt that verifies draw ``number`` of the current round."""
        stream = VERIFY_STREAM + self.round_index() * self.args.demonstration_tries + number
        if self.args.verification == "cautious" and self._cautious is None:
            reference, rollouter = self.learner.reference, copy.copy(self.collector.rollouter)
            assert reference is not None  # args.needs_reference
            rollouter.engine = RolloutEngine(reference.model, seed=self.args.seed, compile=self.args.torch_compile)
            self._cautious = ReferenceRollouter(reference, rollouter)
        return self.collector.attempt(stream, "verify", self._cautious)

    @property
    def rollouters(self) -> list[Rollouter]:
        """All rollouters of the run."""
        return [self.collector.rollouter, *([self._cautious] if self._cautious else [])]
