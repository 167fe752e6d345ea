"""Paged attention against its definition, and its definition against dense attention."""

import pytest
import torch

from toolx_kernels import reference
from toolx_kernels.ops.attention import masked_attention, paged_attention


def make_case(seq_lens, query_lens, page_size, heads=4, kv_heads=2, dim=8, dtype=torch.float64, seed=0):
    """Rows on shuffled pages of a poisoned cache; also each row's dense keys and values."""
    g = torch.Generator().manual_seed(seed)
    widths = [-(-n // page_size) for n in seq_lens]
    pages = torch.randperm(sum(widths) + 3, generator=g).tolist()
    shape = (sum(widths) + 3, page_size, kv_heads, dim)
    caches = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
    table = torch.full((len(seq_lens), max(widths) + 1), pages[-1], dtype=torch.int32)  # padding names a NaN page
    dense = []
    for row, length in enumerate(seq_lens):
        own = [pages.pop(0) for _ in range(widths[row])]
        table[row, : len(own)] = torch.tensor(own)
        kv = torch.randn(2, length, kv_heads, dim, generator=g).to(dtype)
        dense.append(kv)
        for cache, values in zip(caches, kv, strict=True):
            for t in range(length):
                cache[own[t // page_size], t % page_size] = values[t]
    query = torch.randn(sum(query_lens), heads, dim, generator=g).to(dtype)
    cu = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    return (query, *caches, table, torch.tensor(seq_lens, dtype=torch.int32), cu), dense


CASES = {
    "decode": ([5, 16, 1, 33], [1, 1, 1, 1]),
    "prefill": ([5, 16, 1, 33], [5, 16, 1, 33]),
    "chunked": ([9, 20, 3], [4, 1, 3]),
    "one row": ([17], [1]),
    "one row prefill": ([17], [17]),
}


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (4, 0.0), (0, 2.0), (7, 2.0)])
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, page_size, window, softcap):
    arguments, _ = make_case(*CASES[name], page_size)
    expected = reference.paged_attention(*arguments, 0.3, softcap, window)
    assert expected.isfinite().all()
    torch.testing.assert_close(paged_attention(*arguments, 0.3, softcap, window), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_low_precision(dtype):
    arguments, _ = make_case(*CASES["chunked"], 7, dtype=dtype)
    double = [a.double() if a.is_floating_point() else a for a in arguments]
    truth = reference.paged_attention(*double, 0.3)
    mine, plain = paged_attention(*arguments, 0.3), reference.paged_attention(*arguments, 0.3)
    assert mine.dtype == dtype
    assert (mine - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2e-6


def test_the_definition_is_dense_attention():
    (query, *rest), dense = make_case([6, 11], [3, 11], 4)
    out = reference.paged_attention(query, *rest, 0.3)
    for row, (start, stop) in enumerate([(0, 3), (3, 14)]):
        k, v = (x.transpose(0, 1).repeat_interleave(2, 0) for x in dense[row])
        q = query[start:stop].transpose(0, 1)
        n, t = q.shape[1], k.shape[1]
        mask = torch.ones(n, t, dtype=torch.bool).tril(t - n)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(out[start:stop], expected.transpose(0, 1))


def test_no_queries():
    arguments, _ = make_case([5], [1], 4)
    query, keys, values, table, lens, _ = arguments
    out = paged_attention(query[:0], keys, values, table[:0], lens[:0], torch.zeros(1, dtype=torch.int32), 0.3)
    assert out.shape == (0, 4, 8)


def test_registered_properly():
    arguments, _ = make_case(*CASES["chunked"], 7, dtype=torch.float32)
    torch.library.opcheck(torch.ops.toolx.paged_attention.default, (*arguments, None, None, 20, 0.3, 2.0, 7))


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masked_attention_is_differentiable(softcap):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=g, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    visible = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    if softcap:  # softmax there is in fp32, too coarse for finite differences: compare with the same in fp64
        scores = softcap * torch.tanh(q @ k.repeat_interleave(2, 1).mT * (0.5 / softcap))
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(masked_attention(q, k, v, visible, 0.5, softcap), expected, rtol=1e-6, atol=1e-6)
        return
    assert torch.autograd.gradcheck(lambda *qkv: masked_attention(*qkv, visible, 0.5, softcap), (q, k, v))
