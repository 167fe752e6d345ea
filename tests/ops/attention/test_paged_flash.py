"""The flash-attn adapter, on a stand-in with flash-attn 2's signature and limits that computes in torch.

Limits and results are those of ``flash_attn_interface.py`` and ``csrc/flash_attn/flash_api.cpp``, version 2.8.4.
"""

import sys
import types

import pytest
import torch

from tests.ops.attention.cases import make_case
from toolx_kernels import reference
from toolx_kernels.ops.attention import paged, paged_flash, paged_torch
from toolx_kernels.ops.attention.paged_call import PagedCall

PAGE = 256


def varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    n_rows, (total, heads, dim) = len(cu_seqlens_q) - 1, q.shape
    pages, page_size, kv_heads, _ = k.shape
    assert q.dtype in (torch.float16, torch.bfloat16) and k.dtype == v.dtype == q.dtype
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == block_table.dtype == torch.int32
    assert cu_seqlens_q.is_contiguous() and cu_seqlens_k.is_contiguous() and len(cu_seqlens_k) == n_rows + 1
    assert block_table.stride(-1) == 1 and block_table.shape[0] == n_rows > 0 and page_size % 256 == 0
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert (
        dim <= 256 and dim % 8 == 0 and heads % kv_heads == 0 and k.shape == v.shape == (pages, page_size, *k.shape[2:])
    )
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    out, lse = torch.zeros_like(q), torch.full((heads, total), torch.inf)
    for row in range(n_rows):
        start, stop = cu_seqlens_q[row : row + 2].tolist()
        n_keys = int(cu_seqlens_k[row + 1] - cu_seqlens_k[row])
        assert stop - start <= max_seqlen_q and n_keys <= max_seqlen_k <= block_table.shape[1] * page_size
        if max_seqlen_q == 1:  # flash-attn then assumes that each sequence has one query
            assert stop - start == 1
        used = block_table[row, : -(-n_keys // page_size)].long()
        key, value = (x[used].flatten(0, 1)[:n_keys].float().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:stop].float(), key) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        i = torch.arange(stop - start)[:, None] + n_keys - (stop - start)
        j = torch.arange(n_keys)[None]
        hidden = torch.zeros(stop - start, n_keys, dtype=torch.bool)
        left, right = window_size[0], 0 if causal else window_size[1]
        if right >= 0:
            hidden |= j > i + right
        if left >= 0:
            hidden |= j < i - left
        scores = scores.masked_fill(hidden, -torch.inf)
        out[start:stop] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).nan_to_num(0), value).to(q.dtype)
        lse[:, start:stop] = scores.logsumexp(-1).masked_fill(hidden.all(-1), torch.inf)
    return (out, lse, torch.empty(0)) if return_attn_probs else out


class StandIn(types.ModuleType):
    def __init__(self, version="2.8.4"):
        super().__init__("flash_attn")
        self.__version__ = version
        self.calls = []

    def flash_attn_varlen_func(self, *arguments, **named):
        self.calls.append(named)
        return varlen_func(*arguments, **named)


@pytest.fixture
def stand_in(monkeypatch):
    module = StandIn()
    install(monkeypatch, module)
    monkeypatch.setattr(paged_flash, "_capability", lambda device: (8, 0))
    yield module
    paged_flash.installed.cache_clear()


def install(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    paged_flash.installed.cache_clear()


def run(arguments, groups=(None, None), max_queries=None, softcap=0.0, window=0):
    bound = int(arguments[5].diff().max()) if max_queries is None else max_queries
    return paged_flash.paged_attention(PagedCall(*arguments, *groups, bound, 0.3, softcap, window))


def assert_agrees(out, arguments, softcap=0.0, window=0):
    double = [a.double() if a.is_floating_point() else a for a in arguments]
    truth = reference.paged_attention(*double, 0.3, softcap, window)
    plain = reference.paged_attention(*arguments, 0.3, softcap, window)
    assert out.dtype == arguments[0].dtype
    assert (out - truth).abs().max() <= (plain - truth).abs().max() + 1e-3 * truth.abs().max()


def share_prefix(arguments, n_tokens, siblings):
    """Gives all rows of a group the pages of its first row for the first ``n_tokens`` tokens."""
    table = arguments[3].clone()
    for first, stop in siblings:
        table[first:stop, : n_tokens // PAGE] = table[first, : n_tokens // PAGE]
    return [*arguments[:3], table, *arguments[4:]]


ROWS = {
    "decode": ([300, 513, 1], [1, 1, 1]),
    "a row without queries": ([300, 513, 1], [1, 0, 1]),
    "chunked": ([300, 513, 5], [7, 1, 5]),
}


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (100, 0.0), (0, 2.0)])
@pytest.mark.parametrize("name", ROWS)
def test_agrees_with_the_definition(stand_in, name, window, softcap):
    arguments = list(make_case(*ROWS[name], PAGE, dtype=torch.bfloat16).tensors)
    assert paged_flash.applies(arguments[0], arguments[1])
    assert_agrees(run(arguments, softcap=softcap, window=window), arguments, softcap, window)
    assert len(stand_in.calls) == 1


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (300, 0.0), (0, 2.0)])
def test_a_shared_prefix_is_a_call_of_its_own(stand_in, window, softcap):
    """Two siblings with 256 shared tokens, a row with none, an empty group, and a row of padding."""
    arguments = list(make_case([300, 513, 40], [1, 3, 1], PAGE, dtype=torch.float16).tensors)
    query, keys, values, table, seq_lens, cu = share_prefix(arguments, 256, [(0, 2)])
    groups = torch.tensor([[0, 2, 3, 3, 4]], dtype=torch.int32)[0], torch.tensor([256, 256, 0, 0], dtype=torch.int32)
    pad = torch.nn.functional.pad
    padded = [
        torch.cat([query, query[:1]]), keys, values, pad(table, (0, 0, 0, 1)), pad(seq_lens, (0, 1)),
        torch.cat([cu, cu[-1:] + 1]),
    ]  # fmt: skip
    out = run(padded, groups, 4, softcap, window)
    assert_agrees(out[:-1], [query, keys, values, table, seq_lens, cu], softcap, window)
    assert (out[-1] == 0).all()
    assert len(stand_in.calls) == (1 if window else 2)


def test_the_prefix_is_read_through_the_first_row_alone(stand_in):
    arguments = list(make_case([300, 513, 400], [1, 1, 1], PAGE, dtype=torch.float16).tensors)
    arguments = share_prefix(arguments, 256, [(0, 3)])
    groups = torch.tensor([0, 3], dtype=torch.int32), torch.full((3,), 256, dtype=torch.int32)
    expected = run(arguments, groups, 3)
    assert_agrees(expected, arguments)
    arguments[3][1:, 0] = arguments[3][0, -1]  # a page of NaN
    assert torch.equal(run(arguments, groups, 3), expected)


def test_the_result_has_the_layout_of_the_query(stand_in):
    arguments = list(make_case(*ROWS["chunked"], PAGE, dtype=torch.float16).tensors)
    arguments = list(arguments)
    expected = run(arguments)
    arguments[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    out = run(arguments)
    assert torch.equal(out, expected) and out.stride() == arguments[0].stride()


def test_nothing_waits_for_the_device(stand_in, monkeypatch):
    """The call can be captured in a CUDA graph."""

    def fail(*_, **__):
        raise AssertionError("the host asked the device for a value")

    def shapes_alone(q, *_, **__):
        return torch.empty_like(q), torch.empty(q.shape[1], q.shape[0]), None

    arguments = list(make_case([300, 513, 400], [1, 1, 1], PAGE, dtype=torch.float16).tensors)
    groups = torch.tensor([0, 3], dtype=torch.int32), torch.full((3,), 256, dtype=torch.int32)
    with monkeypatch.context() as patch:
        patch.setattr(paged_flash, "installed", lambda: shapes_alone)
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, fail)
        run(arguments, max_queries=1)
        run(arguments, groups, max_queries=3)


def test_no_queries(stand_in):
    query, keys, values, table, lens, cu = make_case([5], [1], PAGE, dtype=torch.float16)[0]
    assert run([query[:0], keys, values, table[:0], lens[:0], cu[:1]], max_queries=0).shape == (0, 4, 8)
    assert stand_in.calls == []


@pytest.mark.parametrize(
    "page_size, dim, dtype", [(16, 64, 2), (384, 64, 2), (256, 36, 2), (256, 264, 2), (256, 64, 4)]
)
def test_what_flash_attn_refuses_is_not_given_to_it(stand_in, page_size, dim, dtype):
    dtype = {2: torch.bfloat16, 4: torch.float32}[dtype]
    query, cache = torch.empty(3, 4, dim, dtype=dtype), torch.empty(2, page_size, 2, dim, dtype=dtype)
    pages = torch.empty(2, 512, 2, 64, dtype=torch.float16)
    assert paged_flash.applies(torch.empty(3, 4, 64, dtype=torch.float16), pages)
    assert not paged_flash.applies(query, cache)


def test_neither_old_chips_nor_old_nor_broken_nor_other_flash_attns(stand_in, monkeypatch):
    query, cache = torch.empty(3, 4, 64, dtype=torch.float16), torch.empty(2, 512, 2, 64, dtype=torch.float16)
    assert paged_flash.applies(query, cache)
    monkeypatch.setattr(paged_flash, "_capability", lambda device: (7, 5))
    assert not paged_flash.applies(query, cache)
    for absent in (None, StandIn("2.5.9"), types.ModuleType("flash_attn")):  # the last has only flash_attn.cute
        install(monkeypatch, absent)
        assert paged_flash.installed() is None
        assert not paged_flash.applies(query, cache)


@pytest.mark.parametrize(
    "page_size, dim, dtype, expected",
    [
        (256, 8, torch.float16, "flash-attn"),
        (16, 8, torch.float16, "Triton"),
        (256, 264, torch.float16, "plain torch"),
        (256, 8, torch.float64, "plain torch"),
    ],
    ids=str,
)
def test_the_op_on_a_gpu_chooses(stand_in, monkeypatch, page_size, dim, dtype, expected):
    paged_triton = pytest.importorskip("toolx_kernels.ops.attention.paged_triton")
    for module, name in ((paged_flash, "flash-attn"), (paged_triton, "Triton"), (paged_torch, "plain torch")):
        monkeypatch.setattr(module, "paged_attention", lambda *arguments, name=name: name)
    arguments = make_case([5], [1], page_size, dim=dim, dtype=dtype).tensors
    assert paged.on_cuda(*arguments, None, None, 1, 0.3, 0.0, 0) == expected
