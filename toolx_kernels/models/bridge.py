"""Our attention inside unmodified transformers models.

transformers looks its attention function up by ``config._attn_implementation`` and hands on keyword arguments of
the model call. So ``body(input_ids=(1, N), position_ids=(1, N), use_cache=False, toolx=context)`` reaches
``context.attend`` in every layer with packed tokens: pagedness, packing and prefix sharing travel with the call, and
one copy of the weights serves rollout and training. ``run_body`` makes that call; ``toolx_attention`` switches a
model over for as long as forward and backward run (activation checkpointing calls attention again in backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from toolx_kernels.errors import InputError
from toolx_kernels.models.embedding import embed
from toolx_kernels.ops.attention.packed import PackedContext
from toolx_kernels.reference import linear_logits

NAME = "toolx"


class AttentionContext(Protocol):
    """Knows which tokens a packed token may see."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # (N, H, Dh)
        key: Tensor,  # (N, Hkv, Dh)
        value: Tensor,  # (N, Hkv, Dh)
        scale: float,
        softcap: float,
        window: int,
    ) -> Tensor: ...  # (N, H, Dh)


def run_body(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, context: AttentionContext) -> Tensor:
    """Last hidden states (N, D) of N packed tokens, inside ``with toolx_attention(model)``.

    Backward adds the gradient of the embedding straight to its ``weight.grad`` (``embed``).
    """
    if torch.is_grad_enabled():
        inputs = {"inputs_embeds": embed(model.get_input_embeddings(), input_ids[None])}
    else:
        inputs = {"input_ids": input_ids[None]}
    output = model.get_decoder()(**inputs, position_ids=position_ids[None], use_cache=False, toolx=context)
    return output.last_hidden_state[0]


@contextmanager
def toolx_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's layers call our attention inside the block; afterwards the model is as it was.

    Raises:
        InputError: the architecture does not take its attention from transformers' registry.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(
            f"{type(model).__name__} does not take its attention function from transformers' registry: "
            "use a Llama, Qwen2, Qwen3 or Gemma 3 style model."
        )
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Every module in evaluation mode inside the block; each as it was afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block each layer of a forward keeps only its input; backward, in the block or after it, computes the
    rest again. The gradients are the same.

    transformers' own switch works in training mode alone, which would turn dropout on. A checkpoint around each
    layer's ``forward`` leaves modes, hooks and adapters as they are; random numbers are not kept for the second run,
    because in evaluation mode there are none.
    """
    layers = [module for module in model.get_decoder().modules() if isinstance(module, GradientCheckpointingLayer)]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def check_supported(model: PreTrainedModel) -> None:
    """Compares a few log-probs through our attention and head with the model's own.

    Some architectures scale their logits, keep attention sinks or carry state outside attention; trained or sampled
    through this package they would be silently wrong.

    Raises:
        InputError: the two differ, or the model cannot be run this way at all.
    """
    name = type(model).__name__
    device, length = model.device, 6
    vocab_size = model.get_output_embeddings().weight.shape[0]
    ids = torch.arange(length, device=device) * 7919 % vocab_size
    places = torch.arange(length, device=device)
    context = PackedContext([(length, [])], device)
    try:
        with evaluating(model):
            with toolx_attention(model):
                with torch.enable_grad():  # the way that training takes
                    hidden = run_body(model, ids, places, context).detach()
                ours = linear_logits(hidden, **head_of(model)).log_softmax(-1)
            theirs = model(input_ids=ids[None], use_cache=False).logits[0].to(ours.dtype).log_softmax(-1)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be run with our attention ({error}): use Llama, Qwen2, Qwen3 or Gemma 3."
        ) from error
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.25
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:
        raise InputError(
            f"{name} computes something that this package does not know of: log-probs differ by {difference:.2g} from "
            "the model's own; use a Llama, Qwen2, Qwen3 or Gemma 3 model with finite weights."
        )


def head_of(model: PreTrainedModel) -> dict[str, Any]:
    """The LM head as keyword arguments of our ops: ``weight`` (V, D), ``bias`` (V) or None, ``softcap`` or None."""
    head = model.get_output_embeddings()
    return {
        "weight": head.weight,
        "bias": getattr(head, "bias", None),
        "softcap": getattr(model.get_decoder().config, "final_logit_softcapping", None),
    }


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, kv heads and head dim of the keys and values of a decoder with this config."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head_dim


def attention_function(
    module, query, key, value, attention_mask, scaling, toolx: AttentionContext, softcap=None, sliding_window=None, **_
):
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (1, H, N, Dh) -> (N, H, Dh)
    out = toolx.attend(module.layer_idx, query, key, value, scaling, softcap or 0.0, sliding_window or 0)
    return out[None], None


# No mask function is registered beside it, so transformers builds no masks: they are the context's business.
AttentionInterface.register(NAME, attention_function)
