"""Policy losses: objectives of an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.lm_head.objective import loss_denominator
from toolx_kernels.reference import GRPOOutput


class PolicyLoss(Protocol):
    def denominator(self, lengths: Sequence[int]) -> float:
        """Returns the divisor of the whole batch's loss, given the number of written tokens of each completion. It is
        the same for all micro-batches, so the gradient does not depend on how the batch is cut."""

    def __call__(self, hidden: Tensor, *, denominator: float, ref_logprobs: Tensor | None, **batch) -> GRPOOutput:
        """Returns the loss of a micro-batch. ``batch`` holds the arguments of ``linear_grpo_loss``, the head included;
        its ``old_logprobs`` are None in the first or only update of a batch."""


@dataclass(frozen=True, slots=True)
class ClippedLoss:
    """``linear_grpo_loss`` of any ``loss_type``."""

    config: GRPOLossConfig

    def denominator(self, lengths: Sequence[int]) -> float:
        return loss_denominator(self.config.loss_type, lengths, self.config.max_completion_length)

    def __call__(self, hidden: Tensor, **batch) -> GRPOOutput:
        return linear_grpo_loss(hidden, config=self.config, **batch)
