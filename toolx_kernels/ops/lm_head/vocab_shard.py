"""VocabShard: a rank's part of a head whose vocabulary is split over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's rows ``start : start + V`` of a head whose vocabulary is split over several ranks.

    Every rank passes the same hidden states, targets and per-token vectors, and its own rows of the weight (and
    of the bias). On every rank all results, including the gradient of hidden, are those of the whole vocabulary; the
    gradients of weight and bias are those of this rank's rows.

    start: the token id of this rank's first row.
    vocab_size: of the whole vocabulary.
    all_reduce: ``(tensor, "sum" | "max")`` over the ranks, which returns the result or, like ``torch.distributed``,
        None if it reduced in place; called equally often, in the same order and with the same shapes on every rank:
        ``lambda t, op: dist.all_reduce(t, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)``.

    Make one per process and reuse it: operators refer to a shard by its number.
    """

    start: int
    vocab_size: int
    all_reduce: Callable[[Tensor, str], Tensor]
    key: int = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "key", len(_shards))
        _shards.append(self)


_shards: list[VocabShard] = []  # an operator's schema cannot hold a function: it holds the shard's index in this list


def reducer(shard: int) -> Callable[[Tensor, str], Tensor]:
    """The reduction of sums to the whole vocabulary; ``shard`` is -1 if the weight already holds all of it."""
    if shard < 0:
        return lambda tensor, op: tensor

    def all_reduce(tensor: Tensor, op: str) -> Tensor:
        result = _shards[shard].all_reduce(tensor, op)
        return tensor if result is None else result  # torch.distributed reduces in place and returns None

    return all_reduce


def start_of(shard: int) -> int:
    return 0 if shard < 0 else _shards[shard].start


def vocab_size_of(weight: Tensor, shard: int) -> int:
    return len(weight) if shard < 0 else _shards[shard].vocab_size
