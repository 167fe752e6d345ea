"""Live rows: the rows of a call that are computed, with the advantage and weight of each.

The device finds them before the host knows their number; all values that the host needs are in one tensor, which it
reads once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.dual import is_finite
from toolx_kernels.ops.lm_head.checks import wrong_denominator, wrong_rows
from toolx_kernels.ops.lm_head.head import Head, Trained
from toolx_kernels.ops.lm_head.objective import RowVectors, token_weights

try:
    import triton
    import triton.language as tl

    from toolx_kernels.ops.triton_common import per_row_kernel
except ImportError:  # a CPU build of torch comes without triton
    triton = None


class Batch(NamedTuple):
    """The n computed rows of N, with their vectors."""

    head: Head
    vectors: RowVectors
    lengths: Tensor  # (B) int64, computed rows of each completion, in order
    bounds: list[int]  # (B + 1) computed rows before each completion, on the host
    rows: Tensor  # (n) int64, their indices among the N
    n_rows: int  # N
    needs: Trained


class LiveRows(NamedTuple):
    """``facts`` has four rows: cu_seqlens, the computed rows of each completion, its unmasked rows, and a row with a 1
    anywhere if some value is invalid. The others hold the computed rows in order, followed by arbitrary values."""

    facts: Tensor  # (4, B + 1) int64
    rows: Tensor  # (N) int64
    advantages: Tensor  # (N)
    weights: Tensor  # (N) share of the loss


class Call(NamedTuple):
    """The inputs that determine the live rows, unchecked."""

    targets: Tensor  # (N) int64
    temperature: Tensor  # (N)
    vocab_size: int
    cu_seqlens: Tensor  # (B + 1)
    advantages: Tensor  # (B) or (N)
    rewards: Tensor | None  # (B)
    mask: Tensor | None  # (N) bool
    denominator: Tensor | None  # ()

    @property
    def n_completions(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def advantage_per_token(self) -> bool:
        return len(self.advantages) != self.n_completions


def finder(device: torch.device, dtype: torch.dtype) -> Callable[[Call, GRPOLossConfig, torch.dtype], LiveRows]:
    """The implementation for these tensors."""
    return in_triton if triton is not None and device.type == "cuda" and dtype == torch.float32 else in_torch


def in_torch(call: Call, config: GRPOLossConfig, dtype: torch.dtype) -> LiveRows:
    """The live rows, with advantages and weights in ``dtype``."""
    n_rows, advantages, mask = len(call.targets), call.advantages, call.mask
    bounds = call.cu_seqlens.long().clamp(0, n_rows)
    completion = torch.searchsorted(bounds[1:], torch.arange(n_rows, device=bounds.device), right=True)
    completion = completion.clamp_(max=call.n_completions - 1)  # (N) index of each token's
    if mask is None:
        mask = torch.ones_like(call.targets, dtype=torch.bool)

    def per_completion(chosen: Tensor) -> Tensor:  # (B)
        return torch.nn.functional.pad(chosen.cumsum(0), (1, 0))[bounds].diff()

    of_row = advantages if call.advantage_per_token else advantages[completion]
    computed = mask if config.computes_every_row else mask & (of_row != 0)
    if config.needs_whole_sequences:
        computed = mask & (per_completion(computed) > 0)[completion]
    outside, frozen = wrong_rows(call.targets, call.temperature, call.vocab_size)
    wrong = ((outside | frozen) & computed).any() | ~advantages.isfinite().all()
    if call.rewards is not None:
        wrong |= ~call.rewards.isfinite().all()
    if call.denominator is not None:
        wrong |= wrong_denominator(call.denominator)
    unmasked = per_completion(mask)
    counts = torch.stack([per_completion(computed), unmasked, wrong.expand(len(unmasked))])
    facts = torch.cat([call.cu_seqlens[None], torch.nn.functional.pad(counts, (0, 1))])
    weights = token_weights(unmasked.to(dtype), config, call.denominator)
    rows = computed.nonzero_static(size=n_rows, fill_value=0).squeeze(1)
    return LiveRows(facts, rows, of_row.to(dtype)[rows], weights[completion[rows]])


if triton is not None:

    @triton.jit
    def _unmasked(mask_ptr, row, last, HAS_MASK: tl.constexpr):
        """Whether each row belongs to the completion that ends at ``last`` and is unmasked."""
        counts = row < last
        if HAS_MASK:
            counts = counts & (tl.load(mask_ptr + row, mask=counts, other=0) != 0)
        return counts

    @triton.jit
    def _span(cu_ptr, b, N):
        """The rows of completion b, clamped to N."""
        first, last = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
        return tl.minimum(tl.maximum(first, 0), N), tl.minimum(tl.maximum(last, 0), N)

    @per_row_kernel
    def survey_kernel(
        cu_ptr, advantage_ptr, reward_ptr, mask_ptr, targets_ptr, temperature_ptr, facts_ptr, N, V,
        EVERY_ROW: tl.constexpr, PER_TOKEN: tl.constexpr, WHOLE: tl.constexpr, HAS_REWARDS: tl.constexpr,
        HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes a column of ``facts``, (4, B + 1); one program per completion, the last one also the last column.

        PER_TOKEN: advantages are (N). WHOLE: all unmasked rows of a completion are computed if one advantage is not 0.
        """
        b, n_completions = tl.program_id(0), tl.num_programs(0)
        first, last = _span(cu_ptr, b, N)
        n_unmasked = tl.zeros((BLOCK,), dtype=tl.int32)
        n_computed = tl.zeros((BLOCK,), dtype=tl.int32)
        n_wrong = tl.zeros((BLOCK,), dtype=tl.int32)  # of computed rows, or if WHOLE of unmasked ones
        n_infinite = tl.zeros((BLOCK,), dtype=tl.int32)  # advantages and rewards
        if not PER_TOKEN:
            advantage = tl.load(advantage_ptr + b)
            n_infinite += tl.where(is_finite(advantage), 0, 1)
        if HAS_REWARDS:
            n_infinite += tl.where(is_finite(tl.load(reward_ptr + b)), 0, 1)
        for start in range(first, last, BLOCK):
            row = start + tl.arange(0, BLOCK)
            counts = _unmasked(mask_ptr, row, last, HAS_MASK)
            if PER_TOKEN:
                advantage = tl.load(advantage_ptr + row, mask=row < last, other=0)
                n_infinite += tl.where(is_finite(advantage), 0, 1)
            computed = counts
            if not EVERY_ROW:
                computed = tl.where(counts, advantage, 0) != 0
            target = tl.load(targets_ptr + row, mask=counts, other=0)
            temperature = tl.load(temperature_ptr + row, mask=counts, other=1)
            right = (target >= 0) & (target < V) & (temperature > 0) & is_finite(temperature)
            n_unmasked += tl.where(counts, 1, 0)
            n_computed += tl.where(computed, 1, 0)
            n_wrong += tl.where((counts if WHOLE else computed) & (right == 0), 1, 0)
        n_unmasked, n_computed = tl.sum(n_unmasked, 0), tl.sum(n_computed, 0)
        n_wrong, n_infinite = tl.sum(n_wrong, 0), tl.sum(n_infinite, 0)
        if WHOLE:
            n_wrong = tl.where(n_computed > 0, n_wrong, 0)
            n_computed = tl.where(n_computed > 0, n_unmasked, 0)
        width = n_completions + 1
        column = facts_ptr + b
        tl.store(column, tl.load(cu_ptr + b).to(tl.int64))
        tl.store(column + width, n_computed)
        tl.store(column + 2 * width, n_unmasked)
        tl.store(column + 3 * width, tl.where(n_wrong + n_infinite > 0, 1, 0))
        if b == n_completions - 1:
            tl.store(column + 1, tl.load(cu_ptr + b + 1).to(tl.int64))
            for line in tl.static_range(1, 4):
                tl.store(column + line * width + 1, 0)

    @per_row_kernel
    def place_rows_kernel(
        cu_ptr, advantage_ptr, weight_ptr, mask_ptr, facts_ptr, rows_ptr, advantages_ptr, weights_ptr, N,
        PER_TOKEN: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes a completion's computed rows after those of the completions before it; one program per completion."""
        b, width = tl.program_id(0), tl.num_programs(0) + 1
        first, last = _span(cu_ptr, b, N)
        computed_ptr = facts_ptr + width
        n_computed, n_unmasked = tl.load(computed_ptr + b), tl.load(computed_ptr + width + b)
        if n_computed > 0:
            weight = tl.load(weight_ptr + b)
            if not PER_TOKEN:
                advantage = tl.load(advantage_ptr + b)
            before = tl.zeros((BLOCK,), dtype=tl.int64)
            for start in range(0, b, BLOCK):
                other = start + tl.arange(0, BLOCK)
                before += tl.load(computed_ptr + other, mask=other < b, other=0)
            place = tl.sum(before, 0)
            for start in range(first, last, BLOCK):
                row = start + tl.arange(0, BLOCK)
                counts = _unmasked(mask_ptr, row, last, HAS_MASK)
                if PER_TOKEN:
                    advantage = tl.load(advantage_ptr + row, mask=counts, other=0)
                    if n_computed < n_unmasked:
                        counts = counts & (advantage != 0)
                places = place + tl.cumsum(counts.to(tl.int64), 0) - 1
                place += tl.sum(counts.to(tl.int64), 0)
                counts = counts & (places < N)  # decreasing bounds count rows twice
                tl.store(rows_ptr + places, row, mask=counts)
                tl.store(advantages_ptr + places, advantage.to(tl.float32), mask=counts)
                tl.store(weights_ptr + places, weight, mask=counts)

    def in_triton(call: Call, config: GRPOLossConfig, dtype: torch.dtype) -> LiveRows:
        """The same as ``in_torch``, in two kernels."""
        n_rows, n_completions, per_token = len(call.targets), call.n_completions, call.advantage_per_token
        targets, temperature, cu_seqlens, advantages, rewards, mask = (
            None if t is None else t.contiguous()
            for t in (call.targets, call.temperature, call.cu_seqlens, call.advantages, call.rewards, call.mask)
        )
        flags = {"PER_TOKEN": per_token, "HAS_MASK": mask is not None, "BLOCK": 512}
        absent = targets  # never read
        mask = absent if mask is None else mask
        facts = call.targets.new_empty(4, n_completions + 1)
        survey_kernel[(n_completions,)](
            cu_seqlens, advantages, absent if rewards is None else rewards, mask, targets, temperature, facts,
            n_rows, call.vocab_size, EVERY_ROW=config.computes_every_row,
            WHOLE=per_token and config.needs_whole_sequences, HAS_REWARDS=rewards is not None, **flags,
        )  # fmt: skip
        if call.denominator is not None:
            facts[3, 0] += wrong_denominator(call.denominator)
        weights = token_weights(facts[2, :-1].to(dtype), config, call.denominator)
        rows, per_row = torch.empty_like(targets), weights.new_empty(2, n_rows)
        place_rows_kernel[(n_completions,)](
            cu_seqlens, advantages, weights, mask, facts, rows, *per_row.unbind(), n_rows, **flags
        )
        return LiveRows(facts, rows, per_row[0], per_row[1])
