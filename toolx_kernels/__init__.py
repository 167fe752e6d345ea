"""Fused GRPO kernels and a minimal trainer that teaches small language models to call tools.

The loss and its parts need torch alone. The engine and the trainer need transformers, which is slow to import, so they
are loaded when they are first asked for.
"""

from importlib import import_module

from toolx_kernels.errors import InputError
from toolx_kernels.ops.advantages import group_advantages
from toolx_kernels.ops.attention import kv_write, paged_attention
from toolx_kernels.ops.linear_grpo import linear_grpo_loss
from toolx_kernels.ops.linear_logprob import linear_logprob
from toolx_kernels.ops.sampling import sample
from toolx_kernels.reference import GRPOLossConfig, GRPOOutput, Sample, TokenStats

_LAZY = {
    "RolloutEngine": "toolx_kernels.rollout",
    "SamplingParams": "toolx_kernels.rollout",
    "ToolExpanderConfig": "toolx_kernels.train.config",
    "ToolExpanderTrainer": "toolx_kernels.train.trainer",
}

__all__ = [
    "GRPOLossConfig",
    "GRPOOutput",
    "InputError",
    "Sample",
    "TokenStats",
    "group_advantages",
    "kv_write",
    "linear_grpo_loss",
    "linear_logprob",
    "paged_attention",
    "sample",
    *_LAZY,
]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
