"""Fused GRPO kernels and a minimal trainer that teaches small language models to call tools.

reference.py says what every op means, in plain torch: read it first. toolcall/ knows rows, what text means and whether
it is right, without tensors. ops/lm_head/ turns hidden states into log-probs, the GRPO loss and next tokens, without
logits; ops/attention/ attends, paged for rollouts and packed for training. models/ runs any transformers model,
unmodified, on that attention. engine/ takes token ids and gives completions; rollout/ takes rows and gives rollouts, in
one turn or many. evaluate/ scores, train/ repeats probe, collect, advantages, update and report, compare/ turns runs
into tables, cli/ has one file a command. Imports run one way, in this order (docs/architecture.md).

Every public name is loaded when it is first asked for: the loss needs torch alone, the engine and the trainer need
transformers as well, and the command line must set OpenMP's environment before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolx_kernels.engine import RolloutEngine as RolloutEngine
    from toolx_kernels.engine import SamplingParams as SamplingParams
    from toolx_kernels.errors import InputError as InputError
    from toolx_kernels.loss_config import GRPOLossConfig as GRPOLossConfig
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
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
