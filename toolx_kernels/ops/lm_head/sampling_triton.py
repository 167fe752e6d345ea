"""Sampling fused with the LM head as Triton kernels: the same functions as in ``sampling_torch``.

A decoding step has few rows and is bound by reading the weight, of which each program reads its own vocabulary tile. A
tile leaves a few numbers per row; a second kernel joins them in order. Nothing waits for the GPU, so all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolx_kernels.ops.lm_head import tiles
from toolx_kernels.ops.lm_head.sweep_triton import DOT_DTYPES
from toolx_kernels.ops.triton_common import INTERPRETED, LOG2_E, capped, per_row_kernel, product_tile


@triton.jit
def gumbel_tile(streams_ptr, rows, first_v, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """``reference.gumbel_noise`` of ``rows (BLOCK_N)`` and BLOCK_V tokens from first_v on, both multiples of 4."""
    seed = (tl.load(streams_ptr + rows * 5) & 0xFFFFFFFF) | (tl.load(streams_ptr + rows * 5 + 1) << 32)
    counters = first_v // 4 + tl.arange(0, BLOCK_V // 4)
    zeros = tl.zeros((BLOCK_N, BLOCK_V // 4), dtype=tl.int64)
    block = (zeros + counters[None, :]).to(tl.uint32)
    position = (zeros + tl.load(streams_ptr + rows * 5 + 4)[:, None]).to(tl.uint32)
    row = (zeros + tl.load(streams_ptr + rows * 5 + 2)[:, None]).to(tl.uint32)
    rollout = (zeros + tl.load(streams_ptr + rows * 5 + 3)[:, None]).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(zeros + seed[:, None], block, position, row, rollout)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.uint32, bitcast=True)
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = tl.minimum(u, 1.0 - 2.0**-24)
    # A GPU's log is off by 2^-22 near 1, where the largest noise comes from: there, use the series of -log(1 - u).
    series = u * (1.0 + u * (1.0 / 2 + u * (1.0 / 3 + u * (1.0 / 4 + u * (1.0 / 5 + u * (1.0 / 6))))))
    return -tl.log(tl.where(u < 0.0625, series, -tl.log(1.0 - u)))


@per_row_kernel
def sample_kernel(
    hidden_ptr, weight_ptr, bias_ptr, streams_ptr,  # (N, 5)
    logits_ptr,  # (N, V)
    partial_ptr,  # (5, tiles of V, N): top, total, moment, and score and logit of the tile's token
    token_ptr,  # (tiles of V, N) int32
    N, V, D, scale, softcap, stride_hn, stride_hd, stride_wv, stride_wd,
    NOISY: tl.constexpr, HAS_LOGITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of logits ``z (BLOCK_N, BLOCK_V)``: its sums, and the token with the largest z + noise."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    block_v = (pid // blocks_n).to(tl.int64)  # neighboring programs read the same slice of the weight
    first_n, first_v = (pid % blocks_n).to(tl.int64) * BLOCK_N, block_v * BLOCK_V
    in_n, in_v = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_V)
    mask_n = in_n < (N - first_n).to(tl.int32)
    mask_v = in_v < (V - first_v).to(tl.int32)
    row = tl.where(mask_n, in_n, 0)  # rows and tokens past the end read the first one: no mask in the loop
    token = tl.where(mask_v, in_v, 0)

    acc = product_tile(
        hidden_ptr + first_n * stride_hn, weight_ptr + first_v * stride_wv, row, token, D,
        stride_hn, stride_hd, stride_wv, stride_wd, EVEN_D, PRECISION, DOT_DTYPE, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_v + token).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        acc = capped(acc, softcap)
    z = acc * scale

    if HAS_LOGITS:
        outs = logits_ptr + first_n * V + first_v + (row.to(tl.int64)[:, None] * V + in_v[None, :])
        tl.store(outs, z, mask=mask_n[:, None] & mask_v[None, :])
    score = z
    if NOISY:
        score += gumbel_tile(streams_ptr, first_n + row, first_v, BLOCK_N, BLOCK_V)
    score = tl.where(mask_v[None, :] & (score == score), score, float("-inf"))
    best, at = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
    logit = tl.sum(tl.where(in_v[None, :] == at[:, None], z, 0.0), 1)
    z = tl.where(mask_v[None, :], z, -3e38)
    z = tl.where(z < -3e38, -3e38, z)  # not tl.maximum, which would drop a NaN
    top = tl.max(z, 1)
    d = z - top[:, None]
    exp = tl.where(mask_v[None, :], tl.exp2(d * LOG2_E), 0.0)
    d = tl.where(d < -1e4, -1e4, d)  # exp() of anything less is zero, and zero times -inf would be NaN

    plane = tl.cdiv(V, BLOCK_V).to(tl.int64) * N
    place = block_v * N + first_n + in_n
    tl.store(partial_ptr + place, top, mask=mask_n)
    tl.store(partial_ptr + place + plane, tl.sum(exp, 1), mask=mask_n)
    tl.store(partial_ptr + place + 2 * plane, tl.sum(exp * d, 1), mask=mask_n)
    tl.store(partial_ptr + place + 3 * plane, best, mask=mask_n)
    tl.store(partial_ptr + place + 4 * plane, logit, mask=mask_n)
    tl.store(token_ptr + place, (first_v + at).to(tl.int32), mask=mask_n)


@per_row_kernel
def join_samples_kernel(
    partial_ptr, token_ptr, tokens_ptr, stats_ptr, N, n_tiles, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Joins the partials of ``sample_kernel``'s tiles into tokens (N) and stats (3, N)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)
    mask_n = offs_n < N
    plane = n_tiles.to(tl.int64) * N
    top = tl.full((BLOCK_N,), -3e38, dtype=tl.float32)
    best = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    logit = tl.load(partial_ptr + 4 * plane + offs_n, mask=mask_n, other=0.0)
    token = tl.load(token_ptr + offs_n, mask=mask_n, other=0)
    for t in range(0, n_tiles, BLOCK_T):
        mask = (offs_t < n_tiles - t)[:, None] & mask_n[None, :]
        place = (t + offs_t)[:, None] * N + offs_n[None, :]
        top = tl.maximum(top, tl.max(tl.load(partial_ptr + place, mask=mask, other=-3e38), 0))
        score = tl.load(partial_ptr + place + 3 * plane, mask=mask, other=float("-inf"))
        value, at = tl.max(score, 0, return_indices=True, return_indices_tie_break_left=True)
        winner = offs_t[:, None] == at[None, :]
        logits = tl.load(partial_ptr + place + 4 * plane, mask=mask, other=0.0)
        its_logit = tl.sum(tl.where(winner, logits, 0.0), 0)
        its_token = tl.sum(tl.where(winner, tl.load(token_ptr + place, mask=mask, other=0), 0), 0)
        better = value > best
        best = tl.where(better, value, best)
        logit = tl.where(better, its_logit, logit)
        token = tl.where(better, its_token, token)
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
        moment += tl.sum(rescale * (tl.load(place + 2 * plane, mask=mask, other=0.0) + shift * part), 0)
    log_total = tl.log(total)
    tl.store(tokens_ptr + offs_n, token.to(tl.int64), mask=mask_n)
    tl.store(stats_ptr + offs_n, logit - top - log_total, mask=mask_n)
    tl.store(stats_ptr + N + offs_n, top + log_total, mask=mask_n)
    tl.store(stats_ptr + 2 * N + offs_n, log_total - moment / total, mask=mask_n)


@per_row_kernel
def add_gumbel_kernel(logits_ptr, streams_ptr, V, BLOCK: tl.constexpr):
    """``logits[n] += noise of row n``; one program per block of a row."""
    pid = tl.program_id(0).to(tl.int64)
    blocks_v = tl.cdiv(V, BLOCK)
    n = pid // blocks_v
    first = (pid - n * blocks_v) * BLOCK
    noise = gumbel_tile(streams_ptr, n + tl.zeros((1,), dtype=tl.int64), first, 1, BLOCK)
    offs = first + tl.arange(0, BLOCK)[None, :]
    place = logits_ptr + n * V + offs
    tl.store(place, tl.load(place, mask=offs < V) + noise, mask=offs < V)


BLOCK_OF_ROW = 1024  # elements of a row that one program of add_gumbel_kernel handles


def sample_sweep(
    hidden: Tensor, weight: Tensor, streams: Tensor | None, temperature: float, bias: Tensor | None, softcap: float,
    tokens: Tensor, stats: Tensor, logits: Tensor | None,
) -> None:  # fmt: skip
    """See ``sampling_torch.sample_sweep``."""
    (n_rows, dim), vocab_size = hidden.shape, len(weight)
    if n_rows == 0:
        return
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    capability = None if INTERPRETED else torch.cuda.get_device_capability(hidden.device)
    tile = tiles.sampling_tile(capability, dtype.itemsize, n_rows)  # one of three, which limits compilations
    n_tiles = triton.cdiv(vocab_size, tile.block_v)
    partials = stats.new_empty(5, n_tiles, n_rows)
    chosen = tokens.new_empty(n_tiles, n_rows, dtype=torch.int32)
    sample_kernel[(triton.cdiv(n_rows, tile.block_n) * n_tiles,)](
        hidden, weight, weight if bias is None else bias, tokens if streams is None else streams,
        stats if logits is None else logits, partials, chosen,
        n_rows, vocab_size, dim, 1.0 / temperature, float(softcap), *hidden.stride(), *weight.stride(),
        NOISY=streams is not None, HAS_LOGITS=logits is not None, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap > 0,
        EVEN_D=dim % tile.block_d == 0, PRECISION="tf32x3" if dtype == torch.float32 else "ieee",
        DOT_DTYPE=DOT_DTYPES[dtype], BLOCK_N=tile.block_n, BLOCK_V=tile.block_v, BLOCK_D=tile.block_d,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    join_samples_kernel[(triton.cdiv(n_rows, 4),)](
        partials, chosen, tokens, stats, n_rows, n_tiles, BLOCK_N=4, BLOCK_T=256
    )


def add_gumbel(logits: Tensor, streams: Tensor) -> None:
    """See ``sampling_torch.add_gumbel``."""
    n_rows, vocab_size = logits.shape
    if n_rows:
        add_gumbel_kernel[(n_rows * triton.cdiv(vocab_size, BLOCK_OF_ROW),)](
            logits, streams, vocab_size, BLOCK=BLOCK_OF_ROW
        )
