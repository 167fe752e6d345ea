"""The bridge from unmodified transformers models to our attention.

transformers looks its attention function up by ``config._attn_implementation`` and passes on keyword arguments of
the model call. So ``body(input_ids=(1, N), position_ids=(1, N), use_cache=False, toolx=context)`` calls
``context.attend`` in every layer with packed tokens: pages, packing and prefix sharing are in the context of the call,
and rollout and training use one copy of the weights. ``run_body`` makes that call; ``toolx_attention`` switches a model
while forward and backward run (activation checkpointing calls attention again in backward).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from toolx_kernels.errors import InputError
from toolx_kernels.models.embedding import embed
from toolx_kernels.models.shape import SUPPORTED, logit_scale

NAME = "toolx"


class Unsupported(Exception):
    """Why a model cannot be run exactly, as the second half of a sentence."""


class AttentionContext(Protocol):
    """Attention of packed tokens that knows which tokens each may see."""

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
    """Last hidden states (N, D) of N packed tokens, scaled by the model's logit scale; call it inside
    ``toolx_attention(model)``.

    Backward adds the gradient of the embedding directly to its ``weight.grad`` (``embed``).
    """
    if torch.is_grad_enabled():
        inputs = {"inputs_embeds": embed(model.get_input_embeddings(), input_ids[None])}
    else:
        inputs = {"input_ids": input_ids[None]}
    decoder = model.get_decoder()
    output = decoder(**inputs, position_ids=position_ids[None], use_cache=False, toolx=context)
    hidden, scale = output.last_hidden_state[0], logit_scale(decoder.config)
    return hidden if scale == 1 else hidden * scale


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # by the decoder, whose config is changed
_making_a_lock = threading.Lock()


@contextmanager
def alone_with(model: PreTrainedModel) -> Iterator[None]:
    """Other threads wait at this call for the same model until the block ends; the own thread may enter it again."""
    with _making_a_lock:
        lock = _locks.setdefault(model.get_decoder(), threading.RLock())
    with lock:
        yield


@contextmanager
def toolx_attention(model: PreTrainedModel) -> Iterator[str]:
    """Makes the model's layers call our attention inside the block; restores the model afterwards. Yields the name of
    the attention function that it had. Threads enter it one at a time (``alone_with``).

    Raises:
        InputError: the architecture does not take its attention from transformers' registry.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(
            f"{type(model).__name__} does not take its attention function from transformers' registry: {SUPPORTED}."
        )
    with alone_with(model), attention_of(model, NAME) as own:
        yield own


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[str]:
    """Makes the model's layers call the attention function ``name`` of transformers' registry inside the block; yields
    the name of the one that it had."""
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield before
    finally:
        config._attn_implementation = before


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Sets every module to evaluation mode inside the block; restores each afterwards."""
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
    """Activation checkpointing: each layer of a forward pass inside the block keeps only its input; backward, inside
    the block or after it, recomputes the rest. The gradients are the same.

    transformers' own switch works only in training mode, which would turn dropout on. A checkpoint around each layer's
    ``forward`` leaves modes, hooks and adapters unchanged; random states are not kept for the second run, because
    evaluation mode uses none.
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


def head_of(model: PreTrainedModel) -> dict[str, Any]:
    """The LM head as keyword arguments of our ops: ``weight`` (V, D), ``bias`` (V) or None, ``softcap`` or None."""
    head = model.get_output_embeddings()
    return {
        "weight": head.weight,
        "bias": getattr(head, "bias", None),
        "softcap": getattr(model.get_decoder().config, "final_logit_softcapping", None),
    }


def attention_function(
    module: nn.Module,
    query: Tensor,  # (1, H, N, Dh)
    key: Tensor,  # (1, Hkv, N, Dh)
    value: Tensor,  # (1, Hkv, N, Dh)
    attention_mask: Tensor | None,
    *,
    toolx: AttentionContext | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers' layers call; returns (1, N, H, Dh).

    Raises:
        Unsupported: the layer does not pass the context on, or passes something that our attention does not support,
            such as its own mask or attention sinks.
    """
    if toolx is None:
        raise Unsupported("a layer does not hand keyword arguments of the call on to attention")
    unknown = [name for name, other in others.items() if isinstance(other, Tensor) and name != "position_ids"]
    if unknown or attention_mask is not None:
        raise Unsupported(f"a layer hands {', '.join(unknown) or 'a mask of its own'} to attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (1, H, N, Dh) -> (N, H, Dh)
    out = toolx.attend(module.layer_idx, query, key, value, scale, softcap or 0.0, sliding_window or 0)
    return out[None], None


# No mask function is registered for it, so transformers builds no masks; the context does.
AttentionInterface.register(NAME, attention_function)
