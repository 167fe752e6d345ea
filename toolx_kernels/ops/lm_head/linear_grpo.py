"""The GRPO loss straight from hidden states and the LM-head weight, in one sweep over the vocabulary.

    hidden (N, D), weight (V, D), targets (N) -> logprobs (N) -> advantages (B) -> token losses (N) -> loss

A policy gradient needs of each token only two numbers: c = d loss / d logprob and, with an entropy bonus,
e = d loss / d entropy. So for a chunk of rows (one GEMM) the exponentials of all logits are kept, relative to an anchor
close to the row's log-sum-exp; their sums give log-prob and entropy, the objective gives c and e, and the same
exponentials, rescaled row by row, are what the two gradient GEMMs multiply. The logits are never computed twice and
never exist beyond the chunk. With E = exp(z - anchor), s its sum, p_y the target's probability and y the target:

    d hidden = r * (E W) + t W_y            r = -c / (T s),  t = c (1 - p_y) / T,  E_y = 0
    d weight = E'^T (r * hidden)            E'_y = t / r

Rows that cannot have a gradient never enter the sweep: masked tokens, and completions whose group has equal rewards
while nothing else asks for them. Rows that get none from the objective (clipped ones) leave it before the GEMMs; on a
GPU, which must be waited for to find them, only if the first chunk has enough. Where a sweep is not possible or not
worth it (``tiles.single_sweep_plan``), and when an anchor turns out to be so far off that exponentials over- or
underflow, the vocabulary is swept twice instead.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import library
from toolx_kernels.ops.advantages import check_rewards, group_advantages
from toolx_kernels.ops.lm_head import live_rows
from toolx_kernels.ops.lm_head.checks import (
    check_devices,
    check_first_derivative,
    check_head,
    check_values,
    row_temperatures,
)
from toolx_kernels.ops.lm_head.head import as_given, make_head, pick
from toolx_kernels.ops.lm_head.linear_logprob import HEAD_SCHEMA, fake_gradients
from toolx_kernels.ops.lm_head.objective import Objective
from toolx_kernels.ops.lm_head.per_row import Batch, PerRow, RowVectors
from toolx_kernels.ops.lm_head.scaling import scaled
from toolx_kernels.ops.lm_head.single_sweep import single_sweep
from toolx_kernels.ops.lm_head.two_sweeps import _two_sweeps
from toolx_kernels.ops.lm_head.vocab_shard import VocabShard, vocab_size_of
from toolx_kernels.reference import GRPOOutput, compute_dtype

STATS = ("live_tokens", "nonfinite", "entropy", "ratio", "clip_low", "clip_high", "kl")


def linear_grpo_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N) int64
    *,
    cu_seqlens: Tensor,  # (B + 1) int32
    rewards: Tensor | None = None,  # (B)
    advantages: Tensor | None = None,  # (B)
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # (B)
    old_logprobs: Tensor | None = None,  # (N)
    ref_logprobs: Tensor | None = None,  # (N)
    sampler_logprobs: Tensor | None = None,  # (N)
    mask: Tensor | None = None,  # (N) bool
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
    temperature: float | Tensor | None = None,  # or (N)
    shard: VocabShard | None = None,
    config: GRPOLossConfig = GRPOLossConfig(),  # noqa: B008 (frozen)
) -> GRPOOutput:
    """GRPO loss of B packed completions; ``.loss.backward()`` gives gradients of hidden, weight and bias.

    The gradients are formed in the forward pass (for fp16, and with ``config.recompute``, in the backward pass), so
    call it under ``torch.no_grad()`` where none is wanted, and freeze what is not trained: both save work.

    Args:
        hidden: (N, D); ``hidden[n]`` predicts ``targets[n]``. Only completion tokens are packed.
        cu_seqlens: (B + 1) int32; completion b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        rewards: (B), turned into advantages within groups of ``group_size`` or of equal ``group_ids``; or pass
            ``advantages`` (B) yourself.
        old_logprobs: (N) log-probs under the policy that the ratio starts from; None when the batch is on-policy.
        ref_logprobs: (N) log-probs under the reference policy; needed when ``config.beta`` is not 0.
        sampler_logprobs: (N) what the sampler reported, for importance weights.
        mask: (N) bool; False rows (tool output, say) contribute nothing. A completion without any True row
            contributes 0 and still counts in B.
        denominator: replaces the normaliser (see ``GRPOLossConfig.loss_type``), so that micro-batches add up to one
            batch.
        temperature: a number or (N) one per row, instead of ``config.temperature``.
        shard: see :func:`linear_logprob`.

    Returns:
        GRPOOutput; ``logprobs`` and ``entropy`` are NaN on rows that were left out (masked, or without gradient
        unless ``config.compute_all_logprobs``).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, bounds that do not cover N rows, targets outside the
            vocabulary, both or neither of rewards and advantages, a reward or advantage that is not finite, ``beta``
            without ``ref_logprobs``. Nothing has been computed then. A GPU is waited for once before the first GEMM,
            for the check of values and the number of rows together.
    """
    check_head(hidden, weight, targets, bias, softcap, shard)
    _check_vectors(
        hidden, cu_seqlens, config,
        per_completion={"rewards": rewards, "advantages": advantages},
        per_row={
            "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "sampler_logprobs": sampler_logprobs,
            "mask": mask, "temperature": temperature if isinstance(temperature, Tensor) else None,
        },
    )  # fmt: skip
    if advantages is None:
        advantages = group_advantages(
            rewards, group_size=group_size, group_ids=group_ids, scale=config.scale_rewards, check_finite=False
        )
    if denominator is not None:
        if isinstance(denominator, Tensor):
            if denominator.numel() != 1:
                raise InputError(f"denominator has shape {tuple(denominator.shape)}: it must be one number.")
            denominator = denominator.reshape(()).to(hidden.device, compute_dtype(hidden))
        elif not 0 < denominator < float("inf"):
            raise InputError(f"denominator={denominator} must be positive and finite, as a divisor.")
        else:
            denominator = torch.full((), denominator, dtype=compute_dtype(hidden), device=hidden.device)
    differentiable = (hidden, weight, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in differentiable]
    loss, logprobs, entropy, stats, *_ = torch.ops.toolx.linear_grpo(
        hidden, weight, targets,
        row_temperatures(config.temperature if temperature is None else temperature, hidden, targets),
        bias, softcap or 0.0, -1 if shard is None else shard.key, cu_seqlens, advantages,
        old_logprobs, ref_logprobs, sampler_logprobs, mask, denominator, config.key, needs,
        None if rewards is None else rewards.detach(),
    )  # fmt: skip
    named = dict(zip(STATS, stats.unbind(), strict=True))
    if ref_logprobs is None:
        del named["kl"]
    return GRPOOutput(loss, logprobs, entropy, named)


def _check_vectors(
    hidden: Tensor, cu_seqlens: Tensor, config: GRPOLossConfig, per_completion: dict, per_row: dict
) -> None:
    """What can be seen without reading a value."""
    for name, vector in {"cu_seqlens": cu_seqlens, **per_completion, **per_row}.items():
        if not isinstance(vector, Tensor | None):
            raise InputError(f"{name} is a {type(vector).__name__}: pass a tensor on {hidden.device}.")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise InputError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype} must hold the B + 1 integer bounds of at "
            "least one completion."
        )
    if (per_completion["rewards"] is None) == (per_completion["advantages"] is None):
        raise InputError("Give either rewards or advantages, one number per completion.")
    for vectors, size in ((per_completion, len(cu_seqlens) - 1), (per_row, len(hidden))):
        for name, vector in vectors.items():
            if vector is not None and vector.shape != (size,):
                raise InputError(
                    f"{name} has shape {tuple(vector.shape)}: it must be ({size},) to fit cu_seqlens and hidden."
                )
    check_devices(hidden.device, cu_seqlens=cu_seqlens, **per_completion, **per_row)
    if (mask := per_row["mask"]) is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}: pass mask.bool(), True where a token counts.")
    if config.beta and per_row["ref_logprobs"] is None:
        raise InputError(f"beta={config.beta} needs ref_logprobs: pass the reference policy's log-probs or set beta=0.")


class OnHost(NamedTuple):
    """What the host decides on before the first GEMM, for which a GPU is waited for once."""

    wrong: bool  # some reward, advantage, target or temperature
    cu_seqlens: list[int]  # (B + 1)
    computed_before: list[int]  # (B + 1) rows before each of these bounds that are computed

    @classmethod
    def read(cls, facts: Tensor) -> OnHost:
        """From the ``facts`` of LiveRows."""
        cu_seqlens, computed, _, wrong = facts.tolist()
        return cls(any(wrong), cu_seqlens, [0, *accumulate(computed[:-1])])


@as_given
def _linear_grpo(
    hidden, weight, targets, temperature, bias, softcap, shard,
    cu_seqlens, advantages, old_logprobs, ref_logprobs, sampler_logprobs, mask, denominator, config_key, needs,
    rewards=None,
):  # fmt: skip
    config = GRPOLossConfig.from_key(config_key)
    n_rows, dtype = len(targets), compute_dtype(hidden)
    vocab_size = vocab_size_of(weight, shard)
    head = make_head(hidden, weight, targets, temperature, bias, softcap, shard)
    live = live_rows.finder(hidden.device, dtype)(
        live_rows.Call(targets, temperature, vocab_size, cu_seqlens, advantages, rewards, mask, denominator),
        config, dtype,
    )  # fmt: skip
    seen = OnHost.read(live.facts)
    rows = live.rows[: seen.computed_before[-1]]
    if seen.wrong and rewards is not None:
        check_rewards(rewards)
    _check_bounds(seen.cu_seqlens, n_rows)
    if seen.wrong:
        _check_advantages(advantages)
        computed = torch.zeros_like(targets, dtype=torch.bool).index_fill_(0, rows, True)
        check_values(targets, temperature, vocab_size, computed)
    others = [x if x is None else x.to(dtype).contiguous() for x in (old_logprobs, ref_logprobs, sampler_logprobs)]
    if len(rows) < n_rows:
        head, others = head.rows(rows), [pick(x, rows) for x in others]
    batch = Batch(
        head,
        RowVectors(live.advantages[: len(rows)], live.weights[: len(rows)], *others),
        live.facts[1, :-1],
        seen.computed_before,
        rows,
    )
    deferred = gradients_in_backward(hidden, weight, config)

    def spread(values: Tensor, fill: float) -> Tensor:
        if len(rows) == n_rows:
            return values.clone()
        return values.new_full((n_rows,), fill).index_copy_(0, rows, values)

    def finish(per_row: PerRow, objective: Objective, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept = [hidden.new_empty(0) for _ in range(3)]
        if deferred and any(needs):
            e = objective.entropy_coefficients
            kept = [
                spread(per_row.lse, 0.0), spread(objective.coefficients, 0.0),
                hidden.new_zeros(n_rows, dtype=dtype) if e is None else spread(e, 0.0),
            ]  # fmt: skip
        return (
            objective.losses.sum(), spread(per_row.logprobs, torch.nan), spread(per_row.entropy, torch.nan),
            _stats(per_row, objective, ref_logprobs is not None), *kept, *grads,
        )  # fmt: skip

    results = None if deferred else single_sweep(batch, config, needs, n_rows, shard, finish)
    if results is None:
        results = finish(*_two_sweeps(batch, config, [False] * 3 if deferred else needs, n_rows, shard))
    return results


def gradients_in_backward(hidden: Tensor, weight: Tensor, config: GRPOLossConfig) -> bool:
    """Small fp16 gradients vanish before the loss scale is applied, so they wait for it."""
    return config.recompute or torch.float16 in (hidden.dtype, weight.dtype)


def _check_advantages(advantages: Tensor) -> None:
    if not advantages.isfinite().all():
        at = int((~advantages.isfinite()).nonzero()[0])
        raise InputError(f"advantages[{at}] = {float(advantages[at])} is not finite.")


def _check_bounds(bounds: list[int], n_rows: int) -> None:
    falling = next((b for b, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)) if high < low), None)
    if falling is not None:
        raise InputError(
            f"cu_seqlens falls from {bounds[falling]} to {bounds[falling + 1]} at {falling + 1}: "
            f"it must rise from 0 to N = {n_rows}."
        )
    if bounds[0] != 0 or bounds[-1] != n_rows:
        raise InputError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}: it must rise from 0 to N = {n_rows}.")


def _stats(per_row: PerRow, objective: Objective, with_kl: bool) -> Tensor:
    """(7) in the order of STATS; means over the rows whose log-ratios are finite."""
    finite = objective.finite != 0
    logged = [per_row.entropy, objective.ratio, objective.clip_low, objective.clip_high]
    logged += [objective.kl if with_kl else torch.zeros_like(per_row.logprobs)]
    count = finite.sum()
    means = torch.where(finite, torch.stack([x.to(per_row.logprobs.dtype) for x in logged]), 0).sum(1) / count
    live = torch.full_like(count, len(finite))
    return torch.cat([torch.stack([live, live - count]), means])


def _fake(
    hidden, weight, targets, temperature, bias, softcap, shard,
    cu_seqlens, advantages, old_logprobs, ref_logprobs, sampler_logprobs, mask, denominator, config_key, needs,
    rewards=None,
):  # fmt: skip
    dtype = compute_dtype(hidden)
    deferred = gradients_in_backward(hidden, weight, GRPOLossConfig.from_key(config_key))
    n_rows = targets.shape[0]

    def vector(size) -> Tensor:
        return hidden.new_empty(size, dtype=dtype)

    kept = [vector(n_rows) if deferred and any(needs) else hidden.new_empty(0) for _ in range(3)]
    grads = fake_gradients(hidden, weight, bias, [False] * 3 if deferred else needs)
    return vector(()), vector(n_rows), vector(n_rows), vector(len(STATS)), *kept, *grads


def _save(ctx, inputs, output):
    tensors, (ctx.softcap, ctx.shard) = inputs[:5], inputs[5:7]
    config, ctx.needs = GRPOLossConfig.from_key(inputs[14]), inputs[15]
    ctx.deferred, ctx.workspace_mib = gradients_in_backward(tensors[0], tensors[1], config), config.workspace_mib
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.deferred:
        ctx.save_for_backward(*tensors, *output[1:3], *output[4:7])
    else:
        ctx.save_for_backward(*output[7:])


def _differentiate(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * len(ctx.needs_input_grad)
    check_first_derivative(grad_loss)
    if ctx.deferred:
        *tensors, logprobs, entropy, lse, c, e = ctx.saved_tensors
        grads = torch.ops.toolx.linear_logprob_backward(
            *tensors, ctx.softcap, ctx.shard, logprobs, lse, entropy, c * grad_loss,
            torch.zeros_like(c), e * grad_loss, ctx.needs, ctx.workspace_mib,
        )  # fmt: skip
    else:
        grads = scaled(ctx.saved_tensors, grad_loss)
    hidden, weight, bias = (g if need else None for g, need in zip(grads, ctx.needs, strict=True))
    return hidden, weight, None, None, bias, *(None,) * (len(ctx.needs_input_grad) - 5)


library.define(
    f"linear_grpo({HEAD_SCHEMA}, Tensor cu_seqlens, Tensor advantages, Tensor? old_logprobs, Tensor? ref_logprobs, "
    "Tensor? sampler_logprobs, Tensor? mask, Tensor? denominator, str config_key, bool[] needs, "
    "Tensor? rewards=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_linear_grpo,
    fake=_fake,
    triton=_linear_grpo,
)
torch.library.register_autograd("toolx::linear_grpo", _differentiate, setup_context=_save, lib=library.library)
