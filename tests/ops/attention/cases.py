"""Cases for tests of paged attention, and the assertion that a kernel errs no more than torch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from tests.ops.cases import DEVICE, assert_as_good
from toolx_kernels import paged_attention, reference
from toolx_kernels.ops.attention.paged_call import PagedCall
from toolx_kernels.ops.attention.paged_torch import paged_attention as plain_torch

SCALE = 0.3
# In 16 bits both results are rounded, possibly to different neighbors.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-4, torch.float16: 5e-5}


class Case(NamedTuple):
    tensors: tuple[Tensor, ...]  # query, key_cache, value_cache, block_table, seq_lens, cu_seqlens_q
    sharing: dict[str, Tensor]  # cu_groups and prefix_lens, or empty
    dense: list[Tensor]  # keys and values of each row, (2, T, Hkv, Dh)

    def double(self) -> Case:
        tensors = (t.double() if t.is_floating_point() else t for t in self.tensors)
        return Case(tuple(tensors), self.sharing, self.dense)


def make_case(
    seq_lens, query_lens, page_size, heads=4, kv_heads=2, dim=8, dtype=torch.float64, seed=0, groups=None, device=DEVICE
) -> Case:
    """Rows on shuffled pages of a cache filled with NaN. ``groups``: (number of rows, shared tokens) of each group."""
    g = torch.Generator().manual_seed(seed)
    widths = [-(-n // page_size) for n in seq_lens]
    shape = (sum(widths) + 3, page_size, kv_heads, dim)
    pages = torch.randperm(shape[0], generator=g).tolist()
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(seq_lens), max(widths, default=0) + 1), pages[-1], dtype=torch.int32)  # a page of NaN
    dense: list[Tensor] = []
    prefix_lens = [prefix for size, prefix in groups or [] for _ in range(size)]
    firsts = list(itertools.accumulate((size for size, _ in groups or []), initial=0))
    for row, length in enumerate(seq_lens):
        own = [pages.pop(0) for _ in range(widths[row])]
        kv = torch.randn(2, length, kv_heads, dim, generator=g).to(dtype)
        if groups and row not in firsts:
            shared = prefix_lens[row]
            own[: shared // page_size] = table[row - 1, : shared // page_size].tolist()
            kv[:, :shared] = dense[-1][:, :shared]
        table[row, : len(own)] = torch.tensor(own)
        dense.append(kv)
        place = torch.arange(length)
        for cache, values in zip(caches, kv, strict=True):
            cache[torch.tensor(own, dtype=torch.long)[place // page_size], place % page_size] = values
    query = torch.randn(sum(query_lens), heads, dim, generator=g).to(dtype)

    def int32(values) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=device)

    tensors = (t.to(device) for t in (query, *caches, table))
    sharing = {"cu_groups": int32(firsts), "prefix_lens": int32(prefix_lens)} if groups else {}
    return Case((*tensors, int32(seq_lens), int32(itertools.accumulate(query_lens, initial=0))), sharing, dense)


def make_grouped(groups, page_size, **options) -> Case:
    """``groups``: (shared pages, [(own tokens, how many of them are queries) of each row]) of each group."""
    rows = [(pages * page_size + own, queries) for pages, members in groups for own, queries in members]
    seq_lens, query_lens = zip(*rows, strict=True)
    shared = [(len(members), pages * page_size) for pages, members in groups]
    return make_case(seq_lens, query_lens, page_size, groups=shared, **options)


def assert_as_good_as_torch(case: Case, softcap=0.0, window=0) -> Tensor:
    """Compares with float64 and with plain torch in the case's dtype; returns the kernel's result."""
    dtype = case.tensors[0].dtype
    mine = paged_attention(*case.tensors, SCALE, softcap, window, **case.sharing)
    truth = reference.paged_attention(*case.double().tensors, SCALE, softcap, window)
    theirs = plain_torch(PagedCall(*case.tensors, None, None, len(truth), SCALE, softcap, window))
    assert truth.isfinite().all() and mine.dtype == dtype and mine.shape == truth.shape
    assert_as_good({"out": mine}, {"out": theirs}, {"out": truth}, TOLERANCE[dtype])
    # a norm could hide a single wrong query
    worst = (theirs.double() - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
    assert (mine.double() - truth).abs().max() <= worst
    return mine
