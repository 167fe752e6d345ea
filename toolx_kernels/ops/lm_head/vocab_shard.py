"""A head whose vocabulary is cut over several ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's rows ``start : start + V`` of a head whose vocabulary is cut over several ranks.

    Every rank passes the same hidden states, targets and per-token vectors, and its own rows of the weight (and
    of the bias). All results, the gradient of hidden included, are those of the whole vocabulary on every
    rank; the gradient of the weight is that of this rank's rows.

    start: the token id of this rank's first row.
    vocab_size: of the whole vocabulary.
    all_reduce: ``(tensor, "sum" | "max")`` over the ranks, returning the result or, like ``torch.distributed``, None
        when the tensor itself now holds it; called equally often, in the same order and with the same shapes on every
        rank: ``lambda t, op: dist.all_reduce(t, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)``.

    Make one per process and keep it: the operators know a shard by its number.
    """

    start: int
    vocab_size: int
    all_reduce: Callable[[Tensor, str], Tensor]
    key: int = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "key", len(_shards))
        _shards.append(self)


_shards: list[VocabShard] = []  # an operator's schema cannot hold a function: it holds the shard's place in this list


def reducer(shard: int) -> Callable[[Tensor, str], Tensor]:
    """How sums over the vocabulary become those of the whole vocabulary; ``shard`` is -1 where the weight holds it."""
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
