"""Packing groups of completions into one sequence, each prompt once, and running the model over it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.ops.hf_attention import PackedContext, run_body


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A prompt with the completions that follow it, as token ids, e.g. ``PackedGroup((1, 7), ((5, 2), (9, 2)))``.

    ``masks`` has one entry per completion: True for each token that counts, or None where all of them do. The others,
    of tool outputs, are context for what comes after them and no targets.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool] | None] | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that pass through the model: the last one of a completion predicts nothing that is trained."""
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.completions)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Groups laid end to end. Two groups ``([1, 7], [[5, 2]])`` and ``([3], [[4, 6, 2], [8]])`` pack to

    input_ids    1 7 5 | 3 4 6        the prompt once, then each completion without its last token
    position_ids 0 1 2 | 0 1 2        restarting behind the prompt for every completion
    source       1 2   | 3 4 5  3     whose hidden state predicts the N completion tokens
    targets      5 2   | 4 6 2  8
    cu_seqlens   0 2 5 6
    mask         None: all targets count
    """

    input_ids: Tensor  # (packed) int64
    position_ids: Tensor  # (packed) int64
    context: PackedContext
    source: Tensor  # (N) int64, indexes the packed tokens
    targets: Tensor  # (N) int64
    cu_seqlens: Tensor  # (B + 1) int32
    mask: Tensor | None = None  # (N) bool: the targets that the loss takes in

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """(N, D): the hidden states that predict ``targets``, inside ``toolx_attention(model)``."""
        return run_body(model, self.input_ids, self.position_ids, self.context).index_select(0, self.source)


def pack(groups: Sequence[PackedGroup], device: torch.device | str = "cpu") -> PackedBatch:
    """One batch of all groups; completions keep their order, group by group."""
    ids, positions, segments, source, targets, mask, bounds = [], [], [], [], [], [], [0]
    starts = [0]
    for group in groups:
        masks = group.masks or [None] * len(group.completions)
        last_of_prompt = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        positions += range(len(group.prompt))
        segments += [0] * len(group.prompt)
        for k, (completion, counts) in enumerate(zip(group.completions, masks, strict=True), start=1):
            inner = len(completion) - 1
            source += [last_of_prompt, *range(len(ids), len(ids) + inner)]
            ids += completion[:-1]
            positions += range(len(group.prompt), len(group.prompt) + inner)
            segments += [k] * inner
            targets += completion
            mask += [True] * len(completion) if counts is None else counts
            bounds.append(len(targets))
        starts.append(len(ids))

    starts = torch.tensor(starts)
    lengths = starts.diff()
    place = torch.arange(int(lengths.max()))
    filled = place < lengths[:, None]
    index = torch.where(filled, starts[:-1, None] + place, 0)
    positions, segments = torch.tensor(positions), torch.tensor(segments)
    context = PackedContext(
        index=index.to(device),
        inverse=filled.flatten().nonzero().squeeze(1).to(device),
        segments=torch.where(filled, segments[index], -1).to(device),
        positions=torch.where(filled, positions[index], 0).to(device),
    )
    return PackedBatch(
        torch.tensor(ids, device=device),
        positions.to(device),
        context,
        torch.tensor(source, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        None if all(mask) else torch.tensor(mask, device=device),
    )


def micro_batches(groups: Sequence[PackedGroup], token_budget: int) -> Iterator[list[int]]:
    """Indices of consecutive groups that together hold at most ``token_budget`` tokens; a larger group goes alone."""
    batch, tokens = [], 0
    for index, group in enumerate(groups):
        if batch and tokens + group.n_tokens > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += group.n_tokens
    if batch:
        yield batch
