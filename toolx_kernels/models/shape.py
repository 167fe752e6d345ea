"""The shape of a decoder, from its config: keys and values, context, scale of the logits, experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from toolx_kernels.errors import InputError

SUPPORTED = "use a model that docs/models.md lists as exact"
EXPERTS_NOTE = (
    "a mixture of experts: in bfloat16 the trainer's log-probs differ from the sampler's by more than those of a dense "
    "model, and no auxiliary loss is added (docs/models.md)"
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Context(int):
    """Tokens of the longest row; its text also explains why a LongRoPE model has fewer than its config names."""

    beyond: int = 0  # tokens that the config names, if they are more

    def __str__(self) -> str:
        if not self.beyond:
            return super().__repr__()
        return f"{int(self)} (the original one of its LongRoPE factors; those to {self.beyond} are not used)"


def context_of(config: PreTrainedConfig) -> Context:
    """The context that we use of a decoder with this config.

    LongRoPE has two sets of factors and uses one of them for all rows of a call, chosen by the longest row. So rows are
    kept within the original context, where each gets the same factors as alone. Dynamic NTK scaling depends on the
    length only beyond the config's own context.

    Raises:
        InputError: the config names no context.
    """
    context = _named(config, "max_position_embeddings")
    if not isinstance(context, int):
        raise InputError(
            f"A {config.model_type} config names no context (max_position_embeddings), which bounds prompts and "
            "completions: set it, or use another model."
        )
    originals = [
        rope["original_max_position_embeddings"]
        for rope in _ropes(_named(config, "rope_parameters"))
        if rope.get("rope_type") == "longrope"
    ]
    used = Context(min([context, *originals]))
    if used < context:
        used.beyond = context
    return used


def _ropes(parameters: Any) -> Iterator[dict]:
    """Yields the dictionaries of rope parameters; they may be nested, one per type of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for part in parameters.values():
            yield from _ropes(part)


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, kv heads and head dim of the keys and values of a decoder with this config.

    Raises:
        InputError: the config does not name them, or they differ between layers.
    """
    if getattr(config, "is_heterogeneous", False):
        raise InputError(f"A {config.model_type} model with layers of different shapes cannot be run: {SUPPORTED}.")
    layers, hidden, heads, kv_heads, head_dim = (
        _named(config, name)
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    kv_heads = kv_heads or heads
    if not all(isinstance(size, int) and size for size in (layers, hidden, heads, kv_heads)):
        raise InputError(
            f"A {config.model_type} config does not name one number of attention heads for all layers: {SUPPORTED}."
        )
    return layers, kv_heads, head_dim or hidden // heads


def logit_scale(config: PreTrainedConfig) -> float:
    """The factor of the logits: Cohere's ``logit_scale``, or 1 / Granite's ``logits_scaling``."""
    return (_named(config, "logit_scale") or 1.0) / (_named(config, "logits_scaling") or 1.0)


def has_experts(config: PreTrainedConfig) -> bool:
    """Whether the decoder is a mixture of experts."""
    return any((_named(config, name) or 0) > 1 for name in EXPERTS)


def _named(config: PreTrainedConfig, name: str) -> Any:
    return getattr(config, name, None)
