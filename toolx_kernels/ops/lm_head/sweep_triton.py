"""Sweeps over the vocabulary as Triton kernels: the same functions as in ``sweep_torch``.

One program holds one tile of logits in registers and computes its mode's results from it, without atomics or locks, so
two runs give the same bits. Sums over the vocabulary are partial sums per tile, which a second kernel adds in order.
``N``, ``V`` and ``D`` are not part of any compile key, except whether ``BLOCK_D`` divides D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.ops.lm_head.head import Head
from toolx_kernels.ops.lm_head.tiles import GROUP_ROWS, SweepSize
from toolx_kernels.ops.triton_common import INTERPRETED, LOG2_E, capped, per_row_kernel, product_tile

FUSES_OBJECTIVE = True
ONLINE, EXPONENTIALS, GRADIENTS = (tl.constexpr(mode) for mode in range(3))  # modes of a sweep


@per_row_kernel
def sweep_kernel(
    hidden_ptr, weight_ptr, bias_ptr, scale_ptr,
    targets_ptr, target_logits_ptr,  # (N) in ONLINE and EXPONENTIALS
    anchor_ptr,  # (N) in EXPONENTIALS, lse (N) in GRADIENTS
    alpha_ptr, beta_ptr,  # (N) in GRADIENTS
    out_ptr,  # (N, stride_on), of which V columns are used: exponentials or gradients
    partial_ptr,  # (3 or 2, tiles of V, N): top in ONLINE, then total and moment
    N, V, D, softcap, start,
    stride_hn, stride_hd, stride_wv, stride_wd, stride_on,
    MODE: tl.constexpr, ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of logits ``z (BLOCK_N, BLOCK_V)``, and by MODE

    ONLINE: per row the largest z, the sum of exp(z - largest), and the sum of exp(z - largest) * (z - largest);
    EXPONENTIALS: exp(z - anchor), and its two sums;
    GRADIENTS: p (alpha + beta log p) * slope of the softcap / T.

    Columns from V to the end of out's rows are overwritten: stores of whole vectors need no mask.
    """
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_v = tl.cdiv(V, BLOCK_V)
    group = pid // (GROUP * blocks_v)
    group_size = tl.minimum(blocks_n - group * GROUP, GROUP)
    within = pid - group * (GROUP * blocks_v)
    block_n = (group * GROUP + within % group_size).to(tl.int64)
    block_v = (within // group_size).to(tl.int64)

    # Offsets inside the tile fit 32 bits; the offset of the tile is one 64-bit scalar for each tensor.
    first_n, first_v = block_n * BLOCK_N, block_v * BLOCK_V
    in_n, in_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    mask_n = in_n < (N - first_n).to(tl.int32)
    mask_v = in_v < (V - first_v).to(tl.int32)
    row = tl.where(mask_n, in_n, 0)  # rows and tokens past the end read the first one: no mask in the loop
    token = tl.where(mask_v, in_v, 0)

    acc = product_tile(
        hidden_ptr + first_n * stride_hn, weight_ptr + first_v * stride_wv, row, token, D,
        stride_hn, stride_hd, stride_wv, stride_wd, EVEN_D, PRECISION, DOT_DTYPE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip

    scale = tl.load(scale_ptr + first_n + row)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_v + token).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        acc = capped(acc, softcap)
    if MODE != GRADIENTS:
        # The exact logit of the target: a log-prob near 0 is a small difference of logits.
        local = tl.load(targets_ptr + first_n + row) - start - first_v
        local = tl.where((local >= 0) & (local < BLOCK_V), local, -1).to(tl.int32)
        exact = tl.load(target_logits_ptr + first_n + row)

    plane = blocks_v.to(tl.int64) * N
    partials = partial_ptr + block_v * N + first_n + in_n
    if MODE == ONLINE:
        z = tl.where(in_v[None, :] == local[:, None], exact[:, None], acc * scale[:, None])
        z = tl.where(mask_v[None, :], z, -3e38)
        z = tl.where(z < -3e38, -3e38, z)  # not tl.maximum, which would drop a NaN
        top = tl.max(z, 1)
        d = z - top[:, None]
        exp = tl.where(mask_v[None, :], tl.exp2(d * LOG2_E), 0.0)
        tl.store(partials, top, mask=mask_n)
        tl.store(partials + plane, tl.sum(exp, 1), mask=mask_n)
        if ENTROPY:
            d = tl.where(d < -1e4, -1e4, d)  # exp() of anything less is zero, and zero times -inf would be NaN
            tl.store(partials + 2 * plane, tl.sum(exp * d, 1), mask=mask_n)
    else:
        anchor = tl.load(anchor_ptr + first_n + row)
        if MODE == EXPONENTIALS:
            d = acc * scale[:, None] - anchor[:, None]
            if (tl.max(local, 0) >= 0) | (first_v + BLOCK_V > V):  # one tile in ten holds a target
                d = tl.where(in_v[None, :] == local[:, None], (exact - anchor)[:, None], d)
                d = tl.where(mask_v[None, :], d, -1e4)
            d = tl.maximum(d, -1e4, propagate_nan=tl.PropagateNan.ALL)
            exp = tl.exp2(d * LOG2_E)
            tl.store(partials, tl.sum(exp, 1), mask=mask_n)
            tl.store(partials + plane, tl.sum(exp * d, 1), mask=mask_n)
        else:
            d = tl.where(mask_v[None, :], acc * scale[:, None] - anchor[:, None], -1e4)
            d = tl.where(d < -1e4, -1e4, d)
            exp = tl.exp2(d * LOG2_E)
            if HAS_SOFTCAP:
                ratio = (d + anchor[:, None]) * (1.0 / (scale * softcap))[:, None]
                exp *= 1.0 - ratio * ratio
            alpha = scale * tl.load(alpha_ptr + first_n + row)
            beta = scale * tl.load(beta_ptr + first_n + row)
            exp *= beta[:, None] * d + alpha[:, None]
        outs = out_ptr + first_n * stride_on + first_v + (row[:, None] * stride_on + in_v[None, :])
        mask = mask_n[:, None] & (in_v < (stride_on - first_v).to(tl.int32))[None, :]
        tl.store(outs, exp.to(out_ptr.dtype.element_ty), mask=mask)


@per_row_kernel
def add_online_kernel(
    partial_ptr, out_ptr, N, n_tiles,
    ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Joins the tiles' (top, total, moment) of ONLINE sweeps into those of the row: out (3, N)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_n = offs_n < N
    plane = n_tiles.to(tl.int64) * N
    top = tl.full((BLOCK_N,), -3e38, dtype=tl.float32)
    for t in range(0, n_tiles, BLOCK_T):
        mask = (offs_t < n_tiles - t)[:, None] & mask_n[None, :]
        place = partial_ptr + (t + offs_t)[:, None] * N + offs_n[None, :]
        top = tl.maximum(top, tl.max(tl.load(place, mask=mask, other=-3e38), 0))
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(0, n_tiles, BLOCK_T):
        mask = (offs_t < n_tiles - t)[:, None] & mask_n[None, :]
        place = partial_ptr + (t + offs_t)[:, None] * N + offs_n[None, :]
        shift = tl.load(place, mask=mask, other=-3e38) - top[None, :]
        shift = tl.where(shift < -1e4, -1e4, shift)
        rescale = tl.exp(shift)
        part = tl.load(place + plane, mask=mask, other=0.0)
        total += tl.sum(rescale * part, 0)
        if ENTROPY:
            moment += tl.sum(rescale * (tl.load(place + 2 * plane, mask=mask, other=0.0) + shift * part), 0)
    tl.store(out_ptr + offs_n, top, mask=mask_n)
    tl.store(out_ptr + N + offs_n, total, mask=mask_n)
    tl.store(out_ptr + 2 * N + offs_n, moment, mask=mask_n)


@per_row_kernel
def target_logits_kernel(
    hidden_ptr, weight_ptr, bias_ptr, scale_ptr, targets_ptr, out_ptr,
    V, D, softcap, start, stride_hn, stride_hd, stride_wv, stride_wd,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[n] = scaled logit of row n's target``, zero if these rows of weight do not hold it."""
    n = tl.program_id(0).to(tl.int64)
    local = tl.load(targets_ptr + n) - start
    inside = (local >= 0) & (local < V)
    local = tl.where(inside, local, 0)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        mask = offs_d < D - d
        h = tl.load(hidden_ptr + n * stride_hn + (d + offs_d) * stride_hd, mask=mask, other=0.0)
        w = tl.load(weight_ptr + local * stride_wv + (d + offs_d) * stride_wd, mask=mask, other=0.0)
        acc += h.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(acc, 0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + local).to(tl.float32)
    if HAS_SOFTCAP:
        z = capped(z, softcap)
    tl.store(out_ptr + n, tl.where(inside, z * tl.load(scale_ptr + n), 0.0))


@per_row_kernel
def reweigh_kernel(
    out_ptr, anchor_ptr, alpha_ptr, beta_ptr, scale_ptr, V, softcap, stride_on,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``E <- E * (alpha + beta * log E) * slope of the softcap``, in place; one program per block of a row.

    As in ``sweep_kernel``, columns from V to the end of a row are overwritten.
    """
    pid = tl.program_id(0).to(tl.int64)
    blocks_v = tl.cdiv(V, BLOCK)
    n = pid // blocks_v
    offs_v = (pid - n * blocks_v) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_v < stride_on
    place = out_ptr + n * stride_on + offs_v
    e = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    d = tl.log(tl.where(e > 0, e, 1.0))
    factor = tl.load(alpha_ptr + n) + tl.load(beta_ptr + n) * d
    if HAS_SOFTCAP:
        ratio = (d + tl.load(anchor_ptr + n)) / (tl.load(scale_ptr + n) * softcap)
        ratio = tl.minimum(tl.maximum(ratio, -1.0), 1.0)
        factor *= 1.0 - ratio * ratio
    tl.store(place, (e * factor).to(out_ptr.dtype.element_ty), mask=mask)


@per_row_kernel
def move_rows_kernel(out_ptr, source_ptr, target_ptr, V, stride_on, BLOCK: tl.constexpr):
    """``out[target[i]] = out[source[i]]`` up to the ends of the rows; sources and targets are disjoint."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_v = tl.cdiv(V, BLOCK)
    i = pid // blocks_v
    offs_v = (pid - i * blocks_v) * BLOCK + tl.arange(0, BLOCK)
    mask = offs_v < stride_on
    value = tl.load(out_ptr + tl.load(source_ptr + i) * stride_on + offs_v, mask=mask)
    tl.store(out_ptr + tl.load(target_ptr + i) * stride_on + offs_v, value, mask=mask)


PARTIALS = (3, 2, 0)  # planes of partial sums that each mode writes
DOT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@per_row_kernel
def place_targets_kernel(out_ptr, targets_ptr, values_ptr, N, V, start, stride_on, BLOCK: tl.constexpr):
    """``out[n, target of n] = values[n]``, if the target is among the V columns."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(targets_ptr + n, mask=n < N, other=-1) - start
    value = tl.load(values_ptr + n, mask=n < N, other=0.0)
    inside = (n < N) & (local >= 0) & (local < V)
    tl.store(out_ptr + n * stride_on + local, value.to(out_ptr.dtype.element_ty), mask=inside)


@per_row_kernel
def finish_rows_kernel(
    part_ptr, factor_ptr, values_ptr, targets_ptr, index_ptr, weight_ptr, out_ptr,
    V, D, start, stride_wv, stride_wd, stride_on, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out[index[n]] = factor[n] * part[n] + values[n] * weight[target of n]``; one program per row."""
    n = tl.program_id(0).to(tl.int64)
    local = tl.load(targets_ptr + n) - start
    inside = (local >= 0) & (local < V)
    weight_row = weight_ptr + tl.where(inside, local, 0) * stride_wv
    value = tl.where(inside, tl.load(values_ptr + n), 0.0)
    factor = tl.load(factor_ptr + n)
    out_row = out_ptr + tl.load(index_ptr + n) * stride_on
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask = offs_d < D
        part = tl.load(part_ptr + n * D + offs_d, mask=mask, other=0.0)
        w = tl.load(weight_row + offs_d * stride_wd, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_row + offs_d, (factor * part + value * w).to(out_ptr.dtype.element_ty), mask=mask)


BLOCK_OF_ROW = 4096  # elements of a row that one program of the elementwise kernels handles


def target_logits(head: Head) -> Tensor:
    """See ``sweep_torch.target_logits``."""
    out = head.scale.new_empty(len(head.hidden))
    if len(out):
        target_logits_kernel[(len(out),)](
            *_inputs(head), head.targets, out, len(head.weight), *_sizes(head), *_strides(head),
            **_flags(head), BLOCK_D=min(1024, triton.next_power_of_2(head.hidden.shape[1])),
        )  # fmt: skip
    return out


def online_sums(head: Head, target_logits: Tensor, plan: SweepSize, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """See ``sweep_torch.online_sums``."""
    partials = _sweep(head, ONLINE, target_logits=target_logits, entropy=entropy)
    n_rows, n_tiles = len(head.hidden), partials.shape[1]
    out = head.scale.new_empty(3, n_rows)
    if n_rows:
        add_online_kernel[(triton.cdiv(n_rows, 16),)](
            partials, out, n_rows, n_tiles, ENTROPY=entropy, BLOCK_N=16, BLOCK_T=64
        )
    return out[0], out[1], out[2]


def exponentials(
    head: Head, target_logits: Tensor, anchor: Tensor, out: Tensor, plan: SweepSize
) -> tuple[Tensor, Tensor]:
    """See ``sweep_torch.exponentials``; the partial sums are (tiles, N) each."""
    total, moment = _sweep(head, EXPONENTIALS, target_logits=target_logits, anchor=anchor, out=out, entropy=True)
    place_targets(head, out, torch.zeros_like(anchor))
    return total, moment


def logit_gradients(
    head: Head, lse: Tensor, alpha: Tensor, beta: Tensor, at_target: Tensor, out: Tensor, plan: SweepSize
) -> None:
    """See ``sweep_torch.logit_gradients``."""
    _sweep(head, GRADIENTS, anchor=lse, alpha=alpha, beta=beta, out=out, entropy=True)
    place_targets(head, out, at_target)


def reweigh(head: Head, out: Tensor, anchor: Tensor, alpha: Tensor, beta: Tensor, plan: SweepSize) -> None:
    """See ``sweep_torch.reweigh``."""
    n_rows, vocab_size = out.shape
    reweigh_kernel[(n_rows * triton.cdiv(vocab_size, BLOCK_OF_ROW),)](
        out, anchor, alpha, beta, head.scale, vocab_size, head.softcap, out.stride(0),
        HAS_SOFTCAP=bool(head.softcap), BLOCK=BLOCK_OF_ROW,
    )  # fmt: skip


def place_targets(head: Head, out: Tensor, values: Tensor) -> None:
    """See ``sweep_torch.place_targets``."""
    n_rows, vocab_size = out.shape
    if n_rows:
        place_targets_kernel[(triton.cdiv(n_rows, 128),)](
            out, head.targets, values, n_rows, vocab_size, head.start, out.stride(0), BLOCK=128
        )


def finish_rows(head: Head, part: Tensor, factor: Tensor, at_target: Tensor, out: Tensor, index: Tensor) -> None:
    """See ``sweep_torch.finish_rows``."""
    n_rows, dim = part.shape
    if n_rows:
        finish_rows_kernel[(n_rows,)](
            part, factor, at_target, head.targets, index, head.weight, out,
            len(head.weight), dim, head.start, *head.weight.stride(), out.stride(0),
            BLOCK_D=min(1024, triton.next_power_of_2(dim)),
        )  # fmt: skip


def move_rows(out: Tensor, source: Tensor, target: Tensor) -> None:
    """See ``sweep_torch.move_rows``."""
    if len(source):
        move_rows_kernel[(len(source) * triton.cdiv(out.shape[1], BLOCK_OF_ROW),)](
            out, source, target, out.shape[1], out.stride(0), BLOCK=BLOCK_OF_ROW
        )


def workspace(rows: int, columns: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, columns) whose rows begin at multiples of 128 bytes."""
    return like.new_empty(rows, -(-columns // 64) * 64, dtype=dtype)[:, :columns]


def _sweep(
    head: Head, mode: tl.constexpr, *, target_logits=None, anchor=None, alpha=None, beta=None, out=None, entropy: bool
) -> Tensor:
    """Launches one program per tile; returns the partial sums (3 or 2, tiles, N)."""
    n_rows, vocab_size = len(head.hidden), len(head.weight)
    dtype = head.weight_dtype
    tile = tiles.triton_tile(_capability(head), dtype.itemsize)
    n_tiles = triton.cdiv(vocab_size, tile.block_v)
    partials = head.scale.new_empty(PARTIALS[mode.value], n_tiles, n_rows)
    if n_rows == 0:
        return partials
    unused = head.weight  # of known alignment, which is part of the compile key
    sweep_kernel[(triton.cdiv(n_rows, tile.block_n) * n_tiles,)](
        *_inputs(head),
        head.targets, *(unused if t is None else t for t in (target_logits, anchor, alpha, beta, out)), partials,
        n_rows, vocab_size, *_sizes(head), *_strides(head), 0 if out is None else out.stride(0),
        MODE=mode.value, ENTROPY=entropy, EVEN_D=head.hidden.shape[1] % tile.block_d == 0, **_flags(head),
        DOT_DTYPE=DOT_DTYPES[dtype], PRECISION="tf32x3" if dtype == torch.float32 else "ieee", GROUP=GROUP_ROWS,
        BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partials


def _capability(head: Head) -> tuple[int, int] | None:
    return None if INTERPRETED else torch.cuda.get_device_capability(head.hidden.device)


def _inputs(head: Head) -> tuple[Tensor, ...]:
    return head.hidden, head.weight, head.weight if head.bias is None else head.bias, head.scale


def _sizes(head: Head) -> tuple[int, float, int]:
    """D, softcap, start"""
    return head.hidden.shape[1], float(head.softcap), head.start


def _strides(head: Head) -> tuple[int, ...]:
    return *head.hidden.stride(), *head.weight.stride()


def _flags(head: Head) -> dict[str, bool]:
    return {"HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": bool(head.softcap)}
