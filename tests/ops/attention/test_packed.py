"""Packed attention, by dense blocks and by FlexAttention's block mask, against the visibility rule in plain loops."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from torch.utils.checkpoint import checkpoint

from tests.ops.cases import DEVICE
from toolx_kernels.ops.attention import packed_flex
from toolx_kernels.ops.attention.packed import PADDED_WORK, PackedContext, check_flex, cut_into_blocks, like_sized
from toolx_kernels.ops.attention.packed_flex import BLOCK, block_mask, padded_length

SCALE = 0.4
LENGTHS = [(37, [6, 0, 12, 4]), (1, [3]), (5, [9, 9]), (130, [2, 300, 8])]  # N = 526, in 6 blocks of 128


def visible_by_hand(lengths, window) -> torch.Tensor:
    """The visibility rule in loops, (N, N)."""
    seen, start = torch.zeros(2 * [sum(p + sum(c) for p, c in lengths)], dtype=torch.bool), 0
    for prompt, completions in lengths:
        place = start + prompt
        for begin, length, offset in [(start, prompt, 0), *((None, length, prompt) for length in completions)]:
            begin = place if begin is None else begin
            for i in range(length):
                keys = [*((start + j, j) for j in range(prompt)), *((begin + j, offset + j) for j in range(length))]
                for key, position in keys:
                    if position <= offset + i and (not window or offset + i - position < window):
                        seen[begin + i, key] = True
            place += length if offset else 0
        start = place
    return seen


def inputs_of(context, heads=4, kv_heads=2, dim=16, dtype=torch.float64):
    g, n = torch.Generator().manual_seed(0), len(context.tokens.position)
    shapes = [(n, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    *inputs, upstream = (torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE, dtype) for shape in shapes)
    return [tensor.requires_grad_() for tensor in inputs], upstream


def with_gradients(out, inputs, upstream):
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def by_hand(inputs, visible, scale, softcap):
    query, key, value = (tensor.double() for tensor in inputs)
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible.to(DEVICE), -torch.inf).softmax(-1), value)


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (7, 0.0), (7, 2.0)])
def test_dense_blocks_compute_the_attention_of_the_whole(window, softcap):
    context = PackedContext(LENGTHS, DEVICE)
    inputs, upstream = inputs_of(context)
    ours = with_gradients(context.dense(*inputs, SCALE, softcap, window), inputs, upstream)
    truth = by_hand(inputs, visible_by_hand(LENGTHS, window), SCALE, softcap)
    tolerance = 1e-5 if softcap else 1e-12  # with a softcap, softmax is computed in fp32
    torch.testing.assert_close(ours, with_gradients(truth, inputs, upstream), rtol=tolerance, atol=tolerance)


def test_blocks_hold_every_query_once_with_all_it_sees():
    visible, held = visible_by_hand(LENGTHS, 0), []
    for queries, keys in cut_into_blocks(LENGTHS):
        held += queries
        assert set(visible[queries].any(0).nonzero().flatten().tolist()) == set(keys)
    assert sorted(held) == list(range(len(visible)))


def test_blocks_compute_little_in_vain():
    """A prompt of 1,000 tokens with 10 completions of 256: one square block would compute 12.7 M scores."""
    lengths = [(1000, [256] * 10)]
    work = sum(len(queries) * len(keys) for queries, keys in cut_into_blocks(lengths))
    assert work == 1000**2 + 5 * 512 * 1512
    assert work < 2 * int(visible_count(lengths)) and work < 0.4 * 3560**2


def visible_count(lengths) -> int:
    return sum(
        p * (p + 1) // 2 + sum(length * p + length * (length + 1) // 2 for length in completions)
        for p, completions in lengths
    )


def test_a_short_group_beside_a_long_one_is_not_padded_to_it():
    lengths = [(900, [100] * 3), *[(10, [3, 4])] * 30, (850, [100] * 3)]
    blocks = cut_into_blocks(lengths)
    buckets = like_sized(blocks)
    padded = [len(b) * max(len(q) for q, _ in b) * max(len(k) for _, k in b) for b in buckets]
    assert sum(padded) <= PADDED_WORK * sum(len(queries) * len(keys) for queries, keys in blocks)
    assert sum(map(len, buckets)) == len(blocks) and len(buckets) <= 6
    context = PackedContext(lengths, "cpu")
    assert [blocks.queries.shape[0] * blocks.queries.shape[1] * blocks.keys.shape[1] for blocks in context.blocks] == (
        padded
    )


@pytest.mark.parametrize("window", [0, 9, 200])
def test_every_pair_of_the_block_mask_is_a_visible_one(window):
    visible = visible_by_hand(LENGTHS, window)
    mask = PackedContext(LENGTHS, DEVICE).flex_mask(window)
    length, n = mask.seq_lengths[0], len(visible)
    assert length == 768 and mask.BLOCK_SIZE == (BLOCK, BLOCK)
    places = torch.arange(length, device=DEVICE)
    pairs = mask.mask_mod(None, None, places[:, None], places)
    assert pairs[:n, :n].cpu().equal(visible)
    assert not pairs[n:].any() and not pairs[:, n:].any()
    theirs = torch_flex.create_block_mask(mask.mask_mod, None, None, length, length, device=DEVICE)
    assert mask.to_dense().equal(theirs.to_dense())
    for kind in ("kv", "full_kv", "q", "full_q"):  # indices past a row's count are undefined
        ours_n, theirs_n = (getattr(m, f"{kind}_num_blocks") for m in (mask, theirs))
        assert ours_n.equal(theirs_n)
        used = torch.arange(length // BLOCK, device=DEVICE) < ours_n[..., None]
        assert getattr(mask, f"{kind}_indices")[used].equal(getattr(theirs, f"{kind}_indices")[used])
    assert (mask.full_kv_num_blocks.sum() > 0) == (window == 0)


def test_a_block_mask_made_in_pieces_is_the_same(monkeypatch):
    tokens = PackedContext(LENGTHS, DEVICE).tokens
    whole = block_mask(tokens, 9)
    monkeypatch.setattr(packed_flex, "MASK_ENTRIES", 1)  # one row of blocks at a time
    pieces = block_mask(tokens, 9)
    assert whole.kv_num_blocks.equal(pieces.kv_num_blocks) and whole.kv_indices.equal(pieces.kv_indices)


def test_lengths_of_flex_are_few_and_whole_blocks():
    lengths = [padded_length(n) for n in range(1, 5000)]
    assert all(n <= length and length % BLOCK == 0 for n, length in enumerate(lengths, start=1))
    assert sorted(set(lengths)) == [128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144]


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention as on a GPU; on a CPU it runs uncompiled, with torch's ban on differentiating it there lifted."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
        monkeypatch.setattr(packed_flex, "kernel", torch_flex.flex_attention)
    monkeypatch.setattr(packed_flex, "_gone", False)
    check_flex.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("window, softcap, heads", [(0, 0.0, 6), (9, 2.0, 4)])
def test_flex_computes_the_attention_of_the_whole(flex, window, softcap, heads):
    context = PackedContext(LENGTHS, DEVICE)
    dtype = torch.float64 if DEVICE.type == "cpu" else torch.float32
    inputs, upstream = inputs_of(context, heads=heads, dtype=dtype)
    ours = with_gradients(context.flex(*inputs, SCALE, softcap, window), inputs, upstream)
    truth = by_hand(inputs, visible_by_hand(LENGTHS, window), SCALE, softcap).to(dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-3  # a GPU may multiply fp32 as tf32
    torch.testing.assert_close(ours, with_gradients(truth, inputs, upstream), rtol=tolerance, atol=tolerance)


def test_attention_takes_flex_where_it_applies(flex, monkeypatch, recwarn):
    monkeypatch.setattr(packed_flex, "applies", lambda query: not packed_flex._gone)
    context = PackedContext(LENGTHS[:3], DEVICE)
    inputs, _ = inputs_of(context, dtype=torch.float32)
    out = context.attend(0, *inputs, SCALE, 0.0, 7)
    assert not [warning for warning in recwarn if "dense blocks" in str(warning.message)]
    assert context.flex_masks.keys() == {7} and not context.dense_masks
    torch.testing.assert_close(out, context.dense(*inputs, SCALE, 0.0, 7), rtol=2e-3, atol=2e-3)


def test_flex_under_activation_checkpointing(flex, monkeypatch, recwarn):
    """The first call checks flex, including its backward, inside the layer that checkpointing recomputes."""
    monkeypatch.setattr(packed_flex, "applies", lambda query: not packed_flex._gone)
    context = PackedContext(LENGTHS[:3], DEVICE)
    inputs, upstream = inputs_of(context, dtype=torch.float32)

    def layer(query, key, value):  # nothing is saved after the attention, so recomputation stops there
        return context.attend(0, query.sin(), key.cos(), value, SCALE, 0.0, 7)

    ours = with_gradients(checkpoint(layer, *inputs, use_reentrant=False), inputs, upstream)
    assert context.flex_masks and not context.dense_masks
    assert not [warning for warning in recwarn if "dense blocks" in str(warning.message)]
    torch.testing.assert_close(ours, with_gradients(layer(*inputs), inputs, upstream), rtol=0, atol=0)


def fail(*_, **__):
    raise RuntimeError("no kernel for this card\nand a long trace")


def wrong(query, key, value, *_, **__):
    return query + key.mean() + value.mean()


@pytest.mark.parametrize("kernel, reason", [(fail, "no kernel for this card$"), (wrong, "results are off by")])
def test_where_flex_fails_dense_blocks_take_over_with_one_warning(flex, monkeypatch, kernel, reason):
    monkeypatch.setattr(packed_flex, "applies", lambda query: not packed_flex._gone)
    monkeypatch.setattr(packed_flex, "kernel", kernel)
    context = PackedContext(LENGTHS[:3], DEVICE)
    inputs, _ = inputs_of(context, dtype=torch.float32)
    with pytest.warns(UserWarning, match=reason) as seen:
        outs = [context.attend(0, *inputs, SCALE, 0.0, 0) for _ in range(2)]
    assert len(seen) == 1
    assert all(out.equal(context.dense(*inputs, SCALE, 0.0, 0)) for out in outs)


def test_running_out_of_memory_is_not_a_failing_flex(flex, monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(packed_flex, "applies", lambda query: True)
    monkeypatch.setattr(packed_flex, "kernel", exhausted)
    context = PackedContext(LENGTHS[:3], DEVICE)
    inputs, _ = inputs_of(context, dtype=torch.float32)
    with pytest.raises(torch.OutOfMemoryError):
        context.attend(0, *inputs, SCALE, 0.0, 0)
    assert not packed_flex._gone


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU has dense blocks only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_repeats_flex_to_the_bit(flex, dtype):
    context = PackedContext(LENGTHS, DEVICE)
    inputs, upstream = inputs_of(context, dim=64, dtype=dtype)
    first, again = (with_gradients(context.attend(0, *inputs, SCALE, 0.0, 9), inputs, upstream) for _ in range(2))
    assert not packed_flex._gone and context.flex_masks
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_packs_below_two_blocks_take_dense_ones_and_compile_nothing():
    """So checking a model with a few tokens compiles nothing."""
    on_gpu = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    for n_tokens, flex in ((6, False), (2 * BLOCK - 1, False), (2 * BLOCK, True)):
        on_gpu.shape = (n_tokens, 4, 64)
        assert packed_flex.applies(on_gpu) == flex


def test_a_cpu_and_float64_take_dense_blocks():
    context = PackedContext(LENGTHS[:2], DEVICE)
    inputs, _ = inputs_of(context)
    context.attend(0, *inputs, SCALE, 0.0, 0)
    assert context.dense_masks and not context.flex_masks
