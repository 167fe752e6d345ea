"""PagedCall: the arguments of the op ``paged_attention``."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PagedCall(NamedTuple):
    """In the order of the op's schema; ``paged.paged_attention`` describes them."""

    query: Tensor  # (T, H, Dh)
    key_cache: Tensor  # (pages, page_size, Hkv, Dh)
    value_cache: Tensor
    block_table: Tensor  # (R, pages per row) int32
    seq_lens: Tensor  # (R) int32
    cu_seqlens_q: Tensor  # (R + 1) int32
    cu_groups: Tensor | None  # (G + 1) int32
    prefix_lens: Tensor | None  # (R) int32, if there are groups
    max_queries: int
    scale: float
    softcap: float
    window: int
