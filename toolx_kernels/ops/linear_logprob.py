"""Log-probability of each target token straight from hidden states and the LM-head weight.

The vocabulary is swept in tiles, so no ``[N, V]`` tensor exists at any time; the backward pass sweeps it a second time.
With ``z`` the scaled logits, ``p = softmax(z)`` and the entropy ``H``, the gradient of a loss with respect to z is

    dz = g_logp (1[target] - p) + g_lse p - g_H p (log p + H)

Rows whose upstream gradients are zero are left out of the backward pass.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType

import torch
from torch import Tensor

from toolx_kernels import _library
from toolx_kernels.errors import InputError
from toolx_kernels.ops import sweep_torch, tiles
from toolx_kernels.ops.head import (
    Head,
    VocabShard,
    blocks,
    check_devices,
    check_head,
    check_values,
    lora_features,
    reducer,
    start_of,
    vocab_size_of,
)
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
    lora_a: Tensor | None = None,  # (R, D)
    lora_b: Tensor | None = None,  # (V, R)
    lora_scaling: float = 1.0,
    shard: VocabShard | None = None,
) -> TokenStats:
    """Log-probabilities of ``targets`` under ``softmax(softcap(hidden @ weight.T + bias) / temperature)``.

    Args:
        hidden: (N, D) in fp32, bf16, fp16 or float64; row n predicts ``targets[n]``.
        weight: (V, D), the LM head as ``nn.Linear`` stores it.
        temperature: a number, or one per row; positive. No gradient flows into it.
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the temperature (Gemma).
        entropy: also return the entropy of every row, in nats.
        lora_a, lora_b: an adapter on the head, ``lora_scaling * (hidden @ lora_a.T) @ lora_b.T`` added to the logits
            without merging it into the weight (arXiv 2106.09685).
        shard: which part of the vocabulary ``weight`` holds, for tensor parallelism.

    Returns:
        ``TokenStats(logprobs, lse, entropy)``, each (N) in fp32 (float64 for float64 inputs) and each differentiable in
        hidden, weight, bias and the adapter. ``lse`` is that of the scaled logits.

    Raises:
        InputError: shapes or devices that do not fit, targets outside the vocabulary, a temperature that is not
            positive. On a GPU the check of values waits for the device.
    """
    check_head(hidden, weight, targets, bias, shard)
    logprobs, lse, entropies = torch.ops.toolx.linear_logprob(
        hidden, weight, targets, row_temperatures(temperature, hidden, targets), bias,
        lora_features(hidden, weight, lora_a, lora_b, lora_scaling), lora_b, None,
        softcap or 0.0, entropy, -1 if shard is None else shard.key,
    )  # fmt: skip
    return TokenStats(logprobs, lse, entropies if entropy else None)


def row_temperatures(temperature: float | Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N), from a number or one per row."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be positive.")
        return torch.full(targets.shape, temperature, dtype=compute_dtype(hidden), device=hidden.device)
    if temperature.shape != targets.shape:
        raise InputError(
            f"temperature has shape {tuple(temperature.shape)}: give a number or one per row ({len(targets)})."
        )
    check_devices(hidden.device, temperature=temperature)
    return temperature


def sweeps(head: Head) -> ModuleType:
    """The implementation of the sweeps for these tensors."""
    if head.hidden.device.type == "cuda" and head.dtype == torch.float32:
        from toolx_kernels.ops import sweep_triton

        return sweep_triton
    return sweep_torch


def make_head(hidden, weight, targets, temperature, bias, features, lora_b, softcap, shard) -> Head:
    dtype = compute_dtype(hidden)
    scale = temperature.to(dtype).reciprocal()
    return Head(
        hidden, weight, targets.contiguous(), scale, None if bias is None else bias.contiguous(), features, lora_b,
        softcap, start_of(shard),
    )  # fmt: skip


def as_given(function):
    """Runs in the tensors' own precision (autocast would make some reductions bf16) and on their own device."""

    @wraps(function)
    def wrapped(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return function(hidden, *arguments)

    return wrapped


def statistics(
    head: Head, *, entropy: bool, shard: int, workspace_mib: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(N) each: log-prob, log-sum-exp and entropy (empty unless asked for); logits of any size, 2 NDV."""
    n_rows, dim = head.hidden.shape
    plan = tiles.forward_plan(
        n_rows, vocab_size_of(head.weight, shard), dim, head.hidden.device, workspace_mib=workspace_mib
    )
    parts = []
    for rows in blocks(n_rows, plan.rows):
        chunk = head.rows(rows)
        parts.append((sweeps(chunk).target_logits(chunk), *sweeps(chunk).online_sums(chunk, plan, entropy=entropy)))
    if not parts:
        empty = head.scale.new_empty(0)
        return empty, empty, empty
    target, top, total, moment = (torch.cat(part) for part in zip(*parts, strict=True))
    if shard >= 0:
        all_reduce = reducer(shard)
        whole_top = all_reduce(top.clone(), "max")
        shift = (top - whole_top).clamp_(min=sweep_torch.LOG_OF_NOTHING)
        rescale = shift.exp()
        target, total, moment = all_reduce(
            torch.stack([target, rescale * total, rescale * (moment + shift * total)]), "sum"
        )
        top = whole_top
    log_total = total.log()
    lse = top + log_total
    return target - lse, lse, log_total - moment / total if entropy else lse.new_empty(0)


@as_given
def _forward(hidden, weight, targets, temperature, bias, features, lora_b, live, softcap, entropy, shard):
    check_values(targets, temperature, vocab_size_of(weight, shard), live)
    head = make_head(hidden, weight, targets, temperature, bias, features, lora_b, softcap, shard)
    if live is None:
        return statistics(head, entropy=entropy, shard=shard)
    rows = live.nonzero().squeeze(1)
    results = statistics(head.rows(rows), entropy=entropy, shard=shard)
    return tuple(
        part if len(part) < len(rows) else part.new_full(targets.shape, torch.nan).index_copy_(0, rows, part)
        for part in results
    )


@as_given
def _backward(
    hidden, weight, targets, temperature, bias, features, lora_b, softcap, shard, lse, entropy,
    grad_logprobs, grad_lse, grad_entropy, needs, workspace_mib=None,
):  # fmt: skip
    head = make_head(hidden, weight, targets, temperature, bias, features, lora_b, softcap, shard)
    live = (grad_logprobs != 0) | (grad_lse != 0)
    if entropy.numel():
        live |= grad_entropy != 0
    rows = live.nonzero().squeeze(1)
    if len(rows) < len(targets):
        head = head.rows(rows)
        lse, grad_logprobs, grad_lse = lse[rows], grad_logprobs[rows], grad_lse[rows]
        if entropy.numel():
            entropy, grad_entropy = entropy[rows], grad_entropy[rows]
    return recompute_gradients(
        head, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs, shard, workspace_mib,
        None if len(rows) == len(targets) else (rows, len(targets)),
    )  # fmt: skip


def recompute_gradients(
    head: Head, lse: Tensor, entropy: Tensor, grad_logprobs: Tensor, grad_lse: Tensor, grad_entropy: Tensor,
    needs: list[bool], shard: int, workspace_mib: int | None, spread: tuple[Tensor, int] | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of (hidden, weight, bias, features, lora_b), an empty tensor for each that is not needed; up to 6 NDV.

    All per-row tensors have the head's rows; ``spread`` (rows, N) says where they lie among the N of the results.
    """
    n_rows, dim = head.hidden.shape
    plan = tiles.recompute_plan(
        n_rows, vocab_size_of(head.weight, shard), dim, head.hidden.device,
        torch.promote_types(head.hidden.dtype, head.weight.dtype), workspace_mib,
    )  # fmt: skip
    need_hidden, need_weight, need_bias, need_features, need_lora_b = needs
    sweep = sweeps(head)
    with_entropy = entropy.numel() > 0
    alpha = grad_lse - grad_logprobs - (grad_entropy * entropy if with_entropy else 0)
    beta = -grad_entropy if with_entropy else torch.zeros_like(alpha)
    target_logit = reducer(shard)(sweep.target_logits(head), "sum")
    log_p = target_logit - lse
    at_target = grad_logprobs + log_p.exp() * (alpha + beta * log_p.clamp(min=sweep_torch.LOG_OF_NOTHING))
    if head.softcap:
        at_target *= 1 - (target_logit / (head.scale * head.softcap)).square()
    at_target *= head.scale

    grads = Gradients(head, needs, plan.gemm_dtype, whole_weight=False)
    space = sweep.workspace(plan.rows, plan.columns, head.hidden, plan.dtype)
    for columns in blocks(len(head.weight), plan.columns):
        tile = head.columns(columns)
        tile = tile._replace(weight=tile.weight.to(torch.promote_types(tile.weight.dtype, plan.gemm_dtype)))
        grads.open_weight(columns)
        for rows in blocks(n_rows, plan.rows):
            part = tile.rows(rows)
            dz = space[: len(part.hidden), : len(part.weight)]
            sweep.logit_gradients(part, lse[rows], alpha[rows], beta[rows], at_target[rows], dz, plan)
            for total, right in ((grads.hidden, part.weight), (grads.features, part.lora_b)):
                if total is not None:
                    grads.multiply(total[rows], dz, right)
            grads.add_weight(dz, [slice(0, len(part.weight))], part.hidden, part.features, None)
        grads.close_weight(columns)
    return grads.results(spread, shard)


class Gradients:
    """Accumulates, in fp32 (or float64), the gradients of whatever needs one; the two GEMMs of the backward pass.

    With ``whole_weight`` those of the weight stay in full precision until the end; otherwise only the rows that are
    open do, and are rounded once when they are closed.
    """

    def __init__(self, head: Head, needs: list[bool], gemm_dtype: torch.dtype, *, whole_weight: bool):
        self.head, self.gemm_dtype = head, gemm_dtype
        need_hidden, need_weight, need_bias, need_features, need_lora_b = needs

        def zeros(needed: bool, like: Tensor | None) -> Tensor | None:
            return torch.zeros(like.shape, dtype=head.dtype, device=like.device) if needed else None

        def result(needed: bool, like: Tensor | None) -> Tensor | None:
            dtype = head.dtype if whole_weight and needed else like.dtype if needed else None
            return torch.empty(like.shape, dtype=dtype, device=like.device) if needed else None

        self.hidden, self.features = zeros(need_hidden, head.hidden), zeros(need_features, head.features)
        of_weight = [(need_weight, head.weight), (need_lora_b, head.lora_b), (need_bias, head.bias)]
        self.whole = [result(needed, like) for needed, like in of_weight]  # weight, lora_b, bias
        self.open = self.whole
        self.begun = False  # the first GEMM into the open rows overwrites them, which spares setting them to zero

    def open_weight(self, columns: slice) -> None:
        """From here on rows ``columns`` of the weight's gradients are accumulated, in full precision."""
        self.begun = False
        self.open = [
            None if t is None else torch.empty(t[columns].shape, dtype=self.head.dtype, device=t.device)
            for t in self.whole
        ]

    def close_weight(self, columns: slice) -> None:
        self._settle()
        for whole, part in zip(self.whole, self.open, strict=True):
            if whole is not None:
                whole[columns] = part

    def _settle(self) -> None:
        if not self.begun:
            for part in self.open:
                if part is not None:
                    part.zero_()

    def add_weight(
        self, dz: Tensor, blocks: list[slice], hidden: Tensor, features: Tensor | None, factor: Tensor | None
    ) -> None:
        """``dz^T (factor * hidden)`` and so on, into the open rows of the weight's gradients, a block at a time.

        dz: (n, columns), the gradient of the logits up to the rows' ``factor`` (n).
        """
        if not any(part is not None for part in self.open):
            return

        def scaled(tensor: Tensor) -> Tensor:
            tensor = tensor if factor is None else tensor.to(self.head.dtype) * factor[:, None]
            return tensor.to(self.gemm_dtype)

        weight, lora_b, bias = self.open
        ones = dz.new_ones(len(dz), dtype=self.head.dtype) if factor is None else factor
        sides = [
            (total, right)
            for total, right in (
                (weight, None if weight is None else scaled(hidden)),
                (lora_b, None if lora_b is None else scaled(features)),
                (None if bias is None else bias[:, None], ones[:, None]),
            )
            if total is not None
        ]
        for columns in blocks:
            left = dz[:, columns].T.to(self.gemm_dtype)
            for total, right in sides:
                self.multiply(total[columns], left, right, fresh=not self.begun)
        self.begun = True

    def multiply(self, total: Tensor, left: Tensor, right: Tensor, *, fresh: bool = False) -> None:
        """total += left @ right, or = where ``fresh``."""
        left, right, beta = left.to(self.gemm_dtype), right.to(self.gemm_dtype), 0 if fresh else 1
        if total.dtype == self.gemm_dtype:
            total.addmm_(left, right, beta=beta)
        elif total.device.type == "cuda":
            torch.addmm(total, left, right, beta=beta, out_dtype=total.dtype, out=total)
        elif fresh:  # a CPU has no GEMM from bf16 to fp32
            total.copy_(left @ right)
        else:
            total += left @ right

    def results(self, spread: tuple[Tensor, int] | None, shard: int) -> tuple[Tensor, ...]:
        if self.open is self.whole:
            self._settle()
        head, (weight, lora_b, bias) = self.head, self.whole
        of_hidden = []
        for total, like in ((self.hidden, head.hidden), (self.features, head.features)):
            if total is not None:
                total = reducer(shard)(total, "sum").to(like.dtype)
                if spread is not None:
                    rows, n_rows = spread
                    total = total.new_zeros(n_rows, total.shape[1]).index_copy_(0, rows, total)
            of_hidden.append(total)
        of_weight = [
            None if total is None else total.to(like.dtype)
            for total, like in ((weight, head.weight), (lora_b, head.lora_b), (bias, head.bias))
        ]
        ordered = (of_hidden[0], of_weight[0], of_weight[2], of_hidden[1], of_weight[1])
        return tuple(head.hidden.new_empty(0) if total is None else total for total in ordered)


def _fake_forward(hidden, weight, targets, temperature, bias, features, lora_b, live, softcap, entropy, shard):
    stats = [hidden.new_empty(targets.shape, dtype=compute_dtype(hidden)) for _ in range(3)]
    return stats[0], stats[1], stats[2] if entropy else stats[2].new_empty(0)


def fake_gradients(hidden, weight, bias, features, lora_b, needs):
    return tuple(
        like.new_empty(like.shape) if need else hidden.new_empty(0)
        for like, need in zip((hidden, weight, bias, features, lora_b), needs, strict=True)
    )


def _fake_backward(
    hidden, weight, targets, temperature, bias, features, lora_b, softcap, shard, lse, entropy,
    grad_logprobs, grad_lse, grad_entropy, needs, workspace_mib=None,
):  # fmt: skip
    return fake_gradients(hidden, weight, bias, features, lora_b, needs)


def _save(ctx, inputs, output):
    hidden, weight, targets, temperature, bias, features, lora_b, _, ctx.softcap, _, ctx.shard = inputs
    _, lse, entropy = output
    ctx.save_for_backward(hidden, weight, targets, temperature, bias, features, lora_b, lse, entropy)


def _differentiate(ctx, grad_logprobs, grad_lse, grad_entropy):
    *inputs, lse, entropy = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[0], needed[1], needed[4], needed[5], needed[6]]
    grads = torch.ops.toolx.linear_logprob_backward(
        *inputs, ctx.softcap, ctx.shard, lse, entropy, grad_logprobs, grad_lse, grad_entropy, needs, None
    )
    hidden, weight, bias, features, lora_b = (g if need else None for g, need in zip(grads, needs, strict=True))
    return hidden, weight, None, None, bias, features, lora_b, None, None, None, None


HEAD_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor temperature, Tensor? bias, Tensor? features, Tensor? lora_b"
)
_library.define(
    f"linear_logprob({HEAD_SCHEMA}, Tensor? live, float softcap, bool entropy, int shard) -> (Tensor, Tensor, Tensor)",
    default=_forward,
    triton=_forward,
    fake=_fake_forward,
)
_library.define(
    f"linear_logprob_backward({HEAD_SCHEMA}, float softcap, int shard, Tensor lse, Tensor entropy, "
    "Tensor grad_logprobs, Tensor grad_lse, Tensor grad_entropy, bool[] needs, int? workspace_mib=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_backward,
    triton=_backward,
    fake=_fake_backward,
)
torch.library.register_autograd("toolx::linear_logprob", _differentiate, setup_context=_save, lib=_library.library)
