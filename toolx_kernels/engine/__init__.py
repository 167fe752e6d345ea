"""The rollout engine: samples groups of completions from token ids."""

import toolx_kernels.models  # noqa: F401 (loads transformers without its warnings)
from toolx_kernels.engine.engine import RolloutEngine
from toolx_kernels.engine.types import Completion, Group, SamplingParams

__all__ = ["Completion", "Group", "RolloutEngine", "SamplingParams"]
