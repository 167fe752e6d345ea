"""Benchmark of one layer of paged attention at SmolLM2-135M's shape: the dispatcher's kernel and plain torch."""

import pytest
import torch

from toolx_kernels import paged_attention
from toolx_kernels.ops.attention.paged_call import PagedCall
from toolx_kernels.ops.attention.paged_torch import paged_attention as in_torch

HEADS, KV_HEADS, DIM, PAGE = 9, 3, 64, 16
PREFIX = 496
GROUPS = [(PREFIX, [20 + 10 * sibling for sibling in range(10)])] * 4  # shared tokens, own tokens of each sibling


def batch(groups, queries_of, shared):
    """Rows of ``groups`` on pages that siblings share; ``queries_of(length)`` newest tokens of each row attend."""
    fresh = iter(range(10**6))
    tables, lengths = [], []
    for prefix, own in groups:
        common = [next(fresh) for _ in range(prefix // PAGE)]
        for tokens in own:
            tables.append(common + [next(fresh) for _ in range(-(-tokens // PAGE))])
            lengths.append(prefix + tokens)
    table = torch.zeros(len(tables), max(map(len, tables)), dtype=torch.int32)
    for row, pages in enumerate(tables):
        table[row, : len(pages)] = torch.tensor(pages)
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + queries_of(length))
    g = torch.Generator().manual_seed(0)
    caches = torch.randn(2, next(fresh), PAGE, KV_HEADS, DIM, generator=g).bfloat16()
    query = torch.randn(HEADS, bounds[-1], DIM, generator=g).bfloat16().transpose(0, 1)  # as transformers passes it
    siblings = [0, *torch.tensor([len(own) for _, own in groups]).cumsum(0).tolist()]
    prefixes = [prefix for prefix, own in groups for _ in own]
    options = {"cu_groups": siblings, "prefix_lens": prefixes} if shared else {}
    named = {name: torch.tensor(value, dtype=torch.int32) for name, value in options.items()}
    ints = (torch.tensor(value, dtype=torch.int32) for value in (lengths, bounds))
    return (query, *caches, table, *ints, DIM**-0.5), named | {"max_queries": bounds[-1]}


CASES = {
    "decode 40 rows, 4 prefixes": (GROUPS, lambda length: 1, True),
    "decode 40 rows": (GROUPS, lambda length: 1, False),
    "prefill 4 x 500": ([(0, [500])] * 4, lambda length: length, False),
    "decode 1 row": ([(0, [500])], lambda length: 1, False),
}


def plain_torch(*tensors_and_scale, max_queries, cu_groups=None, prefix_lens=None):
    *tensors, scale = tensors_and_scale
    return in_torch(PagedCall(*tensors, cu_groups, prefix_lens, max_queries, scale, 0.0, 0))


@pytest.mark.parametrize("provider", [paged_attention, plain_torch], ids=["toolx", "plain torch"])
@pytest.mark.parametrize("case", CASES)
def test_paged_attention(benchmark, provider, case):
    arguments, options = batch(*CASES[case])
    benchmark(provider, *arguments, **options)
