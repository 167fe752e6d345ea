"""Paged attention by flash-attn 2, where it is installed and takes the tensors.

``flash_attn_varlen_func`` with a block table serves decode, prefill and prefixes alike. ``flash_attn_with_kvcache``
would not do: since 2.8.4 it reads the longest length back from the device, which no CUDA graph can capture.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from toolx_kernels.ops.attention.paged_call import PagedCall

DTYPES = (torch.float16, torch.bfloat16)
OLDEST_VERSION = (2, 6)  # the first with softcap, and with a log-sum-exp of packed queries


@functools.cache
def installed() -> Any:
    """``flash_attn_varlen_func``, or None."""
    try:
        import flash_attn

        version = tuple(int(part) for part in flash_attn.__version__.split(".")[:2])
        return flash_attn.flash_attn_varlen_func if version >= OLDEST_VERSION else None
    except (ImportError, AttributeError):  # AttributeError: flash-attn 4 alone, which has the same name
        return None


def applies(query: Tensor, key_cache: Tensor) -> bool:
    """Whether flash-attn 2 is installed and takes these tensors."""
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
    # a sliding window counts from each sibling's own length: for the group's queries as one sequence there is none
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
    share = torch.sigmoid(own_lse - shared_lse).T[..., None]  # of a token's weights, that of its own keys
    return out.copy_(torch.lerp(shared_out.float(), own_out.float(), share))


def _of_first_rows(per_row: Tensor, cu_groups: Tensor) -> Tensor:
    """(G) what each group's first row has, 0 for a group without rows."""
    first = cu_groups[:-1].clamp(max=len(per_row) - 1).long()
    return torch.where(cu_groups.diff() > 0, per_row[first], 0)


def _attend(
    call: PagedCall, block_table: Tensor, lengths: Tensor, cu_queries: Tensor, *, window: int = 0, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Output (T, H, Dh) and log-sum-exp (H, T) of rows with ``lengths`` keys each."""
    # of a bound of 1 flash-attn concludes that every row has one query
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
    return out, lse.masked_fill(lse == torch.inf, -1e30)  # flash-attn's word for a query without keys


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
