"""Packed attention of completions that share their prompt: one visibility rule, two implementations.

Dense: blocks of queries over only the keys that they may see, under a mask, on any device and in any dtype. Flex:
torch's block-sparse FlexAttention over the whole pack, on a GPU. Windows count positions, never packed indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask

from toolx_kernels.errors import out_of_memory
from toolx_kernels.ops.attention import packed_flex
from toolx_kernels.ops.attention.paged_torch import masked_attention
from toolx_kernels.ops.attention.visibility import NO_WINDOW, Tokens, sees
from toolx_kernels.ops.picks import Picks, take_rows

PADDED_WORK = 1.5  # the most scores computed after blocks are padded to one size, as a multiple of those before


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of similar size, padded to one size: their queries, and all the keys that any of these may see.

    Padding repeats a block's first query, whose result is not used, and its first key, which is masked.
    """

    queries: Tensor  # (blocks, Q) packed indices
    keys: Tensor  # (blocks, K) packed indices
    filled: Tensor  # (blocks, K) False for padding
    query_picks: Picks  # the same indices, flattened
    key_picks: Picks

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, filled: Tensor) -> Blocks:
        return cls(queries, keys, filled, Picks(queries.flatten()), Picks(keys.flatten()))


@dataclass(slots=True, init=False)
class PackedContext:
    """Context of training: packed tokens, each of which sees its prompt and its own completion up to itself.

    ``lengths`` has, for each group in packed order, the number of tokens of the prompt and of each completion after it:
    ``[(3, [2, 4]), (5, [1])]`` is 3 + 2 + 4 + 5 + 1 tokens.
    """

    lengths: list[tuple[int, list[int]]]
    tokens: Tokens
    flex_masks: dict[int, BlockMask] = field(repr=False)  # by window
    dense_masks: dict[int, list[Tensor]] = field(repr=False)
    _blocks: list[Blocks] | None = field(repr=False)
    _inverse: Tensor = field(repr=False)  # set with _blocks: (N) index of each packed token among all blocks' queries

    def __init__(self, lengths: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu"):
        self.lengths = [(prompt, list(completions)) for prompt, completions in lengths]
        segment: list[int] = []
        prompts: list[int] = []
        position: list[int] = []
        number = 0
        for prompt, completions in self.lengths:
            first = number
            for start, length in [(0, prompt), *((prompt, length) for length in completions)]:
                segment += [number] * length
                prompts += [first] * length
                position += range(start, start + length)
                number += 1
        self.tokens = Tokens(*(torch.tensor(column, device=device) for column in (segment, prompts, position)))
        self.flex_masks, self.dense_masks = {}, {}
        self._blocks = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int
    ) -> Tensor:
        if packed_flex.applies(query):
            try:
                check_flex(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2], scale, softcap)
                return self.flex(query, key, value, scale, softcap, window)
            except Exception as error:  # a compiler may raise anything
                # activation checkpointing ends the recomputation of a layer with its own exception
                if out_of_memory(error) or type(error).__module__ == "torch.utils.checkpoint":
                    raise
                packed_flex.give_up(error)
        return self.dense(query, key, value, scale, softcap, window)

    # ---- dense

    def dense(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int) -> Tensor:
        """Attention computed block by block, (N, H, Dh), from query (N, H, Dh), key and value (N, Hkv, Dh)."""

        def picked(packed: Tensor, picks: Picks) -> Tensor:  # (blocks, heads, Q or K, Dh)
            return take_rows(packed, picks).unflatten(0, (len(blocks.queries), -1)).transpose(1, 2)

        out = []
        for blocks, visible in zip(self.blocks, self._visible(window), strict=True):
            keys, values = picked(key, blocks.key_picks), picked(value, blocks.key_picks)
            attended = masked_attention(picked(query, blocks.query_picks), keys, values, visible, scale, softcap)
            out.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(out).index_select(0, self._inverse)

    @property
    def blocks(self) -> list[Blocks]:
        if self._blocks is None:
            device = self.tokens.position.device
            buckets = like_sized(cut_into_blocks(self.lengths))
            self._blocks = [Blocks.of(*(part.to(device) for part in _padded(bucket))) for bucket in buckets]
            places, start = torch.empty(len(self.tokens.position), dtype=torch.int64, device="cpu"), 0
            for bucket in buckets:
                widest = max(len(queries) for queries, _ in bucket)
                for queries, _ in bucket:
                    places[queries] = torch.arange(start, start + len(queries), device="cpu")
                    start += widest
            self._inverse = places.to(device)
        return self._blocks

    def _visible(self, window: int) -> list[Tensor]:
        """Visibility masks, (blocks, 1, Q, K) for each of ``blocks``."""
        if window not in self.dense_masks:
            self.dense_masks[window] = [
                (self._sees(b.queries[:, :, None], b.keys[:, None, :], window) & b.filled[:, None, :])[:, None]
                for b in self.blocks
            ]
        return self.dense_masks[window]

    def _sees(self, queries: Tensor, keys: Tensor, window: int) -> Tensor:
        return sees(self.tokens.at(queries), self.tokens.at(keys), window or NO_WINDOW)

    # ---- flex

    def flex(self, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int) -> Tensor:
        """The same as ``dense``."""
        return packed_flex.attend(query, key, value, self.flex_mask(window), scale, softcap)

    def flex_mask(self, window: int) -> BlockMask:
        if window not in self.flex_masks:
            self.flex_masks[window] = packed_flex.block_mask(self.tokens, window)
        return self.flex_masks[window]


def cut_into_blocks(lengths: Sequence[tuple[int, Sequence[int]]]) -> list[tuple[list[int], list[int]]]:
    """Queries and keys, as packed indices, of blocks that together hold every token once as a query.

    A prompt is a block. Completions are collected in a block until they have half as many tokens as the prompt: the
    block computes their queries over the prompt and over each other, so at most half of the computed scores are masked
    out, while the keys of the prompt are copied twice per prompt length of queries.
    """
    blocks, start = [], 0
    for prompt, completions in lengths:
        keys = range(start, start + prompt)
        blocks.append((list(keys), list(keys)))
        start += prompt
        run: list[int] = []
        for place, length in enumerate(completions, start=1):
            run += range(start, start + length)
            start += length
            if run and (2 * len(run) >= prompt or place == len(completions)):
                blocks.append((run, [*keys, *run]))
                run = []
    return blocks


def like_sized(blocks: Sequence[tuple[list[int], list[int]]]) -> list[list[tuple[list[int], list[int]]]]:
    """Buckets of blocks that, padded to their largest, compute at most ``PADDED_WORK`` times the scores."""
    buckets: list[list[tuple[list[int], list[int]]]] = []
    work = widest = longest = 0
    for queries, keys in sorted(blocks, key=lambda block: (len(block[0]) == len(block[1]), -len(block[1]), block[0])):
        n, k = len(queries), len(keys)
        padded = (len(buckets[-1]) + 1) * max(widest, n) * max(longest, k) if buckets else 0
        if not buckets or padded > PADDED_WORK * (work + n * k):
            buckets.append([])
            work = widest = longest = 0
        buckets[-1].append((queries, keys))
        work, widest, longest = work + n * k, max(widest, n), max(longest, k)
    return buckets


def _padded(bucket: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    widest, longest = (max(len(block[side]) for block in bucket) for side in (0, 1))
    on_host = partial(torch.tensor, device="cpu")  # whatever the default device is
    queries = on_host([queries + queries[:1] * (widest - len(queries)) for queries, _ in bucket])
    keys = on_host([keys + keys[:1] * (longest - len(keys)) for _, keys in bucket])
    filled = torch.arange(longest, device="cpu") < on_host([len(keys) for _, keys in bucket])[:, None]
    return queries, keys, filled


# ---- the check of FlexAttention


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@cache
def check_flex(
    device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int, scale: float, softcap: float
) -> None:
    """Runs FlexAttention forward and backward on two small packs and compares it with the dense blocks.

    So a backward pass that does not compile is found before a training step depends on it; the second length makes
    torch compile for any length. The tensors saved for these backward passes are hidden from activation checkpointing,
    which would count them among the layer's own.

    Raises:
        RuntimeError: the results differ. Exceptions of the compiler are passed on.
    """
    for scaled in (1, 3):
        context = PackedContext([(100 * scaled, [60, 60]), (20, [7 * scaled])], device)
        generator = torch.Generator("cpu").manual_seed(0)
        shapes = [(len(context.tokens.position), n, dim) for n in (heads, kv_heads, kv_heads, heads)]
        *inputs, upstream = (
            torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes
        )
        inputs = [tensor.requires_grad_() for tensor in inputs]
        results = []
        with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
            for attend in (context.flex, context.dense):
                out = attend(inputs[0], inputs[1], inputs[2], scale, softcap, 0)
                results.append([out.detach(), *torch.autograd.grad(out, inputs, upstream)])
        for ours, dense in zip(*results, strict=True):
            error = float((ours.float() - dense.float()).norm() / dense.float().norm())
            if not error < 0.02:
                raise RuntimeError(f"FlexAttention's results are off by {error:.2g}")
