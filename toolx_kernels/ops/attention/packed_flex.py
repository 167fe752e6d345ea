"""Packed attention by FlexAttention."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from toolx_kernels.errors import first_line
from toolx_kernels.ops.attention.visibility import NO_WINDOW, Tokens, sees

FLEX_BLOCK = 128  # tokens in each direction of a block that FlexAttention computes or leaves out


FLEX_LEAST_TOKENS = 2 * FLEX_BLOCK  # of a pack; in fewer there is no block to leave out that is worth a compilation
FLEX_LEAST_DIM = 16  # of a head, below which FlexAttention has no kernel


MASK_ENTRIES = 2**24  # of the dense mask that are alive at a time while the block mask is made from it


def padded_length(n_tokens: int) -> int:
    """Tokens to which a pack is padded for FlexAttention: 1 or 1.5 times a power of two, in whole blocks.

    So there are few lengths, should each be compiled; nothing is computed for blocks of padding.
    """
    power = max(FLEX_BLOCK, 1 << (n_tokens - 1).bit_length())
    between = power // 4 * 3
    return between if n_tokens <= between and between % FLEX_BLOCK == 0 else power


def block_mask(tokens: Tokens, window: int) -> BlockMask:
    """``sees`` as FlexAttention takes it: for each block of queries those blocks of keys that it sees a part of, and
    those that it sees in full. Padding sees nothing, and nothing sees it.

    torch's ``create_block_mask`` computes the same from an (N, N) mask that is alive as a whole, several times over.
    """
    n_tokens, device = len(tokens.position), tokens.position.device
    length = padded_length(n_tokens)
    padded = Tokens(*(F.pad(column, (0, length - n_tokens), value=-1).int() for column in tokens))
    segment, prompt, position = padded
    reach = torch.tensor(window or NO_WINDOW, dtype=torch.int32, device=device)  # a number would be compiled in

    def mask_mod(_batch, _head, query, key):
        queries = Tokens(segment[query], prompt[query], position[query])
        keys = Tokens(segment[key], prompt[key], position[key])
        return sees(queries, keys, reach) & (segment[query] >= 0)

    everything, counts = torch.arange(length, device=device), []
    for queries in everything.split(max(1, MASK_ENTRIES // (length * FLEX_BLOCK)) * FLEX_BLOCK):
        visible = mask_mod(None, None, queries[:, None], everything)
        counts.append(visible.view(-1, FLEX_BLOCK, length // FLEX_BLOCK, FLEX_BLOCK).sum((1, 3)))
    pairs = torch.cat(counts)[None, None]  # (1, 1, blocks of queries, blocks of keys)
    full = pairs == FLEX_BLOCK**2
    return BlockMask.from_kv_blocks(
        *_in_front((pairs > 0) & ~full),
        *_in_front(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _in_front(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and their indices in front of the others', both int32."""
    return blocks.sum(-1).int(), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def score_cap(softcap: float, device: torch.device) -> Callable:
    bound = torch.tensor(softcap, device=device)  # a number would be compiled in

    def score_mod(score, _batch, _head, _query, _key):
        return bound * torch.tanh(score / bound)

    return score_mod


_gone = False  # for the rest of the process, once it has failed


def kernel() -> Callable:
    """FlexAttention, compiled. Uncompiled it is the definition, and computes all scores."""
    return _compiled_flex


@cache
def _compile() -> Callable:
    return torch.compile(flex_attention, fullgraph=True)


def _compiled_flex(*arguments, **options) -> Tensor:
    # A float that differs between two models would otherwise become a dynamic one, which no kernel takes; and lengths
    # are compiled in by some versions. Beyond the limit torch raises, because of fullgraph.
    with torch._dynamo.config.patch(specialize_float=True, recompile_limit=64):
        return _compile()(*arguments, **options)


def applies(query: Tensor) -> bool:
    n_tokens, _, dim = query.shape
    fits = query.dtype != torch.float64 and n_tokens >= FLEX_LEAST_TOKENS and dim >= FLEX_LEAST_DIM
    return query.is_cuda and fits and not _gone


def give_up(error: Exception) -> None:
    global _gone
    _gone = True
    warnings.warn(
        f"Attention of packed completions computes dense blocks from here on, which is slower: {first_line(error)}",
        stacklevel=2,
    )
