"""The single sweep over the vocabulary for the loss and its gradients; ``linear_grpo`` has the mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head import sweep as sweeps
from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.ops.lm_head.gradients import Gradients
from toolx_kernels.ops.lm_head.head import Head, HeadGradients, blocks
from toolx_kernels.ops.lm_head.live_rows import Batch
from toolx_kernels.ops.lm_head.objective import Objective, RowVectors, needs_whole_batch
from toolx_kernels.ops.lm_head.per_row import (
    LARGEST_LOG_SUM,
    Factors,
    PerRow,
    RowStatistics,
    statistics_and_objective,
)
from toolx_kernels.ops.lm_head.vocab_shard import reducer, vocab_size_of

Results = TypeVar("Results")

# A softcap's derivative is found again from the stored exponentials, so their rounding, divided by the softcap, is an
# error of the gradients. With logits of a standard deviation of 1.5 on a CPU, those of bf16 err by 0.002 at 1, as those
# of two sweeps do, by 0.03 at 0.3 and by more than 1 at 0.03; those of fp32 by 5e-7 at 1 and by 3e-4 at 0.03.
LEAST_SOFTCAP = 1.0


class HostCopy:
    """An asynchronous copy of a value to the host, which waits only when it reads the value."""

    def __init__(self, value: Tensor):
        self._value, self._copied = value, None
        if value.device.type != "cpu":
            self._value = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._copied = torch.cuda.current_stream(value.device).record_event()

    def read(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


def sweeps_once(batch: Batch, config: GRPOLossConfig) -> tiles.SweepSize | None:
    """The size of a single sweep; None if two are cheaper or, for a small softcap, more accurate, or if the objective
    cannot be computed chunk by chunk."""
    head = batch.head
    if not (any(batch.needs) and len(head.hidden)) or needs_whole_batch(config) or 0 < head.softcap < LEAST_SOFTCAP:
        return None
    (n_rows, dim), vocab_size = head.hidden.shape, vocab_size_of(head.weight, head.shard)
    size = tiles.single_sweep_size(
        n_rows,
        vocab_size,
        dim,
        head.hidden.device,
        head.weight_dtype,
        config.workspace_mib,
        n_tokens=batch.n_rows,
        trains_weight=batch.needs.weight,
    )
    if size is not None and config.needs_whole_sequences:
        longest = max(high - low for low, high in zip(batch.bounds, batch.bounds[1:], strict=False))
        return size if longest <= size.rows else None
    return size


def single_sweep(
    batch: Batch, config: GRPOLossConfig, size: tiles.SweepSize, finish: Callable[[PerRow, HeadGradients], Results]
) -> Results | None:
    """Returns ``finish(rows, gradients)``, or None if an anchor was too far off.

    A GPU computes that before the last chunk's GEMMs, and the host reads it after ``finish``, so the GPU never idles.
    """
    head = batch.head
    on_cpu = head.hidden.device.type == "cpu"
    chunks = _chunks(batch, size.rows, config)
    grads = Gradients(head, batch.needs, size.gemm_dtype, whole_weight=True, one_gemm=len(chunks) == 1)
    sweep, all_reduce = sweeps.backend(head), reducer(head.shard)
    space = sweep.workspace(size.rows, len(head.weight), head.hidden, size.dtype)
    fused = head.shard < 0 and sweep.FUSES_OBJECTIVE and not config.needs_whole_sequences
    target_logits = all_reduce(sweep.target_logits(head), "sum")
    anchors = _anchors(target_logits, batch.vectors)
    drops = on_cpu or batch.vectors.old is not None  # on-policy, no row loses its gradient
    parts = []
    for rows, lengths in chunks:
        chunk, anchor, vectors = head.rows(rows), anchors[rows], batch.vectors.rows(rows)
        exponentials = space[: len(chunk.hidden)]
        sums = sweep.exponentials(chunk, target_logits[rows], anchor, exponentials, size)
        if head.shard >= 0:
            sums = all_reduce(torch.stack([part.sum(0) for part in sums]), "sum")[:, None]
        stats, objective, factors = statistics_and_objective(
            sums, anchor, target_logits[rows], chunk, vectors, config, lengths, fused=fused
        )
        parts.append((stats, objective))
        if on_cpu and not stats.anchored.all():
            return None
        if rows.stop == len(head.hidden):
            anchored = HostCopy(torch.cat([stats.anchored for stats, _ in parts]).all())
        dropped = _add_gradients(grads, exponentials, chunk, anchor, objective, factors, rows, size, drops=drops)
        # Finding rows to drop waits for a GPU: if the first chunk has too few, the others are not searched.
        drops = drops and (dropped or on_cpu)
    del space, exponentials
    stats = RowStatistics(*(torch.cat(part) for part in zip(*(f for f, _ in parts), strict=True)))
    objective = Objective(
        *(None if part[0] is None else torch.cat(part) for part in zip(*(o for _, o in parts), strict=True))
    )
    per_row = PerRow(stats.logprobs, stats.entropy, None, objective)
    results = finish(per_row, grads.results().spread(batch.rows, batch.n_rows))
    return results if anchored.read() else None


def _chunks(batch: Batch, size: int, config: GRPOLossConfig) -> list[tuple[slice, Tensor]]:
    """Slices of at most ``size`` rows with the lengths of their completions, which are whole if they must be."""
    lengths, bounds = batch.lengths, batch.bounds
    if not config.needs_whole_sequences:
        return [(rows, lengths[:0]) for rows in blocks(bounds[-1], size)]
    chunks, first, start = [], 0, 0
    for b, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if high - start > size:
            chunks.append((slice(start, low), lengths[first:b]))
            first, start = b, low
    return [*chunks, (slice(start, bounds[-1]), lengths[first:])] if bounds[-1] > start else chunks


def _anchors(target_logits: Tensor, vectors: RowVectors) -> Tensor:
    """An estimate of each row's log-sum-exp: the one implied by an earlier log-prob of the target, or the target's own
    logit (targets are sampled, so it is rarely more than a few nats below)."""
    earlier = vectors.old if vectors.old is not None else vectors.sampler
    if earlier is None:
        return target_logits
    return target_logits - torch.where((earlier > -LARGEST_LOG_SUM) & (earlier <= 0), earlier, 0)


def _add_gradients(
    grads: Gradients,
    exponentials: Tensor,
    chunk: Head,
    anchor: Tensor,
    objective: Objective,
    factors: Factors,
    rows: slice,
    size: tiles.SweepSize,
    *,
    drops: bool,
) -> bool:
    """Adds the gradients from a chunk's exponentials, which are overwritten. With ``drops``, first drops rows that get
    no gradient from the objective; returns whether it dropped any."""
    sweep = sweeps.backend(chunk)
    c, e = objective.coefficients, objective.entropy_coefficients
    index = torch.arange(rows.start, rows.stop, device=c.device)
    order = _drop_rows(exponentials, c != 0 if e is None else (c != 0) | (e != 0), sweep) if drops else None
    if order is not None:
        chunk, index, anchor = chunk.rows(order), index[order], anchor[order]
        exponentials = exponentials[: len(order)]
        factors = Factors(*(part[order] for part in factors))
    if len(index) == 0:
        return True
    if e is not None or chunk.softcap:
        sweep.reweigh(chunk, exponentials, anchor, factors.alpha, factors.beta, size)
    columns = blocks(len(chunk.weight), size.columns)
    if grads.hidden is not None:
        part = torch.empty(chunk.hidden.shape, dtype=grads.hidden.dtype, device=grads.hidden.device)
        for block in columns:
            grads.multiply(part, exponentials[:, block], chunk.weight[block], fresh=block.start == 0)
        sweep.finish_rows(chunk, part, factors.factor, factors.at_target, grads.hidden, index)
    sweep.place_targets(chunk, exponentials, factors.placed)
    grads.add_weight(exponentials, columns, chunk.hidden, factors.factor)
    return order is not None


def _drop_rows(exponentials: Tensor, live: Tensor, sweep) -> Tensor | None:
    """Moves the last live rows into the places of dead ones; returns the new order (kept), None if nothing moved.

    A few dead rows cost less than moving others into their places. The count waits for a GPU once.
    """
    order = torch.arange(len(live), device=live.device)
    n_live = live.sum()
    n_kept, n_holes = torch.stack([n_live, (~live & (order < n_live)).sum()]).tolist()
    if 8 * n_kept > 7 * len(live):
        return None
    order = order[:n_kept]
    holes = (~live[:n_kept]).nonzero_static(size=n_holes).squeeze(1)
    movers = live.nonzero_static(size=n_kept).squeeze(1)[n_kept - n_holes :]
    sweep.move_rows(exponentials, movers, holes)
    order[holes] = movers
    return order
