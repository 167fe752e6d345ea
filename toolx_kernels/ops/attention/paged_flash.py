"""Paged attention by flash-attn 2, if it is installed and supports the tensors.

``flash_attn_varlen_func`` with a block table covers decode, prefill and prefixes. ``flash_attn_with_kvcache`` cannot be
used: since 2.8.4 it reads the longest length back from the device, which no CUDA graph can capture.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from toolx_kernels.ops.attention.paged_call import PagedCall

DTYPES = (torch.float16, torch.bfloat16)
OLDEST_VERSION = (2, 6)  # the first with softcap and with the log-sum-exp of packed queries


@functools.cache
def installed() -> Any:
    """``flash_attn_varlen_func``, or None."""
    try:
        import flash_attn

        version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
        return flash_attn.flash_attn_varlen_func if version >= OLDEST_VERSION else None
    except (ImportError, AttributeError):  # AttributeError: only flash-attn 4 is installed, which has the same name
        return None


def applies(query: Tensor, key_cache: Tensor) -> bool:
    """Whether flash-attn 2 is installed and supports these tensors."""
    page_size, dim = key_cache.shape[1], query.shape[-1]
    return (
        page_size % 256 == 0
        and query.dtype in DTYPES
        and dim % 8 == 0
        and dim <= 256
        and installed() is not None
        and _capability(query.device) >= (8, 0)
    )


def paged_attention(call: PagedCall) -> Tensor:
    """See ``paged.paged_attention``; rows without keys get zeros."""
    seq_lens, prefix_lens, cu_groups, window = call.seq_lens, call.prefix_lens, call.cu_groups, call.window
    out = torch.empty_like(call.query)
    if call.query.numel() == 0 or len(seq_lens) == 0:
        return out
    attend = functools.partial(_attend, call)
    # a sliding window counts from the length of each sibling, so the group's queries as one sequence have no window
    if cu_groups is None or prefix_lens is None or window:
        return out.copy_(attend(call.block_table, seq_lens, call.cu_seqlens_q, window=window)[0])
    shared_out, shared_lse = attend(
        call.block_table[cu_groups[:-1].clamp(max=len(seq_lens) - 1).long()],
        _of_first_rows(prefix_lens, cu_groups),
        call.cu_seqlens_q[cu_groups.long()],
        causal=False,
    )
    own = torch.arange(call.block_table.shape[1], device=out.device) + (prefix_lens // call.key_cache.shape[1])[:, None]
    own_pages = call.block_table.gather(1, own.clamp(max=call.block_table.shape[1] - 1).long())
    own_out, own_lse = attend(own_pages, (seq_lens - prefix_lens).clamp(min=0), call.cu_seqlens_q)
    share = torch.sigmoid(own_lse - shared_lse).T[..., None]  # weight of a token's own keys among all of its keys
    return out.copy_(torch.lerp(shared_out.float(), own_out.float(), share))


def _of_first_rows(per_row: Tensor, cu_groups: Tensor) -> Tensor:
    """(G): the value of each group's first row, 0 for a group without rows."""
    first = cu_groups[:-1].clamp(max=len(per_row) - 1).long()
    return torch.where(cu_groups.diff() > 0, per_row[first], 0)


def _attend(
    call: PagedCall, block_table: Tensor, lengths: Tensor, cu_queries: Tensor, *, window: int = 0, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Output (T, H, Dh) and log-sum-exp (H, T) of rows with ``lengths`` keys each."""
    # from a bound of 1 flash-attn concludes that every row has one query
    max_queries = call.max_queries if len(call.query) == len(lengths) else max(2, call.max_queries)
    cu_keys = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    out, lse, _ = installed()(
        call.query,
        call.key_cache,
        call.value_cache,
        cu_queries.int(),
        cu_keys,
        max_queries,
        block_table.shape[1] * call.key_cache.shape[1],
        softmax_scale=call.scale,
        causal=causal,
        window_size=(window - 1, 0) if window else (-1, -1),
        softcap=call.softcap,
        return_attn_probs=True,
        block_table=block_table,
    )
    return out, lse.masked_fill(lse == torch.inf, -1e30)  # inf is flash-attn's value for a query without keys


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
