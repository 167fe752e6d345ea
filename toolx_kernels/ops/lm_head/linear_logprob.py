"""Linear log-probability: that of each target token, from hidden states and the LM-head weight.

The vocabulary is swept in tiles, so no ``[N, V]`` tensor ever exists; the backward pass sweeps it a second time.
With ``z`` the scaled logits, ``p = softmax(z)`` and the entropy ``H``, the gradient of a loss with respect to z is

    dz = g_logp (1[target] - p) + g_lse p - g_H p (log p + H)

The backward pass skips rows whose upstream gradients are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.errors import InputError, short
from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head.checks import (
    check_first_derivative,
    check_head,
    check_saved,
    check_targets,
    check_transforms,
    check_values,
    row_temperatures,
    saved,
)
from toolx_kernels.ops.lm_head.head import (
    TRAINABLE,
    HeadInputs,
    Trained,
    as_given,
    fake_results,
    for_autograd,
    pick,
    results_of,
)
from toolx_kernels.ops.lm_head.two_sweeps import recompute_gradients, statistics
from toolx_kernels.ops.lm_head.vocab_shard import VocabShard, vocab_size_of
from toolx_kernels.reference import TokenStats, compute_dtype


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    temperature: float | Tensor = 1.0,  # or (N)
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    entropy: bool = False,
    shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probabilities of ``targets`` under ``softmax(softcap(hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: (N, D) in fp32, bf16, fp16 or float64; row n predicts ``targets[n]``.
        weight: (V, D), the LM head as ``nn.Linear`` stores it.
        temperature: a positive number, or one per row. It gets no gradient.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the temperature (Gemma).
        entropy: also return the entropy of every row, in nats.
        shard: the part of the vocabulary that ``weight`` holds, for tensor parallelism.

    Returns:
        ``TokenStats(logprobs, lse, entropy)``, each (N) in fp32 (float64 for float64 inputs) and differentiable in
        hidden, weight and bias. ``lse`` is that of the scaled logits.

    Raises:
        InputError: shapes or devices that do not fit, targets outside the vocabulary, a temperature that is not
            positive, ``torch.func`` or forward-mode differentiation, a leaf made under ``torch.inference_mode`` where
            another one is trained. The check of values waits for a GPU.
    """
    check_head(hidden, weight, bias, softcap)
    check_targets(hidden, weight, targets, shard)
    check_saved(hidden=hidden, weight=weight, bias=bias)
    if not isinstance(entropy, bool):
        raise InputError(f"entropy={short(entropy)} must be True or False.")
    temperature = row_temperatures(temperature, hidden, targets)
    check_transforms(hidden, weight, bias, temperature)
    inputs = HeadInputs(
        hidden, weight, saved(targets), temperature, bias, float(softcap or 0), -1 if shard is None else shard.key
    )
    logprobs, lse, entropies = torch.ops.toolx.linear_logprob(*inputs, entropy)
    return TokenStats(logprobs, lse, entropies if entropy else None)


class BackwardInputs(NamedTuple):
    """Arguments of ``linear_logprob_backward`` besides the head: results of the forward pass, their gradients; (N)."""

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor  # empty if its gradient is zero
    grad_logprobs: Tensor
    grad_lse: Tensor
    grad_entropy: Tensor
    needs: list[bool]
    workspace_mib: int | None = None


@as_given
def _forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (entropy,) = HeadInputs.split(arguments)
    check_values(inputs.targets, inputs.temperature, vocab_size_of(inputs.weight, inputs.shard))
    logprobs, lse, entropies = statistics(inputs.head(), entropy=entropy)
    return logprobs, lse, lse.new_empty(0) if entropies is None else entropies


@as_given
def _backward(*arguments) -> tuple[Tensor, ...]:
    inputs, others = HeadInputs.split(arguments)
    given = BackwardInputs(*others)
    head, n_rows, with_entropy = inputs.head(), len(inputs.targets), given.entropy.numel() > 0
    stats = TokenStats(given.logprobs, given.lse, given.entropy if with_entropy else None)
    upstream = TokenStats(given.grad_logprobs, given.grad_lse, given.grad_entropy if with_entropy else None)
    live = (upstream.logprobs != 0) | (upstream.lse != 0)
    if with_entropy:
        live |= upstream.entropy != 0
    rows = live.nonzero().squeeze(1)
    if len(rows) < n_rows:
        head = head.rows(rows)
        stats, upstream = (TokenStats(*(pick(x, rows) for x in of)) for of in (stats, upstream))
    grads = recompute_gradients(head, stats, upstream, Trained(*given.needs), given.workspace_mib)
    return results_of(grads.spread(rows, n_rows), inputs)


def _fake_forward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    inputs, (entropy,) = HeadInputs.split(arguments)
    dtype = compute_dtype(inputs.hidden)
    stats = [inputs.hidden.new_empty(inputs.targets.shape, dtype=dtype) for _ in range(3)]
    return stats[0], stats[1], stats[2] if entropy else stats[2].new_empty(0)


def _fake_backward(*arguments) -> tuple[Tensor, ...]:
    inputs, others = HeadInputs.split(arguments)
    return fake_results(inputs, BackwardInputs(*others).needs)


def _save(ctx, inputs, output) -> None:
    (*tensors, ctx.softcap, ctx.shard), _ = HeadInputs.split(inputs)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_logprobs, grad_lse, grad_entropy):
    check_first_derivative(grad_logprobs)
    *tensors, logprobs, lse, entropy = ctx.saved_tensors
    needs = [ctx.needs_input_grad[at] for at in TRAINABLE]
    given = BackwardInputs(logprobs, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs)
    grads = torch.ops.toolx.linear_logprob_backward(*tensors, ctx.softcap, ctx.shard, *given)
    return tuple(for_autograd(grads, needs, len(ctx.needs_input_grad)))


HEAD_SCHEMA = library.arguments(HeadInputs)
library.define(
    f"linear_logprob({HEAD_SCHEMA}, bool entropy) -> (Tensor, Tensor, Tensor)",
    default=_forward,
    fake=_fake_forward,
    triton=_forward,
)
library.define(
    f"linear_logprob_backward({HEAD_SCHEMA}, {library.arguments(BackwardInputs)}) -> (Tensor, Tensor, Tensor)",
    default=_backward,
    fake=_fake_backward,
    triton=_backward,
)
torch.library.register_autograd("toolx::linear_logprob", _differentiate, setup_context=_save, lib=library.library)
