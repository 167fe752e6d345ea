"""Log-probability of each target token straight from hidden states and the LM-head weight.

The vocabulary is swept in tiles with a running log-sum-exp, so no ``[N, V]`` tensor exists at any time. The
backward pass recomputes each tile and needs fp32 accumulators for one slice of the weight only. With
``z = softcap(h W^T + b) / T``, ``p = softmax(z)`` and the entropy ``H``, the gradient of a loss with respect to z is

    dz = g_logp (1[target] - p) + g_lse p - g_H p (log p + H)

Rows whose three upstream gradients are zero are left out of the backward pass.
"""

from __future__ import annotations

from functools import wraps

import torch
from torch import Tensor

from toolx_kernels import _library
from toolx_kernels.errors import InputError
from toolx_kernels.ops.tiles import choose_sweep
from toolx_kernels.reference import TokenStats, compute_dtype

LOG_OF_NOTHING = -1e4  # exp() of it is exactly zero, and it times zero is not NaN as -inf would be


def linear_logprob(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    temperature: float | Tensor = 1.0,  # or (N)
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    entropy: bool = False,
) -> TokenStats:
    """Log-probabilities of ``targets`` under ``softmax(softcap(hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: (N, D) in fp32, bf16, fp16 or float64; row n predicts ``targets[n]``.
        weight: (V, D), the LM head as ``nn.Linear`` stores it.
        temperature: a number, or one per row; positive. No gradient flows into it.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the temperature (Gemma).
        entropy: also return the entropy of every row, in nats.

    Returns:
        ``TokenStats(logprobs, lse, entropy)``, each (N) in fp32 (float64 for float64 inputs) and each
        differentiable in hidden, weight and bias. ``lse`` is that of the scaled logits.

    Raises:
        InputError: shapes that do not fit, targets outside the vocabulary, a temperature that is not positive.
    """
    check_head(hidden, weight, targets, bias)
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be positive.")
        temperature = torch.full(targets.shape, temperature, dtype=compute_dtype(hidden), device=hidden.device)
    elif temperature.shape != targets.shape:
        raise InputError(
            f"temperature has shape {tuple(temperature.shape)}: give a number or one per row ({len(targets)})."
        )
    logprobs, lse, entropies = torch.ops.toolx.linear_logprob(
        hidden, weight, targets, temperature, bias, softcap or 0.0, entropy
    )
    return TokenStats(logprobs, lse, entropies if entropy else None)


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Raises InputError unless hidden (N, D), weight (V, D), targets (N) int64 and bias (V) fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise InputError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D) with one D."
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise InputError(
            f"targets {tuple(targets.shape)} of {targets.dtype} must be int64 with one id for each of the "
            f"{len(hidden)} rows of hidden."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias {tuple(bias.shape)} must have one entry for each of the {len(weight)} rows of weight.")


def _blocks(total: int, size: int):
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


class _Head:
    """Produces tiles of scaled logits into one reused workspace."""

    def __init__(self, hidden, weight, temperature, bias, softcap):
        self.hidden, self.weight, self.bias, self.softcap = hidden, weight, bias, softcap
        self.dtype = compute_dtype(hidden)
        self.scale = temperature.to(self.dtype).reciprocal()[:, None]
        # where nothing stands between the GEMM and the temperature, scaling (N, D) saves a pass over every tile
        self.folded = bias is None and not softcap
        (n_rows, dim), vocab_size = hidden.shape, weight.shape[0]
        sweep = choose_sweep(n_rows, vocab_size, dim, hidden.device, self.dtype.itemsize)
        self.row_blocks = list(_blocks(n_rows, sweep.rows))
        self.column_blocks = list(_blocks(vocab_size, sweep.columns))
        self.workspace = torch.empty(sweep.rows * sweep.columns, dtype=self.dtype, device=hidden.device)

    def rows(self, rows: slice) -> Tensor:
        """(rows, D): what the GEMMs multiply with."""
        hidden = self.hidden[rows].to(self.dtype)
        return hidden * self.scale[rows] if self.folded else hidden

    def logits(self, rows: slice, weight_tile: Tensor, columns: slice) -> Tensor:
        """(rows, columns) in the workspace; the next call overwrites it. weight_tile is already upcast."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        z = self.workspace[: shape[0] * shape[1]].view(shape)
        torch.mm(self.rows(rows), weight_tile.T, out=z)
        if self.folded:
            return z
        if self.bias is not None:
            z += self.bias[columns]
        if self.softcap:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.mul_(self.scale[rows])


def _in_full_precision(function):
    """Autocast would run some of the reductions in bf16."""

    @wraps(function)
    def wrapped(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *arguments)

    return wrapped


@_in_full_precision
def _forward(hidden, weight, targets, temperature, bias, softcap, entropy):
    vocab_size = weight.shape[0]
    _check_values(targets, temperature, vocab_size)
    head = _Head(hidden, weight, temperature, bias, softcap)
    top = torch.full(targets.shape, torch.finfo(head.dtype).min, dtype=head.dtype, device=hidden.device)
    total = torch.zeros_like(top)  # sum of exp(z - top)
    moment = torch.zeros_like(top)  # sum of exp(z - top) * (z - top)
    target_logit = torch.zeros_like(top)
    for columns in head.column_blocks:
        weight_tile = weight[columns].to(head.dtype)
        for rows in head.row_blocks:
            z = head.logits(rows, weight_tile, columns)
            local = targets[rows] - columns.start
            inside = (local >= 0) & (local < z.shape[1])
            picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
            target_logit[rows] = torch.where(inside, picked, target_logit[rows])
            new_top = torch.maximum(top[rows], z.amax(1))
            shift = (top[rows] - new_top).clamp_(min=LOG_OF_NOTHING)
            rescale = shift.exp()
            z.sub_(new_top[:, None])
            if entropy:
                z.clamp_(min=LOG_OF_NOTHING)
                moment[rows] = rescale * (moment[rows] + shift * total[rows])
                exp = z.exp()
                moment[rows] += torch.linalg.vecdot(exp, z)
            else:
                exp = z.exp_()
            total[rows] = total[rows] * rescale + exp.sum(1)
            top[rows] = new_top
    log_total = total.log()
    lse = top + log_total
    return target_logit - lse, lse, log_total - moment / total if entropy else lse.new_empty(0)


@_in_full_precision
def _backward(
    hidden, weight, targets, temperature, bias, softcap, lse, entropy, grad_logprobs, grad_lse, grad_entropy,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    dtype = compute_dtype(hidden)
    has_entropy = entropy.numel() > 0 and bool((grad_entropy != 0).any())
    live = (grad_logprobs != 0) | (grad_lse != 0)
    if has_entropy:
        live |= grad_entropy != 0
    if not live.all():
        rows = live.nonzero().squeeze(1)
        small = [t[rows] for t in (hidden, targets, temperature, lse, grad_logprobs, grad_lse)]
        hidden_live, targets, temperature, lse, grad_logprobs, grad_lse = small
        if has_entropy:
            entropy, grad_entropy = entropy[rows], grad_entropy[rows]
    else:
        rows, hidden_live = None, hidden
    head = _Head(hidden_live, weight, temperature, bias, softcap)
    grad_hidden = torch.zeros(hidden_live.shape if need_hidden else (0, 0), dtype=dtype, device=hidden.device)
    grad_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    grad_bias = torch.empty_like(bias) if need_bias else weight.new_empty(0)
    for columns in head.column_blocks:
        weight_tile = weight[columns].to(dtype)
        weight_sum = torch.zeros_like(weight_tile) if need_weight else None
        bias_sum = weight_tile.new_zeros(len(weight_tile)) if need_bias else None
        for block in head.row_blocks:
            z = head.logits(block, weight_tile, columns)
            slope = z.div(head.scale[block] * softcap).square_().neg_().add_(1) if softcap else None
            log_probs = z.sub_(lse[block, None])
            factor = (grad_lse[block] - grad_logprobs[block])[:, None]
            if has_entropy:
                log_probs.clamp_(min=LOG_OF_NOTHING)
                factor = factor - grad_entropy[block, None] * (log_probs + entropy[block, None])
            dz = log_probs.exp_().mul_(factor)
            local = targets[block] - columns.start
            inside = ((local >= 0) & (local < dz.shape[1])).nonzero().squeeze(1)
            dz[inside, local[inside]] += grad_logprobs[block][inside]
            if slope is not None:
                dz.mul_(slope)
            if not head.folded:
                dz.mul_(head.scale[block])
            if need_hidden:
                grad_hidden[block].addmm_(dz, weight_tile)
            if need_weight:
                weight_sum.addmm_(dz.T, head.rows(block))
            if need_bias:
                bias_sum += dz.sum(0)
        if need_weight:
            grad_weight[columns] = weight_sum.to(weight.dtype)
        if need_bias:
            grad_bias[columns] = bias_sum.to(bias.dtype)
    if need_hidden and head.folded:
        grad_hidden *= head.scale
    if need_hidden and rows is not None:
        grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).index_copy_(0, rows, grad_hidden)
    return grad_hidden.to(hidden.dtype), grad_weight, grad_bias


def _check_values(targets: Tensor, temperature: Tensor, vocab_size: int) -> None:
    """On a GPU reading the values would stall the queue, so there they are asserted asynchronously."""
    fits = ((targets >= 0) & (targets < vocab_size)).all()
    positive = (temperature > 0).all()
    if targets.device.type != "cpu":
        torch._assert_async(fits, "targets must lie inside the vocabulary")
        torch._assert_async(positive, "temperature must be positive")
        return
    if not fits:
        row = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
        raise InputError(
            f"targets[{row}] = {int(targets[row])} is outside the vocabulary of {vocab_size}: mask such rows."
        )
    if not positive:
        row = int((~(temperature > 0)).nonzero()[0])
        raise InputError(f"temperature[{row}] = {float(temperature[row])} must be positive.")


def _fake_forward(hidden, weight, targets, temperature, bias, softcap, entropy):
    stats = [hidden.new_empty(targets.shape, dtype=compute_dtype(hidden)) for _ in range(3)]
    return stats[0], stats[1], stats[2] if entropy else stats[2].new_empty(0)


def _fake_backward(
    hidden, weight, targets, temperature, bias, softcap, lse, entropy, grad_logprobs, grad_lse, grad_entropy,
    need_hidden, need_weight, need_bias,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0, 0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        torch.empty_like(bias) if need_bias else weight.new_empty(0),
    )


def _save(ctx, inputs, output):
    hidden, weight, targets, temperature, bias, softcap, _ = inputs
    ctx.save_for_backward(hidden, weight, targets, temperature, bias, output[1], output[2])
    ctx.softcap = softcap


def _differentiate(ctx, grad_logprobs, grad_lse, grad_entropy):
    hidden, weight, targets, temperature, bias, lse, entropy = ctx.saved_tensors
    need_hidden, need_weight, _, _, need_bias, _, _ = ctx.needs_input_grad
    grads = torch.ops.toolx.linear_logprob_backward(
        hidden, weight, targets, temperature, bias, ctx.softcap, lse, entropy,
        grad_logprobs, grad_lse, grad_entropy, need_hidden, need_weight, need_bias,
    )  # fmt: skip
    hidden, weight, bias = (
        g if need else None for g, need in zip(grads, (need_hidden, need_weight, need_bias), strict=True)
    )
    return hidden, weight, None, None, bias, None, None


_library.define(
    "linear_logprob(Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, float softcap, "
    "bool entropy) -> (Tensor, Tensor, Tensor)",
    default=_forward,
    fake=_fake_forward,
)
_library.define(
    "linear_logprob_backward(Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, "
    "float softcap, Tensor lse, Tensor entropy, Tensor grad_logprobs, Tensor grad_lse, Tensor grad_entropy, "
    "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    default=_backward,
    fake=_fake_backward,
)
torch.library.register_autograd("toolx::linear_logprob", _differentiate, setup_context=_save, lib=_library.library)
