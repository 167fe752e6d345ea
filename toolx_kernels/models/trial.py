"""The trial of a small model: log-probs of three rows through our attention and head, compared with the model's own.

The rows are computed packed, as in training, and paged, as in rollouts: a prefill of all, then token by token, on a
cache like the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.errors import first_line
from toolx_kernels.models.bridge import AttentionContext, Unsupported, head_of, run_body, toolx_attention
from toolx_kernels.models.narrow import TOKEN_NAMES, parts_of
from toolx_kernels.models.shape import cache_shape
from toolx_kernels.ops.attention.packed import PackedContext
from toolx_kernels.ops.attention.paged import PagedContext
from toolx_kernels.reference import linear_logits

TOLERANCE = 1e-3  # of log-probs in fp32, times their spread if that is below 1
REACTION = 0.05  # smallest change of a log-prob when all tokens before it change, times the same spread

# Two prompts, the first with two completions: tokens of each.
PACKED = [(6, [7, 4]), (5, [4])]
DECODED = 2  # last tokens of each row, which are decoded one by one
PAGE_SIZE = 4


class Unmade(Exception):
    """Why a trial of a small model proves nothing: it does not run by itself or does not react to its input."""


@dataclass(slots=True)
class Recorded:
    """A context that records each call of attention: (layer, heads and dim of the key, heads and dim of the value)."""

    context: AttentionContext
    seen: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int
    ) -> Tensor:
        self.seen.append((layer, tuple(key.shape[1:]), tuple(value.shape[1:])))
        return self.context.attend(layer, query, key, value, scale, softcap, window)


def largest_difference(model: PreTrainedModel) -> float:
    """The largest difference of log-probs; ``model`` is in fp32 on a CPU.

    Raises:
        Unmade: the model cannot be run by itself, or hardly reacts to its input.
        Unsupported: its log-probs differ from ours, or we cannot run it.
    """
    ids = _tokens(model, sum(prompt + sum(completions) for prompt, completions in PACKED))
    positions, rows = _rows()
    try:
        with torch.no_grad():
            theirs = [own_logprobs(model, ids[row]) for row in rows]
            other = ids[rows[0]]
            other[:-1] = ids[1 - len(other) :]
            reaction = float((own_logprobs(model, other)[-1] - theirs[0][-1]).abs().max())
    except Exception as error:  # model code may raise anything
        raise Unmade(said(error)) from error
    spread = min(1.0, float(torch.cat(theirs).std()))
    if not reaction >= REACTION * spread:
        raise Unmade(f"its log-probs change by only {reaction:.2g} when all tokens before them change")
    try:
        alone = packed_logprobs(model, ids[rows[0]], torch.arange(len(rows[0])), [(len(rows[0]), [])])
        packed = packed_logprobs(model, ids, positions, PACKED)
        decoded = _decoded_logprobs(model, [ids[row] for row in rows])
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(f"our attention and head cannot serve it ({said(error)})") from error
    ours = {
        "a row alone": [alone],
        "rows packed together": [packed[row] for row in rows],
        "rows decoded together": decoded,
    }
    largest = 0.0
    for what, found in ours.items():
        difference = max(float((a - b).abs().max()) for a, b in zip(found, theirs, strict=False))
        if not difference <= TOLERANCE * spread:
            raise Unsupported(f"the log-probs of {what} differ by {difference:.2g} through our attention and head")
        largest = max(largest, difference)
    return largest


def own_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The model's own log-probs (T, V) of one row."""
    return model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)


def packed_logprobs(model: PreTrainedModel, ids: Tensor, positions: Tensor, lengths: Sequence) -> Tensor:
    """Log-probs (N, V) of packed rows, computed as in training; ``lengths`` as in ``PackedContext``.

    Raises:
        Unsupported: the keys and values of a layer do not fit the engine's cache.
    """
    context = Recorded(PackedContext(lengths, ids.device))
    with toolx_attention(model), torch.enable_grad():
        hidden = run_body(model, ids, positions, context).detach()
    layers, *each = cache_shape(model.get_decoder().config)
    if sorted(layer for layer, *_ in context.seen) != list(range(layers)):
        raise Unsupported(f"its {layers} layers do not call attention once each")
    for layer, key, value in context.seen:
        if not list(key) == list(value) == each:
            raise Unsupported(
                f"keys and values of layer {layer} are {key[0]} x {key[1]} and {value[0]} x {value[1]} (heads x "
                f"dimension), where the cache, as its config has it, is {each[0]} x {each[1]} for all"
            )
    return linear_logits(hidden, **head_of(model)).log_softmax(-1)


@torch.no_grad()
def _decoded_logprobs(model: PreTrainedModel, rows: Sequence[Tensor]) -> list[Tensor]:
    """Log-probs (T, V) of each row, computed as in rollouts."""
    layers, *each = cache_shape(model.get_decoder().config)
    lengths = torch.tensor([len(row) for row in rows])
    per_row = -(-int(lengths.max()) // PAGE_SIZE)
    pages = torch.randperm(len(rows) * per_row, generator=torch.Generator().manual_seed(2)).view(len(rows), per_row)
    caches = [torch.full((2, pages.numel(), PAGE_SIZE, *each), 9.0, dtype=torch.float32) for _ in range(layers)]
    parts: list[list[Tensor]] = [[] for _ in rows]
    done = torch.zeros_like(lengths)
    with toolx_attention(model):
        for until in (lengths - DECODED + step for step in range(DECODED + 1)):
            places = [torch.arange(int(a), int(b)) for a, b in zip(done, until, strict=True)]
            slots = [pages[row, at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE for row, at in enumerate(places)]
            context = PagedContext(
                [keys for keys, _ in caches],
                [values for _, values in caches],
                slots=torch.cat(slots),
                block_table=pages.int(),
                seq_lens=until.int(),
                cu_seqlens_q=torch.tensor([0, *(until - done).cumsum(0)], dtype=torch.int32),
                max_queries=int((until - done).max()),
            )
            ids = torch.cat([row[at] for row, at in zip(rows, places, strict=True)])
            hidden = run_body(model, ids, torch.cat(places), context)
            for part, new in zip(parts, hidden.split([len(at) for at in places]), strict=True):
                part.append(new)
            done = until
    return [linear_logits(torch.cat(part), **head_of(model)).log_softmax(-1) for part in parts]


def _rows() -> tuple[Tensor, list[Tensor]]:
    """The position of each token in ``PACKED``, and the packed indices of each row, those of its prompt first."""
    positions: list[int] = []
    rows, start = [], 0
    for prompt, completions in PACKED:
        of_prompt = range(start, start + prompt)
        positions += range(prompt)
        start += prompt
        for length in completions:
            positions += range(prompt, prompt + length)
            rows.append(torch.tensor([*of_prompt, *range(start, start + length)]))
            start += length
    return torch.tensor(positions), rows


def _tokens(model: PreTrainedModel, count: int) -> Tensor:
    """Random ids, without special tokens."""
    special = {
        token
        for config in parts_of(model.config)
        for name, value in vars(config).items()
        if name.endswith(TOKEN_NAMES)
        for token in (value if isinstance(value, list) else [value])
    }
    ordinary = torch.tensor([token for token in range(1, len(head_of(model)["weight"])) if token not in special])
    return ordinary[torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(1))]


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"
