"""Sampling the next token from hidden states and the LM head, with what the loss later needs to know of it."""

from __future__ import annotations

import torch
from torch import Tensor

from toolx_kernels import _library, reference
from toolx_kernels.reference import Sample, compute_dtype


def sample(
    hidden: Tensor,  # (R, D)
    weight: Tensor,  # (V, D)
    streams: Tensor,  # (R, 5) int64: seed, step, row id, rollout index, position
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    bias: Tensor | None = None,  # (V)
    softcap: float | None = None,
) -> Sample:
    """One token per row, its log-prob, lse, entropy and the probability mass that the filters kept.

    Randomness is counter-based (``reference.gumbel_noise``): a token is a function of its stream and its
    distribution alone, whatever else is in the batch. Temperature 0 is greedy.
    """
    outputs = torch.ops.toolx.sample(hidden, weight, streams, temperature, top_k, top_p, min_p, bias, softcap or 0.0)
    return Sample(*outputs)


def _default(*arguments) -> tuple[Tensor, ...]:
    return tuple(reference.sample(*arguments))


def _fake(hidden, weight, streams, *_):
    stats = [hidden.new_empty(hidden.shape[:1], dtype=compute_dtype(hidden)) for _ in range(4)]
    return streams.new_empty(hidden.shape[:1]), *stats


_library.define(
    "sample(Tensor hidden, Tensor weight, Tensor streams, float temperature, int top_k, float top_p, float min_p, "
    "Tensor? bias, float softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_default,
    fake=_fake,
)
