"""Log-probability of each target token straight from hidden states and the LM-head weight.

The vocabulary is swept in tiles, so no ``[N, V]`` tensor exists at any time; the backward pass sweeps it a second time.
With ``z`` the scaled logits, ``p = softmax(z)`` and the entropy ``H``, the gradient of a loss with respect to z is

    dz = g_logp (1[target] - p) + g_lse p - g_H p (log p + H)

Rows whose upstream gradients are zero are left out of the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels.ops import library
from toolx_kernels.ops.lm_head.checks import check_first_derivative, check_head, check_values, row_temperatures
from toolx_kernels.ops.lm_head.head import as_given, make_head
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
        temperature: a number, or one per row; positive. No gradient flows into it.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the temperature (Gemma).
        entropy: also return the entropy of every row, in nats.
        shard: which part of the vocabulary ``weight`` holds, for tensor parallelism.

    Returns:
        ``TokenStats(logprobs, lse, entropy)``, each (N) in fp32 (float64 for float64 inputs) and each differentiable in
        hidden, weight and bias. ``lse`` is that of the scaled logits.

    Raises:
        InputError: shapes or devices that do not fit, targets outside the vocabulary, a temperature that is not
            positive. On a GPU the check of values waits for the device.
    """
    check_head(hidden, weight, targets, bias, softcap, shard)
    logprobs, lse, entropies = torch.ops.toolx.linear_logprob(
        hidden, weight, targets, row_temperatures(temperature, hidden, targets), bias, softcap or 0.0,
        -1 if shard is None else shard.key, entropy,
    )  # fmt: skip
    return TokenStats(logprobs, lse, entropies if entropy else None)


@as_given
def _forward(hidden, weight, targets, temperature, bias, softcap, shard, entropy):
    check_values(targets, temperature, vocab_size_of(weight, shard))
    head = make_head(hidden, weight, targets, temperature, bias, softcap, shard)
    return statistics(head, entropy=entropy, shard=shard)


@as_given
def _backward(
    hidden, weight, targets, temperature, bias, softcap, shard,
    logprobs, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs, workspace_mib=None,
):  # fmt: skip
    head = make_head(hidden, weight, targets, temperature, bias, softcap, shard)
    live = (grad_logprobs != 0) | (grad_lse != 0)
    if entropy.numel():
        live |= grad_entropy != 0
    rows = live.nonzero().squeeze(1)
    spread = None
    if len(rows) < len(targets):
        head, spread = head.rows(rows), (rows, len(targets))
        logprobs, lse, grad_logprobs, grad_lse = (x[rows] for x in (logprobs, lse, grad_logprobs, grad_lse))
        if entropy.numel():
            entropy, grad_entropy = entropy[rows], grad_entropy[rows]
    return recompute_gradients(
        head, logprobs, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs, shard,
        workspace_mib, spread,
    )  # fmt: skip


def _fake_forward(hidden, weight, targets, temperature, bias, softcap, shard, entropy):
    stats = [hidden.new_empty(targets.shape, dtype=compute_dtype(hidden)) for _ in range(3)]
    return stats[0], stats[1], stats[2] if entropy else stats[2].new_empty(0)


def fake_gradients(hidden, weight, bias, needs):
    return tuple(
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight, bias), needs, strict=True)
    )


def _fake_backward(
    hidden, weight, targets, temperature, bias, softcap, shard,
    logprobs, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs, workspace_mib=None,
):  # fmt: skip
    return fake_gradients(hidden, weight, bias, needs)


def _save(ctx, inputs, output):
    *tensors, ctx.softcap, ctx.shard, _ = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_logprobs, grad_lse, grad_entropy):
    check_first_derivative(grad_logprobs)
    *tensors, logprobs, lse, entropy = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
    grads = torch.ops.toolx.linear_logprob_backward(
        *tensors, ctx.softcap, ctx.shard, logprobs, lse, entropy, grad_logprobs, grad_lse,
        grad_entropy, needs,
    )  # fmt: skip
    hidden, weight, bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return hidden, weight, None, None, bias, None, None, None


HEAD_SCHEMA = "Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, float softcap, int shard"
library.define(
    f"linear_logprob({HEAD_SCHEMA}, bool entropy) -> (Tensor, Tensor, Tensor)",
    default=_forward,
    fake=_fake_forward,
    triton=_forward,
)
library.define(
    f"linear_logprob_backward({HEAD_SCHEMA}, Tensor logprobs, Tensor lse, Tensor entropy, Tensor grad_logprobs, "
    "Tensor grad_lse, Tensor grad_entropy, bool[] needs, int? workspace_mib=None) -> "
    "(Tensor, Tensor, Tensor)",
    default=_backward,
    fake=_fake_backward,
    triton=_backward,
)
torch.library.register_autograd("toolx::linear_logprob", _differentiate, setup_context=_save, lib=library.library)
