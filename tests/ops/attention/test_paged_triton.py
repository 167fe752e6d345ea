"""Paged attention in Triton against its definition, on a GPU if there is one, else in the interpreter."""

import itertools

import pytest
import torch

from tests.ops.attention.cases import make_case
from tests.ops.attention.test_paged import CASES
from tests.ops.cases import DEVICE, TRITON_DTYPES, needs_triton
from tests.ops.test_library import assert_same_bits, expected_caches, kv_case
from tests.without_gpu.launches import Launches
from toolx_kernels import reference
from toolx_kernels.errors import InputError

pytest.importorskip("triton")
from toolx_kernels.ops.attention import paged_tiles, paged_triton
from toolx_kernels.ops.attention.paged_call import PagedCall

pytestmark = needs_triton
OF_SPLITS = pytest.mark.parametrize(
    "splits, dtype", [(1, torch.float32), (5, torch.float32), *((2, dtype) for dtype in TRITON_DTYPES[1:])], ids=str
)
NO_GROUPS = (None, None)


def on_device(arguments):
    return [tensor.to(DEVICE) for tensor in arguments]


def run(arguments, groups=NO_GROUPS, scale=0.3, softcap=0.0, window=0):
    """Runs the kernels with the exact largest number of queries, as a caller would who knows the lengths."""
    query, *_, cu = arguments
    bounds = cu if groups[0] is None else cu[groups[0].long()]
    bound = int(bounds.diff().max())
    return paged_triton.paged_attention(PagedCall(*arguments, *groups, bound, scale, softcap, window))


def assert_agrees(out, arguments, scale=0.3, softcap=0.0, window=0):
    """Asserts that ``out`` is no farther from the float64 definition than the definition in its own dtype."""
    double = [a.double() if a.is_floating_point() else a for a in arguments]
    truth = reference.paged_attention(*double, scale, softcap, window)
    plain = reference.paged_attention(*arguments, scale, softcap, window)
    tolerance = 2e-6 if out.dtype == torch.float32 else 1e-3 * float(truth.abs().max())
    assert truth.isfinite().all() and out.dtype == arguments[0].dtype
    assert (out - truth).abs().max() <= (plain - truth).abs().max() + tolerance


def force_splits(monkeypatch, splits):
    monkeypatch.setattr(paged_triton, "n_splits", lambda n_programs, n_processors: splits)


def make_groups(prefixes, rows, page_size, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    """Groups with ``prefixes[g]`` shared tokens; ``rows[g]`` lists each sibling's (own tokens, queries among them).

    Returns the arguments without groups, and (cu_groups, prefix_lens). Table entries past a row's end name a NaN page.
    """
    g = torch.Generator().manual_seed(seed)
    n_pages = sum(prefixes) + sum(own for group in rows for own, _ in group) + 1
    free = torch.randperm(n_pages, generator=g).tolist()
    caches = [torch.full((n_pages, page_size, kv_heads, dim), torch.nan) for _ in range(2)]
    unwritten = free.pop()

    def pages_for(n):
        pages = [free.pop() for _ in range(-(-n // page_size))]
        for cache in caches:
            values = torch.randn(n, kv_heads, dim, generator=g)
            for t in range(n):
                cache[pages[t // page_size], t % page_size] = values[t]
        return pages

    tables, seq_lens, query_lens, prefix_lens = [], [], [], []
    for prefix, group in zip(prefixes, rows, strict=True):
        shared = pages_for(prefix)
        for own, queries in group:
            tables.append(shared + pages_for(own))
            seq_lens.append(prefix + own)
            query_lens.append(queries)
            prefix_lens.append(prefix)
    width = max(map(len, tables)) + 1
    table = [row + [unwritten] * (width - len(row)) for row in tables]
    query = torch.randn(sum(query_lens), heads, dim, generator=g)
    cu_queries = [0, *itertools.accumulate(query_lens)]
    cu_groups = [0, *itertools.accumulate(map(len, rows))]
    table, seq_lens, cu_queries, cu_groups, prefix_lens = (
        torch.tensor(numbers, dtype=torch.int32) for numbers in (table, seq_lens, cu_queries, cu_groups, prefix_lens)
    )
    query, *caches = (tensor.to(dtype) for tensor in (query, *caches))
    return on_device([query, *caches, table, seq_lens, cu_queries]), tuple(on_device([cu_groups, prefix_lens]))


@pytest.mark.parametrize(
    "page_size, window, softcap", [(1, 0, 0.0), (7, 7, 2.0), (16, 0, 0.0), (16, 4, 0.0), (32, 7, 2.0)]
)
@pytest.mark.parametrize("name", ["decode", "chunked", "one row prefill"])
def test_agrees_with_the_definition(name, page_size, window, softcap):
    arguments = on_device(make_case(*CASES[name], page_size, dtype=torch.float32)[0])
    assert_agrees(run(arguments, window=window, softcap=softcap), arguments, window=window, softcap=softcap)


@OF_SPLITS
def test_any_number_of_splits(monkeypatch, poisoned, splits, dtype):
    """With 33 or 70 tokens every split gets some; with 1 token only one split does."""
    force_splits(monkeypatch, splits)
    arguments = on_device(make_case([33, 1, 70], [1, 1, 20], 7, dtype=dtype)[0])
    out = run(arguments)
    assert_agrees(out, arguments)
    assert torch.equal(out, run(arguments))


def test_one_split_without_groups_writes_its_result_directly(monkeypatch):
    force_splits(monkeypatch, 1)
    monkeypatch.setattr(paged_triton, "merge_kernel", None)
    arguments = on_device(make_case(*CASES["chunked"], 7, dtype=torch.float32)[0])
    assert_agrees(run(arguments), arguments)


@pytest.mark.parametrize("heads, kv_heads, dim", [(7, 1, 5), (14, 2, 24), (3, 3, 80), (20, 1, 16)])
def test_heads_and_head_dims_that_fill_no_tile(heads, kv_heads, dim):
    arguments = on_device(make_case([9, 20], [4, 1], 16, heads, kv_heads, dim, dtype=torch.float32)[0])
    assert_agrees(run(arguments), arguments)


GROUPS = {
    "decode": ([32, 0, 16], [[(3, 1), (9, 1), (1, 1)], [(5, 1)], [(20, 1), (2, 1)]]),
    "several queries": ([32, 16], [[(9, 3), (30, 1), (5, 5)], [(18, 17), (7, 0), (4, 2)]]),
}


@pytest.mark.parametrize("window, softcap, page_size", [(0, 0.0, 1), (0, 0.0, 8), (12, 2.0, 16), (30, 0.0, 16)])
@pytest.mark.parametrize("name", GROUPS)
def test_shared_prefixes_change_no_result(name, page_size, window, softcap):
    arguments, groups = make_groups(*GROUPS[name], page_size)
    out = run(arguments, groups, window=window, softcap=softcap)
    assert_agrees(out, arguments, window=window, softcap=softcap)


@OF_SPLITS
def test_shared_prefixes_in_splits(monkeypatch, poisoned, splits, dtype):
    force_splits(monkeypatch, splits)
    arguments, groups = make_groups([48, 16], [[(3, 1)] * 3, [(40, 1), (1, 1)]], 8, dtype=dtype)
    out = run(arguments, groups)
    assert_agrees(out, arguments)
    assert torch.equal(out, run(arguments, groups))


def test_a_window_over_more_siblings_than_are_looked_at_together(monkeypatch):
    arguments, groups = make_groups([16], [[(19 - i, 1) for i in range(19)]], 16)
    monkeypatch.setattr(paged_triton, "BLOCK_U", 16)
    assert_agrees(run(arguments, groups, window=5), arguments, window=5)


def test_a_prefix_is_read_through_its_first_row_alone():
    arguments, groups = make_groups([32], [[(3, 1), (9, 1), (5, 1)]], 16)
    expected = run(arguments, groups)
    assert_agrees(expected, arguments)
    table = arguments[3].clone()
    table[1:, :2] = table[0, -1]  # the NaN page
    assert torch.equal(run([*arguments[:3], table, *arguments[4:]], groups), expected)


@pytest.mark.parametrize("grouped", [False, True])
def test_rows_of_padding_get_zeros_and_disturb_nobody(monkeypatch, grouped):
    """Padding as in a replayed CUDA graph: rows of one query and no keys, a table of zeros, possibly empty groups."""
    force_splits(monkeypatch, 2)
    arguments, groups = make_groups(*GROUPS["decode"], 16)
    moved = [torch.cat([torch.full_like(cache[:1], torch.nan), cache]) for cache in arguments[1:3]]  # page 0 is NaN
    query, table, seq_lens, cu = arguments[0], arguments[3] + 1, arguments[4], arguments[5]
    pad = torch.nn.functional.pad
    padded = [
        torch.cat([query, torch.randn_like(query[:3])]), *moved, pad(table, (0, 0, 0, 3)), pad(seq_lens, (0, 3)),
        torch.cat([cu, cu[-1] + torch.arange(1, 4, dtype=cu.dtype, device=cu.device)]),
    ]  # fmt: skip
    more = NO_GROUPS
    if grouped:
        n_rows = len(padded[4])
        ends = torch.tensor([n_rows - 2, n_rows, n_rows], dtype=torch.int32, device=DEVICE)
        more = torch.cat([groups[0], ends]), pad(groups[1], (0, 3))
    else:
        groups = NO_GROUPS
    out = run(padded, more)
    assert (out[-3:] == 0).all()
    assert_agrees(out[:-3], arguments)
    assert torch.equal(out[:-3], run(arguments, groups))


def test_any_layout_of_the_query():
    arguments = on_device(make_case(*CASES["chunked"], 7, dtype=torch.float32)[0])
    expected = run(arguments)
    for strided in (
        arguments[0].transpose(0, 1).contiguous().transpose(0, 1),  # heads first
        torch.stack([arguments[0], arguments[0] * torch.nan], 2)[:, :, 0],  # a slice of a larger tensor
        arguments[0].mT.contiguous().mT,  # heads are the fastest dimension
    ):
        out = run([strided, *arguments[1:]])
        assert torch.equal(out, expected)
        assert out.stride() == torch.empty_like(strided).stride()  # as the fake kernel promises


def test_a_block_table_that_is_a_slice():
    arguments = on_device(make_case(*CASES["chunked"], 7, dtype=torch.float32)[0])
    expected = run(arguments)
    for wide in (torch.nn.functional.pad(arguments[3], (0, 5)), arguments[3].repeat_interleave(2, 1)[:, ::2].clone()):
        arguments[3] = wide[:, : arguments[3].shape[1]]
        assert torch.equal(run(arguments), expected)
    arguments[3] = arguments[3].T.contiguous().T
    assert torch.equal(run(arguments), expected)


def test_nothing_to_do():
    arguments = on_device(make_case([5], [1], 4, dtype=torch.float32)[0])
    query, keys, values, table, lens, cu = arguments
    nothing = PagedCall(query[:0], keys, values, table[:0], lens[:0], cu[:1], *NO_GROUPS, 0, 0.3, 0.0, 0)
    assert paged_triton.paged_attention(nothing).shape == (0, 4, 8)


def test_a_cache_that_is_not_contiguous_is_refused():
    query, keys, *others = on_device(make_case([5], [1], 4, dtype=torch.float32)[0])
    with pytest.raises(InputError, match=r"shape \(5, 4, 2, 8\) has strides .* must be contiguous"):
        run([query, keys.mT.contiguous().mT, *others])


def forbid_waiting(monkeypatch):
    def fail(*_, **__):
        raise AssertionError("the host asked the device for a value")

    for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, fail)


def watch_launches(monkeypatch) -> dict[str, Launches]:
    kernels = {}
    for name in ("kv_write_kernel", "attention_kernel", "merge_kernel"):
        kernels[name] = Launches(getattr(paged_triton, name))
        monkeypatch.setattr(paged_triton, name, kernels[name])
    return kernels


@pytest.mark.parametrize("grouped", [False, True])
def test_a_launch_depends_on_no_value_of_the_device(monkeypatch, grouped):
    force_splits(monkeypatch, 2)
    arguments, groups = make_groups(*GROUPS["decode"], 16)
    kernels = watch_launches(monkeypatch)
    with monkeypatch.context() as patch:
        forbid_waiting(patch)
        for tensor in (*arguments[3:], *groups):
            call = PagedCall(*arguments, *(groups if grouped else NO_GROUPS), 3, 0.3, 0.0, 5)
            paged_triton.paged_attention(call)
            tensor.zero_()
    for kernel in (kernels["attention_kernel"], kernels["merge_kernel"]):
        per_call = len(kernel.grids) // 5
        assert per_call and kernel.grids == kernel.grids[:per_call] * 5


def test_a_batch_that_runs_dry_compiles_nothing_anew(monkeypatch):
    monkeypatch.setattr(paged_triton, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(paged_triton, "_n_processors", lambda device: 132)
    kernels = watch_launches(monkeypatch)
    cache, numbers = torch.empty(4, 16, 2, 64, device=DEVICE), torch.empty(600, dtype=torch.int32, device=DEVICE)
    for rows in (512, 320, 100, 33, 16, 7, 2, 1):
        n = numbers[:rows]
        query, key = (torch.empty(rows, heads, 64, device=DEVICE) for heads in (14, 2))
        paged_triton.kv_write(key, key, cache, cache, n.long())
        arguments = query, cache, cache, n[:, None], n, numbers[: rows + 1], numbers[: rows // 10 + 2], n
        paged_triton.paged_attention(PagedCall(*arguments, 16, 0.3, 0.0, 0))
    variants = {name: len(kernel.variants) for name, kernel in kernels.items()}
    # attention: the prefix and the part behind it
    assert variants == {"kv_write_kernel": 1, "attention_kernel": 2, "merge_kernel": 1}


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_other_lengths():
    arguments, groups = make_groups([64, 32], [[(30, 1)] * 3, [(20, 1)] * 2], 16)
    run(arguments, groups)
    graph = torch.cuda.CUDAGraph()
    call = (*arguments, *groups, 3, 0.3, 0.0, 0)
    with torch.cuda.graph(graph):
        out = torch.ops.toolx.paged_attention(*call)
    arguments[4].sub_(torch.tensor([29, 3, 0, 12, 19], device=DEVICE, dtype=torch.int32))
    graph.replay()
    assert_agrees(out, arguments)


def test_splits_fill_the_gpu_once():
    assert paged_tiles.n_splits(2, 132) == paged_tiles.MAX_SPLITS
    assert paged_tiles.n_splits(64, 132) == 4
    assert paged_tiles.n_splits(640, 132) == 1


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 6), (9, 0), (10, 3), (12, 0), (13, 0)])
@pytest.mark.parametrize("sharing, queries", [(1, 1), (7, 1), (7, 10), (32, 1), (128, 1), (1, 4000)])
def test_a_tile_holds_the_heads_of_a_query(capability, sharing, queries):
    for itemsize, block_d in itertools.product((2, 4), (16, 64, 128, 256)):
        tile = paged_tiles.choose_tile(capability, itemsize, block_d, sharing, queries)
        assert tile.block_m >= max(16, sharing)
        if itemsize == 4 and tile.block_m >= 64:  # tf32 by wgmma was wrong on an H200
            assert paged_tiles.dot_precision(itemsize, block_d, tile.block_m) == "ieee"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_kv_write(dtype, strided):
    for page_size, heads, dim in ((1, 1, 64), (7, 3, 5), (16, 8, 32)):
        case = on_device(kv_case(9, 60 // page_size + 1, page_size, heads, dim, dtype, strided=strided))
        case[4][[0, 2]] = torch.tensor([-2, 10**9], device=DEVICE)  # outside the cache
        kept = (case[4] >= 0) & (case[4] < 60)
        expected = expected_caches(*(tensor[kept] for tensor in case[:2]), *case[2:4], case[4][kept])
        paged_triton.kv_write(*case)
        assert_same_bits(case[2], expected[0])
        assert_same_bits(case[3], expected[1])


def test_kv_write_of_no_tokens():
    case = on_device(kv_case(0, 2, 4, 2, 8, torch.float32))
    paged_triton.kv_write(*case)
    assert case[2].isnan().all()
