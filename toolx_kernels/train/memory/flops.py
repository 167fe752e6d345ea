"""FLOPs of a step, and the speed of a plain GEMM to compare them with."""

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

SIDE = {"cpu": 1024, "cuda": 4096}  # of the square matrices in the GEMM


class Flops:
    """Counts the FLOPs that a step needs, without recomputation. A forward pass takes 2 per weight and token, and 4 per
    visible token pair and query element. A backward pass takes twice as many, but only once per frozen weight. A
    reference model adds one forward pass."""

    def __init__(self, model: PreTrainedModel):
        decoder = model.get_decoder()
        linear = [m.weight for m in decoder.modules() if isinstance(m, LINEAR)]
        head = model.get_output_embeddings().weight
        layers, _, head_dim = cache_shape(decoder.config)
        self._linear, self._trained_linear = _elements(linear)
        self._head, self._trained_head = _elements([head])
        self._pair = 4 * layers * decoder.config.num_attention_heads * head_dim

    def sampled(self, groups: Sequence[ScoredGroup]) -> int:
        """FLOPs of sampling the groups' rollouts: one forward pass."""
        return sum(
            2 * self._linear * count.tokens + 2 * self._head * count.targets + self._pair * count.pairs
            for count in map(_counts, groups)
        )

    def trained(self, groups: Sequence[ScoredGroup], updates: int, *, reference: bool) -> int:
        """FLOPs of ``updates`` forwards and backwards of packed groups, and one forward of a reference model."""
        update = sum(
            2 * (2 * self._linear + self._trained_linear) * count.tokens
            + 2 * (2 * self._head + self._trained_head) * count.targets
            + 3 * self._pair * count.pairs
            for count in map(_counts, groups)
        )
        return updates * update + self.sampled(groups) * reference


def _elements(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Returns the number of elements of all weights and of the trained ones."""
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


class Counts(NamedTuple):
    """Token counts of a group; its prompt counts once."""

    tokens: int  # that pass through the decoder
    targets: int
    pairs: int  # of tokens where one sees the other


def _counts(group: ScoredGroup) -> Counts:
    prompt, lengths = len(group.prompt), [len(rollout.ids) for rollout in group.rollouts]
    pairs = prompt * (prompt + 1) // 2 + sum((n - 1) * prompt + n * (n - 1) // 2 for n in lengths)
    return Counts(prompt + sum(length - 1 for length in lengths), sum(lengths), pairs)


@torch.no_grad()
def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOPs per second of a square GEMM, best of three; 0 if its matrices do not fit in memory. Takes some
    hundredths of a second."""
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
