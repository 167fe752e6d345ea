"""Paged attention in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from toolx_kernels.ops.attention.paged_call import PagedCall


def masked_attention(
    query: Tensor,  # (R, H, Q, Dh)
    key: Tensor,  # (R, Hkv, T, Dh)
    value: Tensor,  # (R, Hkv, T, Dh)
    visible: Tensor,  # (R, 1, Q, T) bool
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Dense attention under a boolean mask, (R, H, Q, Dh); differentiable."""
    group = query.shape[1] // key.shape[1]
    if group > 1:  # heads that share a key are treated as more queries of it, so that no key is copied
        query = query.unflatten(1, (-1, group)).flatten(2, 3)
        visible = visible.repeat(1, 1, group, 1)
    if softcap:
        scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * (scale / softcap))
        out = scores.masked_fill(~visible, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return out.unflatten(2, (group, -1)).flatten(1, 2) if group > 1 else out


def paged_attention(call: PagedCall) -> Tensor:
    """See ``paged.paged_attention``; shared prefixes are not used."""
    query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q, *_, scale, softcap, window = call
    query_lens = cu_seqlens_q.diff()
    seq_lens = torch.where(query_lens > 0, seq_lens, 0)  # nothing is read of rows without queries
    n_rows, longest = len(seq_lens), int(seq_lens.max()) if len(seq_lens) else 0
    widest = int(query_lens.max()) if n_rows else 0
    if widest == 0:
        return torch.empty_like(query)
    page_size = key_cache.shape[1]
    steps = torch.arange(longest, device=query.device)
    filled = steps < seq_lens[:, None]  # (R, T)
    pages = block_table[:, : -(-longest // page_size)].long().repeat_interleave(page_size, dim=1)[:, :longest]
    slots = pages * page_size + steps % page_size
    # Slots past a row's end repeat its first token, or any token if nothing is read of the row: the mask hides them,
    # and unlike unwritten memory they are never NaN.
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
    # Padding queries see everything. They could be NaN and be dropped, but on AMX a row of NaN spoils its neighbors in
    # oneDNN's bf16 products (github.com/uxlfoundation/oneDNN/issues/5717, fixed in August 2026).
    visible = (visible & filled[:, None, :]) | (position >= seq_lens[:, None])[..., None]
    out = masked_attention(padded, gather(key_cache), gather(value_cache), visible[:, None], scale, softcap)
    if one_each:
        return out[:, :, 0]
    used = offset < query_lens[:, None]
    return out.transpose(1, 2)[used]
