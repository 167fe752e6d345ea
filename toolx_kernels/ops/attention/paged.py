"""Paged KV cache: writing it and attending over it; compiled (``csrc/``) where built, else plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from toolx_kernels.ops import library


def kv_write(
    key: Tensor,  # (T, Hkv, Dh)
    value: Tensor,  # (T, Hkv, Dh)
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    slots: Tensor,  # (T) int64
) -> None:
    """Writes token t's key and value to slot ``slots[t] = page * page_size + offset``; -1 skips the token.

    Raises on a CPU, before anything is written, when a slot lies outside the cache; a CUDA kernel cannot raise and
    skips such a token. Of equal slots the last token wins on a CPU; on a GPU the order is unspecified.
    """
    torch.ops.toolx.kv_write(key, value, key_cache, value_cache, slots)


def paged_attention(
    query: Tensor,  # (T, H, Dh) packed: the newest tokens of each row
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh)
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh)
    block_table: Tensor,  # (R, pages per row) int32; entries past a row's length are ignored
    seq_lens: Tensor,  # (R) int32: tokens of each row in the cache, its queries included
    cu_seqlens_q: Tensor,  # (R + 1) int32: bounds of each row's queries
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    *,
    cu_groups: Tensor | None = None,  # (G + 1) int32: bounds of the rows that share a prefix; every row is in a group
    prefix_lens: Tensor | None = None,  # (R) int32: tokens that a row's group shares, equal within a group
    max_queries: int | None = None,
) -> Tensor:
    """Causal attention of each row's newest tokens over its pages, (T, H, Dh); serves prefill and decode.

    ``window`` > 0 limits a token to the last ``window`` tokens including itself; ``softcap`` > 0 squashes scores.

    ``cu_groups`` and ``prefix_lens`` change no result, only its cost: they say that rows cu_groups[g] to
    cu_groups[g + 1] - 1 have the same pages under their first ``prefix_lens`` tokens, a multiple of the page size and
    not beyond the first query of any of them. A kernel may then read these pages once for the whole group.
    ``max_queries`` bounds the queries that one group (one row, without groups) brings; left out, it is looked up, for
    which a GPU must wait.

    The compiled CPU kernel raises RuntimeError, before anything is read, when sizes, dtypes or devices do not fit
    together, or when a page that a query sees, a length or a bound is out of range. Its results depend neither on the
    number of threads nor on the rest of the batch. float64 is left to plain torch.

    No gradient. The definition is ``reference.paged_attention``.
    """
    if max_queries is None:
        bounds = cu_seqlens_q if cu_groups is None else cu_seqlens_q[cu_groups.long()]
        max_queries = int(bounds.diff().max()) if len(bounds) > 1 else 0
    # kernels accumulate in fp32
    function = _paged_attention if query.dtype == torch.float64 else torch.ops.toolx.paged_attention
    return function(
        query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, cu_groups, prefix_lens, max_queries,
        scale, softcap, window,
    )  # fmt: skip


def masked_attention(
    query: Tensor,  # (R, H, Q, Dh)
    key: Tensor,  # (R, Hkv, T, Dh)
    value: Tensor,  # (R, Hkv, T, Dh)
    visible: Tensor,  # (R, 1, Q, T) bool
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Dense attention under a boolean mask, differentiable, (R, H, Q, Dh)."""
    group = query.shape[1] // key.shape[1]
    if group > 1:  # the heads that share a key become more queries of it, so that no key is copied
        query = query.unflatten(1, (-1, group)).flatten(2, 3)
        visible = visible.repeat(1, 1, group, 1)
    if softcap:
        scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return out.unflatten(2, (group, -1)).flatten(1, 2) if group > 1 else out


def _paged_attention(
    query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, cu_groups, prefix_lens, max_queries,
    scale, softcap, window,
):  # fmt: skip
    """In plain torch, which makes no use of shared prefixes."""
    query_lens = cu_seqlens_q.diff()
    seq_lens = torch.where(query_lens > 0, seq_lens, 0)  # of rows without queries nothing is read
    n_rows, longest = len(seq_lens), int(seq_lens.max()) if len(seq_lens) else 0
    widest = int(query_lens.max()) if n_rows else 0
    if widest == 0:
        return torch.empty_like(query)
    page_size = key_cache.shape[1]
    steps = torch.arange(longest, device=query.device)
    filled = steps < seq_lens[:, None]  # (R, T)
    pages = block_table[:, : -(-longest // page_size)].long().repeat_interleave(page_size, dim=1)[:, :longest]
    slots = pages * page_size + steps % page_size
    # Past a row's end its first token stands in, and any token in a row of which nothing is read: hidden by the mask,
    # but never NaN as unwritten memory may be.
    stand_in = torch.where(filled[:, :1], slots[:, :1], slots[filled][0])
    slots = torch.where(filled, slots, stand_in).flatten()

    def gather(cache: Tensor) -> Tensor:  # (R, Hkv, T, Dh)
        return cache.flatten(0, 1).index_select(0, slots).unflatten(0, filled.shape).transpose(1, 2)

    one_each = len(query) == n_rows and widest == 1
    if one_each:
        padded = query[:, :, None]
    else:
        offset = torch.arange(widest, device=query.device)
        index = (cu_seqlens_q[:-1, None] + offset).clamp(max=len(query) - 1)
        padded = query[index.long()].transpose(1, 2)  # (R, H, Q, Dh)
    position = (seq_lens - query_lens)[:, None] + torch.arange(widest, device=query.device)  # (R, Q)
    visible = steps <= position[..., None]
    if window:
        visible &= steps > position[..., None] - window
    # Padding queries see everything. They could be dropped as NaN, but on AMX oneDNN's bf16 products let a row of NaN
    # spoil its neighbours (github.com/uxlfoundation/oneDNN/issues/5717, mended in August 2026).
    visible = (visible & filled[:, None, :]) | (position >= seq_lens[:, None])[..., None]
    out = masked_attention(padded, gather(key_cache), gather(value_cache), visible[:, None], scale, softcap)
    if one_each:
        return out[:, :, 0]
    used = offset < query_lens[:, None]
    return out.transpose(1, 2)[used]


def _on_cuda(query, key_cache, *others):
    """flash-attn where it applies, else Triton."""
    from toolx_kernels.ops.attention import paged_flash

    if paged_flash.applies(query, key_cache):
        from toolx_kernels.ops.attention.paged_flash import paged_attention as attend
    else:
        from toolx_kernels.ops.attention.paged_triton import paged_attention as attend
    return attend(query, key_cache, *others)


library.define(
    "paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    "Tensor cu_seqlens_q, Tensor? cu_groups, Tensor? prefix_lens, int max_queries, float scale, float softcap, "
    "int window) -> Tensor",
    default=_paged_attention,
    fake=lambda query, *_: query.new_empty(query.shape),
    triton=_on_cuda,
)
