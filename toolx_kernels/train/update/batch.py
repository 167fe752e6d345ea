"""Batches packed from groups: one sequence with each prompt once, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolx_kernels.models.bridge import run_body
from toolx_kernels.ops.attention.packed import PackedContext
from toolx_kernels.ops.picks import Picks, take_rows


@dataclass(frozen=True, slots=True)
class PackedGroup:
    """A prompt and its completions as token ids, e.g. ``PackedGroup((1, 7), ((5, 2), (9, 2)))``.

    All other fields have one entry per completion, or are empty.

    masks        True for each target token, or None if all are targets; the others (tool outputs) are only context for
                 later tokens
    advantages   one number, or one per token
    *_logprobs   one number per token: of the policy that ratios start from, of the reference model, of the sampler
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    masks: Sequence[Sequence[bool] | None] = ()
    advantages: Sequence[float | Sequence[float]] = ()
    old_logprobs: Sequence[Tensor | None] = ()
    ref_logprobs: Sequence[Tensor | None] = ()
    sampler_logprobs: Sequence[Sequence[float]] = ()

    def part(self, completions: slice) -> PackedGroup:
        """Returns the prompt with some of its completions."""
        return PackedGroup(self.prompt, *(getattr(self, field.name)[completions] for field in fields(self)[1:]))

    @property
    def n_tokens(self) -> int:
        """Number of tokens that pass through the model; a completion's last token does not, as it predicts nothing."""
        return len(self.prompt) + sum(len(ids) - 1 for ids in self.completions)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Groups laid end to end. Two groups ``([1, 7], [[5, 2]])`` and ``([3], [[4, 6, 2], [8]])`` pack to

    input_ids    1 7 5 | 3 4 6        the prompt once, then each completion without its last token
    positions    0 1 2 | 0 1 2        every completion continues from the prompt's last position
    source       1 2   | 3 4 5  3     index of the packed token whose hidden state predicts each of the N targets
    targets      5 2   | 4 6 2  8
    cu_seqlens   0 2 5 6
    mask         None: all targets count

    Advantages and log-probs are None unless every completion has them.
    """

    input_ids: Tensor  # (packed) int64
    context: PackedContext
    source: Tensor  # (N) int64, indexes the packed tokens
    targets: Tensor  # (N) int64
    cu_seqlens: Tensor  # (B + 1) int32
    mask: Tensor | None = None  # (N) bool: the targets that enter the loss
    advantages: Tensor | None = None  # (B), or (N) if some completion has one per token
    old_logprobs: Tensor | None = None  # (N)
    ref_logprobs: Tensor | None = None  # (N)
    sampler_logprobs: Tensor | None = None  # (N)

    def hidden(self, model: PreTrainedModel) -> Tensor:
        """Returns (N, D), the hidden states that predict ``targets``. Call it inside ``toolx_attention(model)``."""
        packed = run_body(model, self.input_ids, self.context.tokens.position, self.context)
        return take_rows(packed, Picks(self.source))


def pack(
    groups: Sequence[PackedGroup], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> PackedBatch:
    """Packs all groups into one batch, with advantages and log-probs in ``dtype``; completions keep their order, group
    by group."""

    def end_to_end(tensors: Sequence[Tensor | None]) -> Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given).to(device, dtype) if given and len(given) == len(tensors) else None

    def of_numbers(numbers: list[float]) -> Tensor | None:
        return torch.tensor(numbers, device=device, dtype=dtype) if numbers else None

    ids: list[int] = []
    source: list[int] = []
    targets: list[int] = []
    mask: list[bool] = []
    bounds, lengths = [0], []
    for group in groups:
        masks = group.masks or [None] * len(group.completions)
        ids += group.prompt
        last_of_prompt = len(ids) - 1
        for completion, counts in zip(group.completions, masks, strict=True):
            inner = completion[:-1]
            source += [last_of_prompt, *range(len(ids), len(ids) + len(inner))]
            ids += inner
            targets += completion
            mask += [True] * len(completion) if counts is None else counts
            bounds.append(len(targets))
        lengths.append((len(group.prompt), [len(completion) - 1 for completion in group.completions]))
    return PackedBatch(
        torch.tensor(ids, device=device),
        PackedContext(lengths, device),
        torch.tensor(source, device=device),
        torch.tensor(targets, device=device),
        torch.tensor(bounds, dtype=torch.int32, device=device),
        None if all(mask) else torch.tensor(mask, device=device),
        of_numbers(_advantages(groups)),
        end_to_end([logprobs for group in groups for logprobs in group.old_logprobs]),
        end_to_end([logprobs for group in groups for logprobs in group.ref_logprobs]),
        of_numbers([logp for group in groups for logprobs in group.sampler_logprobs for logp in logprobs]),
    )


def _advantages(groups: Sequence[PackedGroup]) -> list[float]:
    """Returns one advantage per completion, or one per token if some completion has one per token; then a single
    number applies to all tokens of its completion."""
    given = [advantage for group in groups for advantage in group.advantages]
    numbers = [advantage for advantage in given if not isinstance(advantage, Sequence)]
    if len(numbers) == len(given):
        return numbers
    completions = [ids for group in groups if group.advantages for ids in group.completions]
    return [
        number
        for advantage, ids in zip(given, completions, strict=True)
        for number in (advantage if isinstance(advantage, Sequence) else [advantage] * len(ids))
    ]


def micro_batches(groups: Sequence[PackedGroup], token_budget: int) -> list[list[PackedGroup]]:
    """Cuts the groups, in their order, into micro-batches of at most ``token_budget`` tokens.

    A group that fits into one micro-batch is never cut. A larger one is cut into as few runs of completions as
    possible, each after a copy of the prompt; other groups may share the micro-batches of its first and last run. A
    completion that exceeds the budget together with its prompt gets its own micro-batch.
    """
    batches: list[list[PackedGroup]] = []
    room = 0

    def add(part: PackedGroup, tokens: int) -> None:
        nonlocal room
        if not batches or tokens > room:
            batches.append([])
            room = token_budget
        batches[-1].append(part)
        room -= tokens

    for group in groups:
        start, tokens = 0, len(group.prompt)
        for place, completion in enumerate(group.completions):
            more = len(completion) - 1
            if place > start and tokens + more > token_budget:
                add(group.part(slice(start, place)), tokens)
                start, tokens = place, len(group.prompt)
            tokens += more
        add(group.part(slice(start, len(group.completions))), tokens)
    return batches


def tokens_of(groups: Sequence[PackedGroup]) -> int:
    """Number of tokens that pass through the model; each prompt counts once."""
    return sum(group.n_tokens for group in groups)
