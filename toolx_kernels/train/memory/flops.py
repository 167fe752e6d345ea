"""FLOPs of a step, and what a plain GEMM reaches per second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from toolx_kernels.errors import MEMORY_ERRORS, out_of_memory
from toolx_kernels.models.adapters import LINEAR
from toolx_kernels.models.shape import cache_shape
from toolx_kernels.train.groups import ScoredGroup

SIDE = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied


class Flops:
    """Counts necessary multiplications, without what is computed again: 2 per weight and token in a forward pass and 4
    per visible pair of tokens and element of a query; twice of both in a backward pass, but once per frozen weight; one
    more forward pass for a reference model."""

    def __init__(self, model: PreTrainedModel):
        decoder = model.get_decoder()
        linear = [m.weight for m in decoder.modules() if isinstance(m, LINEAR)]
        head = model.get_output_embeddings().weight
        layers, _, head_dim = cache_shape(decoder.config)
        self._linear, self._trained_linear = _elements(linear)
        self._head, self._trained_head = _elements([head])
        self._pair = 4 * layers * decoder.config.num_attention_heads * head_dim

    def sampled(self, groups: Sequence[ScoredGroup]) -> int:
        """Sampling the groups' rollouts: one forward pass."""
        return sum(
            2 * self._linear * count.tokens + 2 * self._head * count.targets + self._pair * count.pairs
            for count in map(_counts, groups)
        )

    def trained(self, groups: Sequence[ScoredGroup], updates: int, *, reference: bool) -> int:
        """``updates`` forwards and backwards of packed groups, and one forward of a reference model."""
        update = sum(
            2 * (2 * self._linear + self._trained_linear) * count.tokens
            + 2 * (2 * self._head + self._trained_head) * count.targets
            + 3 * self._pair * count.pairs
            for count in map(_counts, groups)
        )
        return updates * update + self.sampled(groups) * reference


def _elements(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Elements of all weights, and of those that are trained."""
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


class Counts(NamedTuple):
    """Of a group, whose prompt counts once."""

    tokens: int  # that pass through the decoder
    targets: int
    pairs: int  # of tokens of which one sees the other


def _counts(group: ScoredGroup) -> Counts:
    prompt, lengths = len(group.prompt), [len(rollout.ids) for rollout in group.rollouts]
    pairs = prompt * (prompt + 1) // 2 + sum((n - 1) * prompt + n * (n - 1) // 2 for n in lengths)
    return Counts(prompt + sum(length - 1 for length in lengths), sum(lengths), pairs)


@torch.no_grad()
def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a square GEMM, the best of three; 0 without memory for its matrices. Takes some hundredths of
    a second."""
    side, seconds = SIDE[device.type], []
    try:
        left, right, product = torch.ones(3, side, side, device=device, dtype=dtype)
        for _ in range(4):  # the first one warms up
            started = time.perf_counter()
            torch.mm(left, right, out=product)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        return 0.0
    return 2 * side**3 / min(seconds[1:])
