"""Paged attention and the paged KV write as Triton kernels.

One program computes a tile of (query tokens x the query heads of one kv head) against one split of the keys they see.
If keys are split, or a shared prefix is computed separately, each part writes its normalized output and log-sum-exp in
fp32, and ``merge_kernel`` merges them in a fixed order (Flash-Decoding; for shared prefixes arXiv 2402.05099): no
atomics, so two runs give the same bits. The host reads no value from the device, so a call can be captured in a CUDA
graph and replayed with other lengths.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.ops.attention.paged_call import PagedCall
from toolx_kernels.ops.attention.paged_tiles import choose_tile, dot_precision, n_splits
from toolx_kernels.ops.triton_common import INTERPRETED, LOG2_E, capped

EMPTY = tl.constexpr(-1e30)  # the log-sum-exp of no keys: finite, so that the difference of two is not NaN
BLOCK_U = 512  # rows or groups searched at once; the same for every batch, else each would compile its own kernel


# Arguments that vary from call to call of one model and must not cause a recompilation.
COUNTS = ["n_units", "n_splits", "n_tokens", "n_rows", "n_partials", "n_slots", "window", "stride_br"]
VECTORS = ["block_table_ptr", "seq_lens_ptr", "cu_queries_ptr", "cu_groups_ptr", "prefix_lens_ptr", "lse_ptr"]


def _kernel(function):
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in COUNTS],
        do_not_specialize_on_alignment=[name for name in names if name in VECTORS],
    )


@triton.jit
def _first_query(unit, mask, cu_queries_ptr, cu_groups_ptr, PREFIX: tl.constexpr):
    """The first query of a unit: of a group of rows if PREFIX, else of a row."""
    row = unit
    if PREFIX:
        row = tl.load(cu_groups_ptr + unit, mask=mask, other=0)
    return tl.load(cu_queries_ptr + row, mask=mask, other=0).to(tl.int32)


@_kernel
def attention_kernel(
    query_ptr,  # (T, H, D)
    key_ptr, value_ptr,  # (pages, PAGE_SIZE, KV_HEADS, D), contiguous
    block_table_ptr, seq_lens_ptr, cu_queries_ptr,  # (R, ...), (R), (R + 1)
    cu_groups_ptr, prefix_lens_ptr,  # (G + 1), (R) if there are groups
    out_ptr,  # (T, H, D) if DIRECT, else (splits, T, H, D) fp32
    lse_ptr,  # (splits, T, H) unless DIRECT, base 2
    n_units, n_splits, n_tokens, scale, softcap, window,
    stride_qt, stride_qh, stride_qd, stride_br, stride_ot, stride_oh, stride_od,
    PREFIX: tl.constexpr,  # True: a unit is a group of rows over their shared prefix; False: a row over the rest
    GROUPED: tl.constexpr, DIRECT: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, SHARING: tl.constexpr,  # query heads of a kv head
    D: tl.constexpr, PAGE_SIZE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted values of one tile of queries over one split of their keys.

    The query tokens of each unit are cut into tiles of BLOCK_Q. The tiles of unit u begin at
    ``first_query(u) // BLOCK_Q + u``: that leaves room for all of its tiles and is known without a pass over the units
    before it, so a grid of ``T // BLOCK_Q + units`` fits any lengths.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // SHARING
    pid, split = tl.program_id(0), tl.program_id(1)
    kv_head = pid % KV_HEADS
    tile = pid // KV_HEADS
    unit = 0
    for start in range(1, n_units, BLOCK_U):
        candidate = start + tl.arange(0, BLOCK_U)
        exists = candidate < n_units
        at = _first_query(candidate, exists, cu_queries_ptr, cu_groups_ptr, PREFIX) // BLOCK_Q + candidate
        unit += tl.sum((exists & (at <= tile)).to(tl.int32), 0)
    first_query = _first_query(unit, True, cu_queries_ptr, cu_groups_ptr, PREFIX)
    end_query = _first_query(unit + 1, True, cu_queries_ptr, cu_groups_ptr, PREFIX)
    first_token = first_query + (tile - first_query // BLOCK_Q - unit) * BLOCK_Q
    if first_token >= end_query:
        return

    in_m, in_n, in_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    token = first_token + in_m // SHARING
    head = (kv_head * SHARING + in_m % SHARING).to(tl.int64)
    live = (in_m < BLOCK_Q * SHARING) & (token < end_query)
    position = tl.zeros((BLOCK_M,), dtype=tl.int32)
    first_key, oldest = 0, 0
    if PREFIX:
        row = tl.load(cu_groups_ptr + unit)
        end_row = tl.load(cu_groups_ptr + unit + 1)
        end_key = tl.load(prefix_lens_ptr + row).to(tl.int32)
        if HAS_WINDOW:
            for sibling in range(row, end_row):
                begin = tl.load(cu_queries_ptr + sibling).to(tl.int32)
                end = tl.load(cu_queries_ptr + sibling + 1).to(tl.int32)
                its = tl.load(seq_lens_ptr + sibling).to(tl.int32) - end + token
                position = tl.where((token >= begin) & (token < end), its, position)
            # not the minimum of position: values derived from a loop's result have no known alignment, and Triton does
            # not prefetch keys at addresses of unknown alignment
            siblings = row + tl.arange(0, BLOCK_U)
            theirs = siblings < end_row
            lengths = tl.load(seq_lens_ptr + siblings, mask=theirs, other=2147483647).to(tl.int32)
            begins = tl.load(cu_queries_ptr + siblings, mask=theirs, other=0).to(tl.int32)
            ends = tl.load(cu_queries_ptr + siblings + 1, mask=theirs, other=0).to(tl.int32)
            oldest = tl.where(end_row - row > BLOCK_U, 0, tl.min(lengths - (ends - begins), 0))
    else:
        row = unit
        seq_len = tl.load(seq_lens_ptr + row).to(tl.int32)
        position = seq_len - end_query + token
        oldest = seq_len - end_query + first_token
        end_key = tl.minimum(seq_len, oldest + BLOCK_Q)
        if GROUPED:
            first_key = tl.load(prefix_lens_ptr + row).to(tl.int32)
    if HAS_WINDOW:
        first_key = tl.maximum(first_key, oldest - window + 1)
    keys_per_split = (end_key - first_key + n_splits * BLOCK_N - 1) // (n_splits * BLOCK_N) * BLOCK_N
    begin_key = first_key + split * keys_per_split
    end_key = tl.minimum(end_key, begin_key + keys_per_split)

    token64 = token.to(tl.int64)
    mask_md = live[:, None] & (in_d < D)[None, :]
    queries = query_ptr + (token64 * stride_qt + head * stride_qh)[:, None] + in_d[None, :] * stride_qd
    q = tl.load(queries, mask=mask_md, other=0.0)
    table = block_table_ptr + row.to(tl.int64) * stride_br
    top = tl.full((BLOCK_M,), EMPTY, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(begin_key, end_key, BLOCK_N):
        j = start + in_n
        inside = j < end_key
        page = tl.load(table + j // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        slot = (page * PAGE_SIZE + j % PAGE_SIZE) * (KV_HEADS * D) + kv_head * D
        # unwritten keys and values are never read: 0 * NaN would be NaN
        if D == BLOCK_D:
            k = tl.load(key_ptr + slot[None, :] + in_d[:, None], mask=inside[None, :], other=0.0)
        else:
            k = tl.load(key_ptr + slot[None, :] + in_d[:, None], mask=inside[None, :] & (in_d < D)[:, None], other=0.0)
        z = tl.dot(q, k, input_precision=PRECISION) * scale
        if HAS_SOFTCAP:
            z = capped(z, softcap)
        visible = inside[None, :]
        if not PREFIX:
            visible = visible & (j[None, :] <= position[:, None])
        if HAS_WINDOW:
            visible = visible & (j[None, :] > position[:, None] - window)
        z = tl.where(visible, z * LOG2_E, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, 1))
        p = tl.exp2(z - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        if D == BLOCK_D:
            v = tl.load(value_ptr + slot[:, None] + in_d[None, :], mask=inside[:, None], other=0.0)
        else:
            v = tl.load(
                value_ptr + slot[:, None] + in_d[None, :], mask=inside[:, None] & (in_d < D)[None, :], other=0.0
            )
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        top = new_top

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total[:, None]
    if DIRECT:
        outs = out_ptr + (token64 * stride_ot + head * stride_oh)[:, None] + in_d[None, :] * stride_od
        tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask_md)
    else:
        place = (split.to(tl.int64) * n_tokens + token64) * (KV_HEADS * SHARING) + head
        tl.store(lse_ptr + place, tl.where(nothing, EMPTY, top + tl.log2(total)), mask=live)
        if begin_key < end_key:  # the merge reads no output of a split without keys
            tl.store(out_ptr + (place * D)[:, None] + in_d[None, :], acc, mask=mask_md)


@_kernel
def merge_kernel(
    partial_ptr,  # (partials, T, H, D) fp32
    lse_ptr,  # (partials, T, H), base 2
    out_ptr,  # (T, H, D)
    n_rows, n_partials, stride_ot, stride_oh, stride_od,
    H: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``out = sum(2^lse partial) / sum(2^lse)`` over the partials, zeros where none has keys; n_rows = T * H."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_d = tl.arange(0, BLOCK_D)
    exists = row < n_rows
    top = tl.full((BLOCK_R,), EMPTY, dtype=tl.float32)
    place = row
    for _ in range(n_partials):
        top = tl.maximum(top, tl.load(lse_ptr + place, mask=exists, other=EMPTY))
        place += n_rows
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), dtype=tl.float32)
    place = row
    for _ in range(n_partials):
        lse = tl.load(lse_ptr + place, mask=exists, other=EMPTY)
        weight = tl.exp2(lse - top)
        mask = (exists & (lse != EMPTY))[:, None] & (in_d < D)[None, :]
        part = tl.load(partial_ptr + (place * D)[:, None] + in_d[None, :], mask=mask, other=0.0)
        total += weight
        acc += weight[:, None] * part
        place += n_rows
    outs = out_ptr + (row // H * stride_ot + row % H * stride_oh)[:, None] + in_d[None, :] * stride_od
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(outs, out, mask=exists[:, None] & (in_d < D)[None, :])


@_kernel
def kv_write_kernel(
    key_ptr, value_ptr, key_cache_ptr, value_cache_ptr, slots_ptr, n_slots,
    stride_kt, stride_kh, stride_kd, stride_vt, stride_vh, stride_vd, stride_s,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per token; a slot outside the cache is skipped."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * stride_s)
    if (slot < 0) | (slot >= n_slots):
        return
    offs = tl.arange(0, BLOCK)
    mask = offs < KV_HEADS * D
    head, d = offs // D, offs % D
    to = slot * (KV_HEADS * D) + offs
    key = tl.load(key_ptr + token * stride_kt + head * stride_kh + d * stride_kd, mask=mask)
    value = tl.load(value_ptr + token * stride_vt + head * stride_vh + d * stride_vd, mask=mask)
    tl.store(key_cache_ptr + to, key, mask=mask)
    tl.store(value_cache_ptr + to, value, mask=mask)


def kv_write(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """See ``paged.kv_write``."""
    _check_contiguous(key_cache, value_cache)
    n_tokens, kv_heads, dim = key.shape
    if key.numel():
        with torch.cuda.device_of(key):
            kv_write_kernel[(n_tokens,)](
                key, value, key_cache, value_cache, slots, key_cache.shape[0] * key_cache.shape[1],
                *key.stride(), *value.stride(), slots.stride(0),
                KV_HEADS=kv_heads, D=dim, BLOCK=triton.next_power_of_2(kv_heads * dim),
            )  # fmt: skip


def paged_attention(call: PagedCall) -> Tensor:
    """See ``paged.paged_attention``; rows without keys get zeros."""
    query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, cu_groups, prefix_lens, *_ = call
    _check_contiguous(key_cache, value_cache)
    out = torch.empty_like(query)
    n_tokens, heads, dim = query.shape
    n_rows, kv_heads = len(seq_lens), key_cache.shape[2]
    if query.numel() == 0 or n_rows == 0:
        return out
    sharing, block_d = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    shared: tuple[Tensor, ...] = () if cu_groups is None or prefix_lens is None else (cu_groups, prefix_lens)
    grouped = len(shared) > 0
    vectors = [vector.contiguous() for vector in (seq_lens, cu_seqlens_q, *(shared or (seq_lens, seq_lens)))]
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    sizes = {
        "KV_HEADS": kv_heads, "SHARING": sharing, "D": dim, "BLOCK_D": block_d,
        "PAGE_SIZE": key_cache.shape[1], "HAS_WINDOW": call.window > 0, "HAS_SOFTCAP": call.softcap > 0,
        "GROUPED": grouped, "BLOCK_U": BLOCK_U,
    }  # fmt: skip

    # (units, an upper bound of the queries of one unit)
    levels = [(len(shared[0]) - 1, call.max_queries)] if grouped else []
    levels.append((n_rows, min(call.max_queries, triton.cdiv(n_tokens, n_rows)) if grouped else call.max_queries))
    with torch.cuda.device_of(query):
        launches = []
        for n_units, queries in levels:
            tile = choose_tile(_capability(query.device), query.element_size(), block_d, sharing, queries)
            block_q = tile.block_m // sharing
            busy = max(n_units, triton.cdiv(n_tokens, block_q)) * kv_heads
            launches.append((n_units, tile, block_q, n_splits(busy, _n_processors(query.device))))
        n_partials = sum(splits for *_, splits in launches)
        direct = n_partials == 1
        partials, lse = out, out
        if not direct:
            partials = query.new_empty(n_partials, n_tokens, heads, dim, dtype=torch.float32)
            lse = query.new_empty(n_partials, n_tokens, heads, dtype=torch.float32)
        at = 0
        for n_units, tile, block_q, splits in launches:
            attention_kernel[((n_tokens // block_q + n_units) * kv_heads, splits)](
                query, key_cache, value_cache, block_table, *vectors,
                partials if direct else partials[at:], lse if direct else lse[at:],
                n_units, splits, n_tokens, call.scale, call.softcap, call.window,
                *query.stride(), block_table.stride(0), *out.stride(),
                PREFIX=grouped and at == 0, DIRECT=direct, **sizes,
                PRECISION=dot_precision(query.element_size(), block_d, tile.block_m),
                BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            at += splits
        if not direct:
            block_r = max(1, 512 // block_d)
            merge_kernel[(triton.cdiv(n_tokens * heads, block_r),)](
                partials, lse, out, n_tokens * heads, n_partials, *out.stride(),
                H=heads, D=dim, BLOCK_R=block_r, BLOCK_D=block_d,
            )  # fmt: skip
    return out


@functools.cache
def _n_processors(device: torch.device) -> int:
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def _capability(device: torch.device) -> tuple[int, int] | None:
    return None if INTERPRETED else torch.cuda.get_device_capability(device)


def _check_contiguous(*caches: Tensor) -> None:
    for cache in caches:
        if not cache.is_contiguous():
            raise InputError(
                f"A KV cache of shape {tuple(cache.shape)} has strides {cache.stride()}: it must be contiguous, "
                "because it is addressed by page and slot."
            )
