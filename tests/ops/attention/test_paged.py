"""Paged attention against its definition, and the definition against dense attention."""

import pytest
import torch

from tests.ops.attention.cases import SCALE, assert_as_good_as_torch, make_case, make_grouped
from tests.ops.cases import DEVICE
from toolx_kernels import paged_attention, reference
from toolx_kernels.ops import library
from toolx_kernels.ops.attention import paged_torch
from toolx_kernels.ops.attention.paged_call import PagedCall
from toolx_kernels.ops.attention.paged_torch import masked_attention

CASES = {
    "decode": ([5, 16, 1, 33], [1, 1, 1, 1]),
    "prefill": ([5, 16, 1, 33], [5, 16, 1, 33]),
    "chunked": ([9, 20, 3], [4, 1, 3]),
    "one row": ([17], [1]),
    "one row prefill": ([17], [17]),
    "several tiles": ([70, 129, 200], [1, 129, 66]),
}
# (shared pages, [(own tokens, how many of them are queries) of each sibling]) of each group
GROUPS = {
    "ragged": [(3, [(1, 1), (9, 1), (4, 1), (40, 1)]), (1, [(3, 1), (7, 1)])],
    "groups of one": [(2, [(5, 1)]), (1, [(1, 1)]), (0, [(8, 1)])],
    "nothing shared": [(0, [(5, 1), (2, 1), (20, 1)])],
    "all but the newest token": [(2, [(1, 1)] * 5), (5, [(1, 1)])],
    "mixed": [(4, [(9, 1), (6, 6), (3, 2)]), (0, [(30, 30)]), (6, [(1, 1), (90, 40)])],
    "many siblings": [(5, [(1 + i, 1) for i in range(30)])],
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = [(0, 0.0), (4, 0.0), (0, 2.0), (7, 2.0)]  # window, softcap
needs_compiled = pytest.mark.skipif(
    library.compiled_error is not None, reason="promised by the compiled CPU kernel alone, which is absent"
)


@pytest.mark.parametrize("window, softcap", MASKS)
@pytest.mark.parametrize("page_size", [1, 7, 16])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, page_size, window, softcap):
    case = make_case(*CASES[name], page_size)
    expected = reference.paged_attention(*case.tensors, SCALE, softcap, window)
    assert expected.isfinite().all()
    near = {"rtol": 1e-6, "atol": 1e-6} if softcap else {}  # with a softcap, plain torch computes softmax in fp32
    torch.testing.assert_close(paged_attention(*case.tensors, SCALE, softcap, window), expected, **near)


@pytest.mark.parametrize(
    "page_size, window, softcap",
    [(1, 7, 2.0), (7, 4, 0.0), (8, 0, 2.0), (16, 0, 0.0), (16, 100, 0.0), (32, 1, 0.0)],
)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_low_precision(dtype, name, page_size, window, softcap, poisoned):
    assert_as_good_as_torch(make_case(*CASES[name], page_size, dtype=dtype), softcap, window)


@pytest.mark.parametrize(
    "heads, kv_heads, dim",
    [(4, 2, 1), (4, 4, 8), (4, 1, 20), (6, 2, 33), (9, 3, 64), (14, 2, 64), (50, 1, 80), (4, 4, 128), (4, 1, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_and_head_dims(dtype, heads, kv_heads, dim, poisoned):
    sizes = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "dtype": dtype}
    assert_as_good_as_torch(make_case([70, 3, 40], [1, 3, 17], 16, **sizes))


@pytest.mark.parametrize("page_size, window", [(1, 0), (1, 1), (7, 5), (16, 0), (16, 30)])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_prefixes(dtype, name, page_size, window, poisoned):
    case = make_grouped(GROUPS[name], page_size, heads=6, dim=20, dtype=dtype)
    shared = assert_as_good_as_torch(case, window=window)
    alone = paged_attention(*case.tensors, SCALE, 0.0, window)
    torch.testing.assert_close(shared, alone, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("window", [0, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_contexts(dtype, window):
    groups = [(80, [(1, 1), (1000, 1), (64, 2)]), (0, [(2100, 1)]), (3, [(40, 20)])]
    assert_as_good_as_torch(make_grouped(groups, 16, dtype=dtype, dim=32), window=window)


def test_large_scores():
    case = make_case(*CASES["several tiles"], 16, dtype=torch.float32)
    query, *rest = case.tensors
    mine, truth = (f(query * 300, *rest, SCALE) for f in (paged_attention, reference.paged_attention))
    torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_queries(dtype):
    case = make_case(*CASES["several tiles"], 16, dtype=dtype)
    query, *rest = case.tensors
    expected = paged_attention(*case.tensors, SCALE)
    by_heads = query.transpose(0, 1).contiguous().transpose(0, 1)  # the layout of transformers
    fused = torch.full((len(query), 7, 8), torch.nan, dtype=dtype, device=DEVICE)
    fused[:, 2:6] = query
    for strided in (by_heads, fused[:, 2:6], query.mT.contiguous().mT):
        assert not strided.is_contiguous()
        torch.testing.assert_close(paged_attention(strided, *rest, SCALE), expected, rtol=0, atol=0)


def test_what_is_not_used_is_not_read():
    case = make_grouped([(2, [(5, 1), (9, 3)]), (1, [(1, 1), (2, 1), (1, 1)])], 4, dtype=torch.float32)
    query, keys, values, table, lens, bounds = case.tensors
    expected = paged_attention(*case.tensors, SCALE, **case.sharing)
    table = torch.cat([table, table[-1:]])
    for row, length in enumerate(lens.tolist()):
        table[row, -(-length // 4) :] = -(2**31) if row % 2 else 2**31 - 1
    table[-1] = 2**31 - 1  # a row without queries
    lens, bounds = torch.cat([lens, lens[-1:]]), torch.cat([bounds, bounds[-1:]])
    cu_groups, prefix_lens = case.sharing.values()
    sharing = {"cu_groups": torch.cat([cu_groups[:-1], cu_groups[-1:] + 1]), "prefix_lens": prefix_lens[[*range(5), 4]]}
    for options in ({}, sharing):
        out = paged_attention(query, keys, values, table, lens, bounds, SCALE, **options)
        torch.testing.assert_close(out, expected)


def test_a_query_that_is_not_a_number_spoils_its_own_result_alone():
    case = make_grouped(GROUPS["ragged"], 16, dtype=torch.float32)
    expected = paged_attention(*case.tensors, SCALE, **case.sharing)
    query = case.tensors[0]
    query[2, 1] = torch.nan
    out = paged_attention(*case.tensors, SCALE, **case.sharing)
    assert out[2, 1].isnan().all()
    out[2, 1] = expected[2, 1]
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype, window):
    sizes = {"heads": 6, "dim": 64, "dtype": dtype, "device": "cpu"}
    cases = [
        make_case([300, 280], [300, 280], 16, **sizes),
        make_case([2500], [1], 16, **sizes),
        make_grouped([(70, [(i, 1) for i in range(1, 40, 3)])] * 2, 16, **sizes),
    ]
    before = torch.get_num_threads()
    try:
        for case in cases:
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(paged_attention(*case.tensors, SCALE, 0.0, window, **case.sharing))
            if library.compiled_error is None:
                assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
            else:  # plain torch's products do not guarantee it
                torch.testing.assert_close(results[0], results[1])
    finally:
        torch.set_num_threads(before)


@needs_compiled
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(dtype):
    lengths = [2100, 90, 500, 17]
    case = make_case(lengths, [1, 1, 1, 9], 16, heads=6, dim=64, dtype=dtype, device="cpu")
    query, keys, values, table, lens, bounds = case.tensors
    together = paged_attention(*case.tensors, SCALE)
    for row in range(4):
        first, last = bounds[row], bounds[row + 1]
        one = (table[row : row + 1], lens[row : row + 1], torch.tensor([0, last - first], dtype=torch.int32))
        alone = paged_attention(query[first:last], keys, values, *one, SCALE)
        assert torch.equal(alone, together[first:last]), row


@needs_compiled
def test_pages_that_the_window_left_behind_are_not_read():
    case = make_grouped([(3, [(40, 1), (2, 1)]), (0, [(30, 5)])], 4, dtype=torch.float32, device="cpu")
    query, keys, values, table, lens, bounds = case.tensors
    expected = paged_attention(*case.tensors, SCALE, 0.0, 10, **case.sharing)
    table[0, : (52 - 10) // 4] = 2**31 - 1
    table[1, : (14 - 10) // 4] = -5
    table[2, : (26 - 10) // 4] = -1
    out = paged_attention(query, keys, values, table, lens, bounds, SCALE, 0.0, 10, **case.sharing)
    assert torch.equal(out, expected)


def bad(**changed):
    """A valid batch of two groups with some arguments replaced: by a value, or by a function of the old value."""
    case = make_grouped([(2, [(5, 1), (9, 3)]), (1, [(1, 1)])], 4, dtype=torch.float32, device="cpu")
    names = ("query", "key_cache", "value_cache", "block_table", "seq_lens", "cu_seqlens_q")
    arguments = dict(zip(names, case.tensors, strict=True)) | case.sharing | {"scale": SCALE}
    for name, change in changed.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def put(place, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


BAD = [
    ({"block_table": put((1, 2), 99)}, r"block_table\[1, 2\] = 99 is outside \[0, \d+\)"),
    ({"block_table": put((2, 0), -1)}, r"block_table\[2, 0\] = -1 is outside"),
    ({"block_table": lambda t: t[:, :3].contiguous()}, r"row 0 has 13 tokens on 4 pages, but block_table names 3"),
    ({"block_table": lambda t: t.long()}, r"must be int32"),
    ({"block_table": lambda t: t[:2]}, r"3 seq_lens need as many rows of block_table .* got 2 and 4"),
    ({"block_table": put((1, 1), 0)}, r"rows 0 and 1 of one group have different pages, \d+ and 0, at place 1"),
    ({"seq_lens": put(1, 2)}, r"seq_lens\[1\] = 2 must count the row's 3 queries"),
    ({"seq_lens": put(1, -7)}, r"seq_lens\[1\] = -7"),
    ({"cu_seqlens_q": put(3, 4)}, r"cu_seqlens_q ends at 4, but there are 5 queries"),
    ({"cu_seqlens_q": put(1, 5)}, r"must not decrease; cu_seqlens_q\[2\] = 4 follows 5"),
    ({"cu_seqlens_q": put(0, 1)}, r"must start at 0; got 1"),
    ({"cu_groups": put(2, 2)}, r"cu_groups must run from 0 to the 3 rows; got 0 to 2"),
    ({"cu_groups": put(1, 9)}, r"cu_groups\[1\] = 9 must lie between 0 and 3"),
    ({"cu_groups": None}, r"must be given together"),
    ({"prefix_lens": put(1, 4)}, r"prefix_lens\[1\] = 4 must be .* equal within the group"),
    ({"prefix_lens": put(2, 3)}, r"prefix_lens\[2\] = 3 must be a multiple of the page size 4"),
    ({"prefix_lens": put(2, 8)}, r"prefix_lens\[2\] = 8 reaches beyond the row's first query at position 4"),
    ({"query": lambda q: q[:, :3]}, r"3 query heads cannot share 2 key heads"),
    ({"query": lambda q: q[..., :4]}, r"query has head dim 4, the caches have 8"),
    ({"query": lambda q: q[0]}, r"must have 3 dimensions"),
    ({"query": lambda q: q.half()}, r"one dtype"),
    ({"key_cache": lambda k: k[1:]}, r"differ in dimension 0"),
    ({"key_cache": lambda k: k.mT.contiguous().mT}, r"must be contiguous"),
    ({"window": -1}, r"must not be negative; got 0 and -1"),
    ({"softcap": -1.0}, r"must not be negative; got -1 and 0"),
]


@needs_compiled
@pytest.mark.parametrize("changed, message", BAD, ids=[m for _, m in BAD])
def test_refuses(changed, message):
    with pytest.raises(RuntimeError, match=f"^paged_attention: .*{message}"):
        paged_attention(**bad(**changed), max_queries=5)
    assert paged_attention(**bad()).isfinite().all()


def test_any_batch():
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    row = st.tuples(st.integers(1, 80), st.integers(0, 80)).map(lambda r: (r[0], min(r)))
    group = st.tuples(st.integers(0, 6), st.lists(row, min_size=1, max_size=5))

    @hypothesis.settings(max_examples=60)
    @hypothesis.example(  # plain torch gave NaN on AMX: see test_plain_torch_multiplies_no_nan
        groups=[(0, [(6, 6), (15, 1)])],
        page_size=1,
        heads=(6, 2),
        dim=4,
        dtype=torch.bfloat16,
        window=1,
        softcap=3.0,
        shared=False,
    )
    @hypothesis.given(
        groups=st.lists(group, min_size=1, max_size=4),
        page_size=st.sampled_from([1, 3, 8, 16]),
        heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
        dim=st.sampled_from([4, 16, 24]),
        dtype=st.sampled_from(DTYPES),
        window=st.sampled_from([0, 0, 1, 6, 64]),
        softcap=st.sampled_from([0.0, 3.0]),
        shared=st.booleans(),
    )
    def check(groups, page_size, heads, dim, dtype, window, softcap, shared):
        hypothesis.assume(any(queries for _, rows in groups for _, queries in rows))
        case = make_grouped(groups, page_size, heads=heads[0], kv_heads=heads[1], dim=dim, dtype=dtype)
        assert_as_good_as_torch(case if shared else case._replace(sharing={}), softcap, window)

    check()


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (1, 0.0), (0, 3.0), (1, 3.0)])
def test_plain_torch_multiplies_no_nan(window, softcap, monkeypatch):
    """Not even in padding, which is dropped: see the note on AMX products in ``paged_torch``."""
    seen = []
    monkeypatch.setattr(paged_torch, "masked_attention", lambda *a: seen.append(masked_attention(*a)) or seen[-1])
    query, keys, values, table, *bounds = make_case([6, 15, 9], [6, 1, 0], 4, dtype=torch.float32).tensors
    unwritten = torch.full_like(keys[:1], torch.nan)
    caches = (torch.cat([unwritten, cache]) for cache in (keys, values))
    call = PagedCall(query, *caches, table + 1, *bounds, None, None, 6, SCALE, softcap, window)
    paged_torch.paged_attention(call)
    assert seen[0].isfinite().all()


def test_the_definition_is_dense_attention():
    case = make_case([6, 11], [3, 11], 4)
    query, *rest = case.tensors
    out = reference.paged_attention(query, *rest, SCALE)
    for row, (start, stop) in enumerate([(0, 3), (3, 14)]):
        k, v = (x.to(DEVICE).transpose(0, 1).repeat_interleave(2, 0) for x in case.dense[row])
        q = query[start:stop].transpose(0, 1)
        n, t = q.shape[1], k.shape[1]
        mask = torch.ones(n, t, dtype=torch.bool, device=DEVICE).tril(t - n)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)
        torch.testing.assert_close(out[start:stop], expected.transpose(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 2])
def test_no_queries(rows, dtype):
    query, keys, values, table, lens, _ = make_case([5, 3], [1, 1], 4, dtype=dtype).tensors
    bounds = torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE)
    cu_groups = torch.tensor([0, rows] if rows else [0], dtype=torch.int32, device=DEVICE)
    groups = {"cu_groups": cu_groups, "prefix_lens": torch.zeros_like(lens[:rows])}
    for options in ({}, groups):
        out = paged_attention(query[:0], keys, values, table[:rows], lens[:rows], bounds, SCALE, **options)
        assert out.shape == (0, 4, 8) and out.dtype == dtype


def test_registered_properly():
    case = make_grouped(GROUPS["mixed"], 7, dtype=torch.float32)
    query, *rest = case.tensors
    for strided in (query, query.transpose(0, 1).contiguous().transpose(0, 1)):
        for groups in ((None, None), tuple(case.sharing.values())):
            arguments = (strided, *rest, *groups, len(query), SCALE, 2.0, 7)
            torch.library.opcheck(torch.ops.toolx.paged_attention.default, arguments)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_masked_attention_is_differentiable(softcap):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 4, generator=g, dtype=torch.float64).to(DEVICE).requires_grad_() for h in (4, 2, 2))
    visible = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril().expand(2, 1, 5, 5)
    if softcap:  # its softmax is in fp32, too coarse for finite differences: compare with float64 instead
        scores = softcap * torch.tanh(q @ k.repeat_interleave(2, 1).mT * (0.5 / softcap))
        expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(masked_attention(q, k, v, visible, 0.5, softcap), expected, rtol=1e-6, atol=1e-6)
        return
    assert torch.autograd.gradcheck(lambda *qkv: masked_attention(*qkv, visible, 0.5, softcap), (q, k, v))


def test_a_row_without_queries_beside_one_with_one():
    case = make_case([5, 3], [1, 0], 4)
    torch.testing.assert_close(paged_attention(*case.tensors, SCALE), reference.paged_attention(*case.tensors, SCALE))
