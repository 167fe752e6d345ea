"""Sampling groups of completions: types, page pool, engine."""

from toolx_kernels.engine.engine import RolloutEngine
from toolx_kernels.engine.types import Completion, Group, SamplingParams

__all__ = ["Completion", "Group", "RolloutEngine", "SamplingParams"]
