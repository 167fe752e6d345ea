"""Paged KV cache: the ops that write it and attend over it, compiled (``csrc/``) if built, else plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolx_kernels import reference
from toolx_kernels.ops import library
from toolx_kernels.ops.attention import paged_torch
from toolx_kernels.ops.attention.paged_call import PagedCall

LARGEST_HEAD = 256  # head dimension that attention on a GPU has kernels for


def kv_write(
    key: Tensor,  # (T, Hkv, Dh)
    value: Tensor,  # (T, Hkv, Dh)
    key_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    value_cache: Tensor,  # (pages, page_size, Hkv, Dh), written in place
    slots: Tensor,  # (T) int64
) -> None:
    """Writes token t's key and value to slot ``slots[t] = page * page_size + offset``; -1 skips the token.

    On a CPU a slot outside the cache raises before anything is written; a CUDA kernel cannot raise and skips such a
    token. If slots are equal, the last token wins on a CPU; on a GPU the order is unspecified.
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
    """Causal attention of each row's newest tokens over its pages, (T, H, Dh), for prefill and decode.

    ``window`` > 0 limits a token to the last ``window`` tokens including itself; ``softcap`` > 0 caps scores.

    ``cu_groups`` and ``prefix_lens`` change only the cost, not the result: rows cu_groups[g] to cu_groups[g + 1] - 1
    have the same pages for their first ``prefix_lens`` tokens, a multiple of the page size that does not reach beyond
    the first query of any of them. A kernel may then read these pages once for the whole group. ``max_queries`` is at
    least the number of queries of any group (of any row, without groups); by default it is read from the bounds, which
    waits for a GPU.

    The compiled CPU kernel raises RuntimeError, before anything is read, when sizes, dtypes or devices do not fit
    together, or when a page that a query sees, a length or a bound is out of range. Its results depend neither on the
    number of threads nor on the rest of the batch. float64 always runs in plain torch.

    No gradient. The definition is ``reference.paged_attention``.
    """
    if max_queries is None:
        bounds = cu_seqlens_q if cu_groups is None else cu_seqlens_q[cu_groups.long()]
        max_queries = int(bounds.diff().max()) if len(bounds) > 1 else 0
    rows = block_table, seq_lens, cu_seqlens_q, cu_groups, prefix_lens, max_queries
    arguments = query, key_cache, value_cache, *rows, scale, softcap, window
    if query.dtype == torch.float64:  # kernels accumulate in fp32
        return in_torch(*arguments)
    return torch.ops.toolx.paged_attention(*arguments)


def has_kernel(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a GPU has a kernel for such tensors; otherwise plain torch is used, which waits for the device."""
    return dtype != torch.float64 and head_dim <= LARGEST_HEAD


def in_torch(*arguments: Any) -> Tensor:
    return paged_torch.paged_attention(PagedCall(*arguments))


def on_cuda(*arguments: Any) -> Tensor:
    """Attention by flash-attn if it applies, else by Triton if that applies, else in plain torch."""
    from toolx_kernels.ops.attention import paged_flash

    call = PagedCall(*arguments)
    if paged_flash.applies(call.query, call.key_cache):
        return paged_flash.paged_attention(call)
    if has_kernel(call.query.dtype, call.query.shape[-1]):
        from toolx_kernels.ops.attention import paged_triton  # triton may be absent

        return paged_triton.paged_attention(call)
    return paged_torch.paged_attention(call)


def _kv_write_triton(*arguments: Tensor) -> None:
    from toolx_kernels.ops.attention import paged_triton

    paged_triton.kv_write(*arguments)


library.define(
    "kv_write(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots) -> ()",
    default=reference.kv_write,
    fake=lambda key, value, key_cache, value_cache, slots: None,
    triton=_kv_write_triton,
)
library.define(
    f"paged_attention({library.arguments(PagedCall)}) -> Tensor",
    default=in_torch,
    fake=lambda query, *_: query.new_empty(query.shape),
    triton=on_cuda,
)


@dataclass(slots=True)
class PagedContext:
    """Context of rollouts: writes the new tokens to their slots, then attends over each row's pages."""

    key_caches: list[Tensor]  # per layer (pages, page_size, Hkv, Dh)
    value_caches: list[Tensor]
    slots: Tensor  # (N) int64
    block_table: Tensor  # (R, pages per row) int32
    seq_lens: Tensor  # (R) int32, the new tokens included
    cu_seqlens_q: Tensor  # (R + 1) int32
    max_queries: int  # of one row, or of one group if there are groups
    cu_groups: Tensor | None = None  # (G + 1) int32: bounds of the rows that share a prefix
    prefix_lens: Tensor | None = None  # (R) int32

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int
    ) -> Tensor:
        caches = self.key_caches[layer], self.value_caches[layer]
        kv_write(key, value, *caches, self.slots)
        return paged_attention(
            query,
            *caches,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
            scale,
            softcap,
            window,
            cu_groups=self.cu_groups,
            prefix_lens=self.prefix_lens,
            max_queries=self.max_queries,
        )
