"""Fused GRPO kernels and a minimal trainer that teaches small language models to call tools.

``reference.py`` defines every op in plain torch: read it first. ``toolcall/`` handles dataset rows, their text, the
calls in a text and their correctness, without tensors. ``ops/lm_head/`` turns hidden states into log-probs, the GRPO
loss and next tokens, without logits in memory; ``ops/attention/`` computes attention, paged for rollouts and packed for
training. ``models/`` runs transformers models, unmodified, on that attention. ``engine/`` turns token ids into
completions; ``rollout/`` turns rows into rollouts of one turn or many. ``evaluate/`` scores, ``train/`` repeats probe,
collect, advantages, update and report, ``compare/`` turns runs into tables, ``cli/`` has one file per command. Imports
run one way, in this order (``docs/architecture.md``).

Public names load on first access: the loss needs only torch, the engine and the trainer also need transformers, and the
command line must set OpenMP's environment before torch loads.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolx_kernels.engine import RolloutEngine as RolloutEngine
    from toolx_kernels.engine import SamplingParams as SamplingParams
    from toolx_kernels.errors import InputError as InputError
    from toolx_kernels.loss_config import GRPOLossConfig as GRPOLossConfig
    from toolx_kernels.models.load import load_model as load_model
    from toolx_kernels.ops.advantages import group_advantages as group_advantages
    from toolx_kernels.ops.attention.paged import kv_write as kv_write
    from toolx_kernels.ops.attention.paged import paged_attention as paged_attention
    from toolx_kernels.ops.lm_head.linear_grpo import linear_grpo_loss as linear_grpo_loss
    from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob as linear_logprob
    from toolx_kernels.ops.lm_head.sampling import sample as sample
    from toolx_kernels.reference import GRPOOutput as GRPOOutput
    from toolx_kernels.reference import Sample as Sample
    from toolx_kernels.reference import TokenStats as TokenStats
    from toolx_kernels.train.config import ToolExpanderConfig as ToolExpanderConfig
    from toolx_kernels.train.trainer import ToolExpanderTrainer as ToolExpanderTrainer

_HOME = {
    "InputError": "errors",
    "group_advantages": "ops.advantages",
    "kv_write": "ops.attention.paged",
    "paged_attention": "ops.attention.paged",
    "linear_grpo_loss": "ops.lm_head.linear_grpo",
    "linear_logprob": "ops.lm_head.linear_logprob",
    "sample": "ops.lm_head.sampling",
    "GRPOLossConfig": "loss_config",
    "load_model": "models.load",
    "GRPOOutput": "reference",
    "Sample": "reference",
    "TokenStats": "reference",
    "RolloutEngine": "engine",
    "SamplingParams": "engine",
    "ToolExpanderConfig": "train.config",
    "ToolExpanderTrainer": "train.trainer",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOME[name] == "train.trainer":
        import_module(f"{__name__}.models")  # first, because it loads transformers without warnings
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
