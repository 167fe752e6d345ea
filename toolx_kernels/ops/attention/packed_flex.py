"""Packed attention by FlexAttention: conditions for its use, the compiled kernel, the block mask."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from toolx_kernels.errors import first_line
from toolx_kernels.ops.attention.visibility import NO_WINDOW, Tokens, sees

BLOCK = 128  # tokens in each direction of a block that FlexAttention computes or skips
LEAST_TOKENS = 2 * BLOCK  # of a pack; in a smaller one, skipped blocks do not repay the compilation
LEAST_DIM = 16  # of a head; FlexAttention has no kernel for smaller ones
MASK_ENTRIES = 2**24  # of the dense mask, in memory at a time while the block mask is made from it

_gone = False  # True for the rest of the process once FlexAttention has failed


def applies(query: Tensor) -> bool:
    n_tokens, _, dim = query.shape
    fits = query.dtype != torch.float64 and n_tokens >= LEAST_TOKENS and dim >= LEAST_DIM
    return query.is_cuda and fits and not _gone


def give_up(error: Exception) -> None:
    global _gone
    _gone = True
    warnings.warn(
        f"Attention of packed completions computes dense blocks from now on, which is slower: {first_line(error)}",
        stacklevel=2,
    )


def attend(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float, softcap: float) -> Tensor:
    """Attention, (N, H, Dh), from query (N, H, Dh), key and value (N, Hkv, Dh)."""
    length = mask.seq_lengths[0]

    def padded(packed: Tensor) -> Tensor:  # (1, heads, length, Dh)
        return F.pad(packed, (0, 0, 0, 0, 0, length - len(packed))).transpose(0, 1)[None]

    score_mod = _score_cap(softcap, query.device) if softcap else None
    out = kernel(padded(query), padded(key), padded(value), score_mod, mask, scale, enable_gqa=True)
    return out[0].transpose(0, 1)[: len(query)]


def kernel(*arguments: Any, **options: Any) -> Tensor:
    """FlexAttention, compiled. The uncompiled function is its definition and computes all scores."""
    # A float that differs between two models would otherwise become dynamic, which no kernel accepts; and some versions
    # compile lengths in. Beyond the limit torch raises, because of fullgraph.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        return _compiled()(*arguments, **options)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, fullgraph=True)


def _score_cap(softcap: float, device: torch.device) -> Callable:
    bound = torch.tensor(softcap, device=device)  # a float would be compiled in

    def score_mod(score, _batch, _head, _query, _key):
        return bound * torch.tanh(score / bound)

    return score_mod


def padded_length(n_tokens: int) -> int:
    """Tokens to which a pack is padded for FlexAttention: 1 or 1.5 times a power of two, in whole blocks.

    So there are few lengths, in case each is compiled; nothing is computed for blocks of padding.
    """
    power = max(BLOCK, 1 << (n_tokens - 1).bit_length())
    between = power // 4 * 3
    return between if n_tokens <= between and between % BLOCK == 0 else power


def block_mask(tokens: Tokens, window: int) -> BlockMask:
    """``sees`` in FlexAttention's form: for each block of queries, the blocks of keys that it sees in part and those
    that it sees in full. Padding sees nothing, and nothing sees it.

    torch's ``create_block_mask`` computes the same from whole (N, N) masks, of which it holds several in memory.
    """
    n_tokens, device = len(tokens.position), tokens.position.device
    length = padded_length(n_tokens)
    padded = Tokens(*(F.pad(column, (0, length - n_tokens), value=-1).int() for column in tokens))
    segment, prompt, position = padded
    reach = torch.tensor(window or NO_WINDOW, dtype=torch.int32, device=device)  # an int would be compiled in

    def mask_mod(_batch, _head, query, key):
        queries = Tokens(segment[query], prompt[query], position[query])
        keys = Tokens(segment[key], prompt[key], position[key])
        return sees(queries, keys, reach) & (segment[query] >= 0)

    everything, counts = torch.arange(length, device=device), []
    for queries in everything.split(max(1, MASK_ENTRIES // (length * BLOCK)) * BLOCK):
        visible = mask_mod(None, None, queries[:, None], everything)
        counts.append(visible.view(-1, BLOCK, length // BLOCK, BLOCK).sum((1, 3)))
    pairs = torch.cat(counts)[None, None]  # (1, 1, blocks of queries, blocks of keys)
    full = pairs == BLOCK**2
    return BlockMask.from_kv_blocks(
        *_in_front((pairs > 0) & ~full),
        *_in_front(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _in_front(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of True blocks in each row, and the indices of all its blocks with these first, both int32."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()
