"""The fused linear GRPO loss, from hidden states and the LM-head weight in one sweep over the vocabulary.

    hidden (N, D), weight (V, D), targets (N) -> logprobs (N) -> advantages (B) or (N) -> token losses (N) -> loss

A policy gradient needs only two numbers per token: c = d loss / d logprob and, with an entropy bonus,
e = d loss / d entropy. So for a chunk of rows (one GEMM) the exponentials of all logits are kept, relative to an anchor
close to the row's log-sum-exp; their sums give log-prob and entropy, the objective gives c and e, and the two gradient
GEMMs multiply the same exponentials, rescaled row by row. The logits are never computed twice and exist only for the
chunk. With E = exp(z - anchor), s its sum, p_y the target's probability and y the target:

    d hidden = r * (E W) + t W_y            r = -c / (T s),  t = c (1 - p_y) / T,  E_y = 0
    d weight = E'^T (r * hidden)            E'_y = t / r

Rows that cannot have a gradient are not swept: masked tokens, and those of advantage 0 (all of a group with equal
rewards) unless something else needs them. Rows that get no gradient from the objective (clipped ones) are dropped
before the GEMMs; on a GPU, which must be waited for to find them, only if the first chunk has enough. If a single sweep
is not possible or not worth it (``sweeps_once``), or if an anchor turns out to be so far off that exponentials over- or
underflow, the vocabulary is swept twice instead.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops import library
from toolx_kernels.ops.advantages import check_rewards, group_advantages
from toolx_kernels.ops.lm_head import live_rows
from toolx_kernels.ops.lm_head.checks import (
    check_advantages,
    check_bounds,
    check_denominator,
    check_first_derivative,
    check_head,
    check_saved,
    check_targets,
    check_transforms,
    check_values,
    check_vectors,
    given_denominator,
    is_trained,
    row_temperatures,
    saved,
)
from toolx_kernels.ops.lm_head.head import (
    HeadGradients,
    HeadInputs,
    Trained,
    as_given,
    fake_results,
    for_autograd,
    pick,
    results_of,
)
from toolx_kernels.ops.lm_head.linear_logprob import HEAD_SCHEMA, BackwardInputs
from toolx_kernels.ops.lm_head.live_rows import Batch
from toolx_kernels.ops.lm_head.objective import RowVectors
from toolx_kernels.ops.lm_head.per_row import PerRow
from toolx_kernels.ops.lm_head.scaling import scaled
from toolx_kernels.ops.lm_head.single_sweep import single_sweep, sweeps_once
from toolx_kernels.ops.lm_head.two_sweeps import two_sweeps
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
    advantages: Tensor | None = None,  # (B) or (N)
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

    The gradients are formed in the forward pass (for fp16, and with ``config.recompute``, in the backward pass). To
    save work, call it under ``torch.no_grad()`` if no gradient is needed, and freeze what is not trained.

    Args:
        hidden: (N, D); ``hidden[n]`` predicts ``targets[n]``. Only completion tokens are packed.
        cu_seqlens: (B + 1) int32; completion b is rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        rewards: (B), turned into advantages within groups of ``group_size`` or of equal ``group_ids``.
        advantages: instead of rewards, (B) one per completion or (N) one per token; if B = N they are per completion.
            Those of masked tokens must be finite but have no effect. Normalizers also count tokens whose advantage is
            0. If a completion's tokens share a ratio or a weight (sequence level or mode, ``vespo``), all of them are
            part of it as soon as one has an advantage that is not 0.
        old_logprobs: (N) log-probs under the policy in the ratio's denominator; None if the batch is on-policy.
        ref_logprobs: (N) log-probs under the reference policy; required if ``config.beta`` is not 0.
        sampler_logprobs: (N) log-probs reported by the sampler, for importance weights.
        mask: (N) bool; False rows (for example tool output) contribute nothing. A completion without any True row
            contributes 0 and still counts in B.
        denominator: replaces the normalizer (see ``GRPOLossConfig.loss_type``), so that micro-batches add up to one
            batch.
        temperature: a number or (N) one per row, instead of ``config.temperature``.
        shard: see ``linear_logprob``.

    Returns:
        GRPOOutput; ``logprobs`` and ``entropy`` are NaN on rows that were left out (masked, or without gradient
        unless ``config.compute_all_logprobs``).

    Raises:
        InputError: shapes, dtypes or devices that do not fit, bounds that do not cover N rows, targets outside the
            vocabulary, both or neither of rewards and advantages, a reward or advantage that is not finite, a
            denominator that is not positive and finite, ``beta`` without ``ref_logprobs``. It is raised before any
            GEMM. The check of values and the number of rows together wait for a GPU once.
    """
    check_head(hidden, weight, bias, softcap)
    check_targets(hidden, weight, targets, shard)
    check_vectors(
        hidden,
        cu_seqlens,
        config,
        rewards,
        advantages,
        {
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "sampler_logprobs": sampler_logprobs,
            "mask": mask,
            "temperature": temperature if isinstance(temperature, Tensor) else None,
        },
    )
    if advantages is None:
        advantages = group_advantages(
            rewards, group_size=group_size, group_ids=group_ids, scale=config.scale_rewards, check_finite=False
        )
    denominator = given_denominator(denominator, hidden)
    needs = [torch.is_grad_enabled() and is_trained(t) for t in (hidden, weight, bias)]
    temperature = row_temperatures(config.temperature if temperature is None else temperature, hidden, targets)
    head = HeadInputs(
        hidden, weight, saved(targets), temperature, bias, float(softcap or 0), -1 if shard is None else shard.key
    )
    if gradients_in_backward(head, config):
        check_saved(hidden=hidden, weight=weight, bias=bias)
    logprobs = old_logprobs, ref_logprobs, sampler_logprobs
    check_transforms(hidden, weight, bias, temperature, rewards, advantages, *logprobs, denominator)
    rewards = None if rewards is None else rewards.detach()
    given = LossInputs(cu_seqlens, advantages, *logprobs, mask, denominator, config.key, needs, rewards)
    loss, logprobs, entropy, stats, *_ = torch.ops.toolx.linear_grpo(*head, *given)
    named = dict(zip(STATS, stats.unbind(), strict=True))
    if ref_logprobs is None:
        del named["kl"]
    return GRPOOutput(loss, logprobs, entropy, named)


class OnHost(NamedTuple):
    """The values that the host needs before the first GEMM; reading them waits for a GPU once."""

    wrong: bool  # whether some reward, advantage, target or temperature is invalid
    cu_seqlens: list[int]  # (B + 1)
    computed_before: list[int]  # (B + 1) number of computed rows before each of these bounds

    @classmethod
    def read(cls, facts: Tensor) -> OnHost:
        """From the ``facts`` of LiveRows."""
        cu_seqlens, computed, _, wrong = facts.tolist()
        return cls(any(wrong), cu_seqlens, [0, *accumulate(computed[:-1])])


class LossInputs(NamedTuple):
    """The operator's arguments besides the head."""

    cu_seqlens: Tensor  # (B + 1)
    advantages: Tensor  # (B) or (N)
    old_logprobs: Tensor | None  # (N)
    ref_logprobs: Tensor | None  # (N)
    sampler_logprobs: Tensor | None  # (N)
    mask: Tensor | None  # (N) bool
    denominator: Tensor | None  # ()
    config_key: str
    needs: list[bool]
    rewards: Tensor | None = None  # (B) only checked


class LossResults(NamedTuple):
    """The operator's results. ``lse``, ``coefficients`` and ``entropy_coefficients`` are empty unless the gradients are
    formed in the backward pass; a gradient that is not needed is empty."""

    loss: Tensor  # ()
    logprobs: Tensor  # (N)
    entropy: Tensor  # (N)
    stats: Tensor  # in the order of STATS
    lse: Tensor  # (N)
    coefficients: Tensor  # (N) d loss / d logprob
    entropy_coefficients: Tensor  # (N) d loss / d entropy
    grad_hidden: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


@as_given
def compute(*arguments) -> LossResults:
    """The operator, below autograd."""
    inputs, others = HeadInputs.split(arguments)
    given = LossInputs(*others)
    config = GRPOLossConfig.from_key(given.config_key)
    deferred = any(given.needs) and gradients_in_backward(inputs, config)
    batch = _batch(inputs, given, config)
    n_rows, rows = batch.n_rows, batch.rows

    def spread(values: Tensor, fill: float) -> Tensor:
        if len(rows) == n_rows:
            return values.clone()
        return values.new_full((n_rows,), fill).index_copy_(0, rows, values)

    def finish(per_row: PerRow, grads: HeadGradients) -> LossResults:
        objective = per_row.objective
        kept = [inputs.hidden.new_empty(0) for _ in range(3)]
        if deferred:
            c, e = objective.coefficients, objective.entropy_coefficients
            kept = [spread(x, 0.0) for x in (per_row.lse, c, torch.zeros_like(c) if e is None else e)]
        logprobs, entropy = (spread(x, torch.nan) for x in (per_row.logprobs, per_row.entropy))
        stats = _stats(per_row, given.ref_logprobs is not None)
        return LossResults(objective.losses.sum(), logprobs, entropy, stats, *kept, *results_of(grads, inputs))

    size = sweeps_once(batch, config)
    results = None if size is None else single_sweep(batch, config, size, finish)
    if results is None:
        results = finish(*two_sweeps(batch, config))
    return results


def _batch(inputs: HeadInputs, given: LossInputs, config: GRPOLossConfig) -> Batch:
    """The computed rows and their vectors. Raises InputError for an invalid value; waits for a GPU once."""
    targets, n_rows, dtype = inputs.targets, len(inputs.targets), compute_dtype(inputs.hidden)
    vocab_size = vocab_size_of(inputs.weight, inputs.shard)
    vectors = given.cu_seqlens, given.advantages, given.rewards, given.mask, given.denominator
    call = live_rows.Call(targets, inputs.temperature, vocab_size, *vectors)
    live = live_rows.finder(inputs.hidden.device, dtype)(call, config, dtype)
    head = inputs.head()
    on_host = OnHost.read(live.facts)
    rows = live.rows[: on_host.computed_before[-1]]
    if on_host.wrong and given.rewards is not None:
        check_rewards(given.rewards)
    check_bounds(on_host.cu_seqlens, n_rows)
    if on_host.wrong:
        check_denominator(given.denominator)
        check_advantages(given.advantages)
        computed = torch.zeros_like(targets, dtype=torch.bool).index_fill_(0, rows, True)
        check_values(targets, inputs.temperature, vocab_size, computed)
    logprobs = given.old_logprobs, given.ref_logprobs, given.sampler_logprobs
    others = [None if x is None else x.to(dtype).contiguous() for x in logprobs]
    if len(rows) < n_rows:
        head, others = head.rows(rows), [pick(x, rows) for x in others]
    vectors = RowVectors(live.advantages[: len(rows)], live.weights[: len(rows)], *others)
    needs = Trained() if gradients_in_backward(inputs, config) else Trained(*given.needs)
    return Batch(head, vectors, live.facts[1, :-1], on_host.computed_before, rows, n_rows, needs)


def gradients_in_backward(inputs: HeadInputs, config: GRPOLossConfig) -> bool:
    """Whether gradients are formed in backward: small fp16 ones would vanish before the loss scale is applied."""
    return config.recompute or torch.float16 in (inputs.hidden.dtype, inputs.weight.dtype)


def _stats(per_row: PerRow, with_kl: bool) -> Tensor:
    """Statistics (7) in the order of STATS; means over the rows whose log-ratios are finite."""
    objective = per_row.objective
    finite = objective.finite != 0
    logged = [per_row.entropy, objective.ratio, objective.clip_low, objective.clip_high]
    logged += [objective.kl if with_kl else torch.zeros_like(per_row.logprobs)]
    count = finite.sum()
    means = torch.where(finite, torch.stack([x.to(per_row.logprobs.dtype) for x in logged]), 0).sum(1) / count
    live = torch.full_like(count, len(finite))
    return torch.cat([torch.stack([live, live - count]), means])


def _fake(*arguments) -> LossResults:
    inputs, others = HeadInputs.split(arguments)
    given = LossInputs(*others)
    deferred = gradients_in_backward(inputs, GRPOLossConfig.from_key(given.config_key))
    n_rows, dtype = inputs.targets.shape[0], compute_dtype(inputs.hidden)

    def vector(size) -> Tensor:
        return inputs.hidden.new_empty(size, dtype=dtype)

    kept = [vector(n_rows) if deferred and any(given.needs) else inputs.hidden.new_empty(0) for _ in range(3)]
    grads = fake_results(inputs, Trained() if deferred else given.needs)
    return LossResults(vector(()), vector(n_rows), vector(n_rows), vector(len(STATS)), *kept, *grads)


def _save(ctx, inputs, output) -> None:
    head, others = HeadInputs.split(inputs)
    given, results = LossInputs(*others), LossResults(*output)
    config, ctx.needs = GRPOLossConfig.from_key(given.config_key), given.needs
    ctx.deferred, ctx.workspace_mib = gradients_in_backward(head, config), config.workspace_mib
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.deferred:
        *tensors, ctx.softcap, ctx.shard = head
        ctx.save_for_backward(
            *tensors, results.logprobs, results.lse, results.entropy, results.coefficients, results.entropy_coefficients
        )
    else:
        ctx.save_for_backward(results.grad_hidden, results.grad_weight, results.grad_bias)


def _differentiate(ctx, grad_loss, *_):
    n_inputs = len(ctx.needs_input_grad)
    if grad_loss is None:
        return (None,) * n_inputs
    check_first_derivative(grad_loss)
    if ctx.deferred:
        *tensors, logprobs, lse, entropy, c, e = ctx.saved_tensors
        upstream = c * grad_loss, torch.zeros_like(c), e * grad_loss
        given = BackwardInputs(logprobs, lse, entropy, *upstream, ctx.needs, ctx.workspace_mib)
        grads = torch.ops.toolx.linear_logprob_backward(*tensors, ctx.softcap, ctx.shard, *given)
    else:
        grads = scaled(ctx.saved_tensors, grad_loss)
    return tuple(for_autograd(grads, ctx.needs, n_inputs))


library.define(
    f"linear_grpo({HEAD_SCHEMA}, {library.arguments(LossInputs)}) -> "
    f"({', '.join(['Tensor'] * len(LossResults._fields))})",
    default=compute,
    fake=_fake,
    triton=compute,
)
torch.library.register_autograd("toolx::linear_grpo", _differentiate, setup_context=_save, lib=library.library)
