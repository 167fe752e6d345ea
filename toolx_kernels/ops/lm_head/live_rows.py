"""The rows of a call that are computed, with the advantage and weight of each; what the host must know is one tensor.

Rows are known on the device before the host knows how many they are, so all of it comes before the one read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head.checks import wrong_rows
from toolx_kernels.ops.lm_head.head import Head, Trained
from toolx_kernels.ops.lm_head.objective import RowVectors, is_finite, token_weights

try:
    import triton
    import triton.language as tl

    from toolx_kernels.ops.triton_common import per_row_kernel
except ImportError:  # a CPU build of torch brings no triton
    triton = None


class Batch(NamedTuple):
    """The rows that are computed, n of N, and what belongs to them."""

    head: Head
    vectors: RowVectors
    lengths: Tensor  # (B) int64, their rows by completion, in order
    bounds: list[int]  # (B + 1) rows before each completion, on the host
    rows: Tensor  # (n) int64, where they lie among the N
    n_rows: int  # N
    needs: Trained


class LiveRows(NamedTuple):
    """``facts``: cu_seqlens, the rows of each completion that are computed, those that are unmasked, and in any place
    of the last line 1 if some value is wrong. The others hold the computed rows in order, and behind them anything."""

    facts: Tensor  # (4, B + 1) int64
    rows: Tensor  # (N) int64
    advantages: Tensor  # (N)
    weights: Tensor  # (N) share of the loss


class Call(NamedTuple):
    """What decides, unchecked."""

    targets: Tensor  # (N) int64
    temperature: Tensor  # (N)
    vocab_size: int
    cu_seqlens: Tensor  # (B + 1)
    advantages: Tensor  # (B)
    rewards: Tensor | None  # (B)
    mask: Tensor | None  # (N) bool
    denominator: Tensor | None  # ()


def finder(device: torch.device, dtype: torch.dtype) -> Callable[[Call, GRPOLossConfig, torch.dtype], LiveRows]:
    """The implementation for these tensors."""
    return in_triton if triton is not None and device.type == "cuda" and dtype == torch.float32 else in_torch


def in_torch(call: Call, config: GRPOLossConfig, dtype: torch.dtype) -> LiveRows:
    """``dtype``: of advantages and weights."""
    n_rows, advantages, mask = len(call.targets), call.advantages, call.mask
    bounds = call.cu_seqlens.long().clamp(0, n_rows)
    completion = torch.searchsorted(bounds[1:], torch.arange(n_rows, device=bounds.device), right=True)
    completion = completion.clamp_(max=len(advantages) - 1)  # (N) each token's
    if mask is None:
        mask = torch.ones_like(call.targets, dtype=torch.bool)
    computed = mask if config.computes_every_row else mask & (advantages != 0)[completion]

    def per_completion(chosen: Tensor) -> Tensor:  # (B)
        return torch.nn.functional.pad(chosen.cumsum(0), (1, 0))[bounds].diff()

    outside, frozen = wrong_rows(call.targets, call.temperature, call.vocab_size)
    wrong = ((outside | frozen) & computed).any() | ~advantages.isfinite().all()
    if call.rewards is not None:
        wrong |= ~call.rewards.isfinite().all()
    unmasked = per_completion(mask)
    counts = torch.stack([per_completion(computed), unmasked, wrong.expand(len(unmasked))])
    facts = torch.cat([call.cu_seqlens[None], torch.nn.functional.pad(counts, (0, 1))])
    weights = token_weights(unmasked.to(dtype), config, call.denominator)
    rows = computed.nonzero_static(size=n_rows, fill_value=0).squeeze(1)
    owner = completion[rows]
    return LiveRows(facts, rows, advantages.to(dtype)[owner], weights[owner])


if triton is not None:

    @triton.jit
    def _unmasked(mask_ptr, row, last, HAS_MASK: tl.constexpr):
        """Whether each row is one of the completion, which ends at ``last``, and unmasked."""
        counts = row < last
        if HAS_MASK:
            counts = counts & (tl.load(mask_ptr + row, mask=counts, other=0) != 0)
        return counts

    @triton.jit
    def _span(cu_ptr, b, N):
        """The rows of completion b, within the N whatever its bounds say."""
        first, last = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
        return tl.minimum(tl.maximum(first, 0), N), tl.minimum(tl.maximum(last, 0), N)

    @per_row_kernel
    def survey_kernel(
        cu_ptr, advantage_ptr, reward_ptr, mask_ptr, targets_ptr, temperature_ptr, facts_ptr, N, V,
        EVERY_ROW: tl.constexpr, HAS_REWARDS: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """A column of ``facts``, (4, B + 1); one program a completion. The last column is left to the last of them."""
        b, n_completions = tl.program_id(0), tl.num_programs(0)
        first, last = _span(cu_ptr, b, N)
        advantage = tl.load(advantage_ptr + b)
        fine = is_finite(advantage)
        if HAS_REWARDS:
            fine = fine & is_finite(tl.load(reward_ptr + b))
        live = (advantage != 0) | EVERY_ROW
        n_unmasked = tl.zeros((BLOCK,), dtype=tl.int32)
        n_wrong = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(first, last, BLOCK):
            row = start + tl.arange(0, BLOCK)
            counts = _unmasked(mask_ptr, row, last, HAS_MASK)
            target = tl.load(targets_ptr + row, mask=counts, other=0)
            temperature = tl.load(temperature_ptr + row, mask=counts, other=1)
            right = (target >= 0) & (target < V) & (temperature > 0) & is_finite(temperature)
            n_unmasked += tl.where(counts, 1, 0)
            n_wrong += tl.where(counts & (right == 0), 1, 0)
        n_unmasked, n_wrong = tl.sum(n_unmasked, 0), tl.sum(n_wrong, 0)
        width = n_completions + 1
        column = facts_ptr + b
        tl.store(column, tl.load(cu_ptr + b).to(tl.int64))
        tl.store(column + width, tl.where(live, n_unmasked, 0))
        tl.store(column + 2 * width, n_unmasked)
        tl.store(column + 3 * width, tl.where(fine & ((n_wrong == 0) | (live == 0)), 0, 1))
        if b == n_completions - 1:
            tl.store(column + 1, tl.load(cu_ptr + b + 1).to(tl.int64))
            for line in tl.static_range(1, 4):
                tl.store(column + line * width + 1, 0)

    @per_row_kernel
    def place_rows_kernel(
        cu_ptr, advantage_ptr, weight_ptr, mask_ptr, facts_ptr, rows_ptr, advantages_ptr, weights_ptr, N,
        EVERY_ROW: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Writes a completion's computed rows behind those of the completions before it; one program a completion."""
        b = tl.program_id(0)
        first, last = _span(cu_ptr, b, N)
        advantage, weight = tl.load(advantage_ptr + b), tl.load(weight_ptr + b)
        if (advantage != 0) | EVERY_ROW:
            computed_ptr = facts_ptr + tl.num_programs(0) + 1
            before = tl.zeros((BLOCK,), dtype=tl.int64)
            for start in range(0, b, BLOCK):
                other = start + tl.arange(0, BLOCK)
                before += tl.load(computed_ptr + other, mask=other < b, other=0)
            place = tl.sum(before, 0)
            for start in range(first, last, BLOCK):
                row = start + tl.arange(0, BLOCK)
                counts = _unmasked(mask_ptr, row, last, HAS_MASK)
                places = place + tl.cumsum(counts.to(tl.int64), 0) - 1
                place += tl.sum(counts.to(tl.int64), 0)
                counts = counts & (places < N)  # bounds that fall count rows twice
                tl.store(rows_ptr + places, row, mask=counts)
                tl.store(advantages_ptr + places, advantage.to(tl.float32), mask=counts)
                tl.store(weights_ptr + places, weight, mask=counts)

    def in_triton(call: Call, config: GRPOLossConfig, dtype: torch.dtype) -> LiveRows:
        """The same in two kernels."""
        n_rows, n_completions = len(call.targets), len(call.advantages)
        targets, temperature, cu_seqlens, advantages, rewards, mask = (
            None if t is None else t.contiguous()
            for t in (call.targets, call.temperature, call.cu_seqlens, call.advantages, call.rewards, call.mask)
        )
        flags = {"EVERY_ROW": config.computes_every_row, "HAS_MASK": mask is not None, "BLOCK": 512}
        absent = targets  # never read
        mask = absent if mask is None else mask
        facts = call.targets.new_empty(4, n_completions + 1)
        survey_kernel[(n_completions,)](
            cu_seqlens, advantages, absent if rewards is None else rewards, mask, targets, temperature, facts,
            n_rows, call.vocab_size, HAS_REWARDS=rewards is not None, **flags,
        )  # fmt: skip
        weights = token_weights(facts[2, :-1].to(dtype), config, call.denominator)
        rows, per_row = torch.empty_like(targets), weights.new_empty(2, n_rows)
        place_rows_kernel[(n_completions,)](
            cu_seqlens, advantages, weights, mask, facts, rows, *per_row.unbind(), n_rows, **flags
        )
        return LiveRows(facts, rows, per_row[0], per_row[1])
