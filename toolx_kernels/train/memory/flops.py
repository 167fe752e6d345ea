"""How much of a device's arithmetic a step uses: its floating-point operations, beside what a bare GEMM achieves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from toolx_kernels.errors import MEMORY_ERRORS, out_of_memory
from toolx_kernels.models.bridge import cache_shape
from toolx_kernels.train.groups import ScoredGroup

SIDE = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied


class Flops:
    """Counts what has to be multiplied, whatever is computed twice: 2 a weight and token in a forward pass, 4 a visible
    pair of tokens and element of a query, and twice of both in a backward pass, once of a frozen weight; a reference
    model's forward is one more."""

    def __init__(self, model: PreTrainedModel):
        decoder = model.get_decoder()
        linear = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        head = model.get_output_embeddings().weight
        layers, _, head_dim = cache_shape(decoder.config)
        self._linear, self._trained_linear = _elements(linear)
        self._head, self._trained_head = _elements([head])
        self._pair = 4 * layers * decoder.config.num_attention_heads * head_dim

    def sampled(self, groups: Sequence[ScoredGroup]) -> int:
        """Sampling the groups' rollouts: one forward pass."""
        total = 0
        for group in groups:
            tokens, targets, pairs = _counts(group)
            total += 2 * self._linear * tokens + 2 * self._head * targets + self._pair * pairs
        return total

    def trained(self, groups: Sequence[ScoredGroup], updates: int, *, reference: bool) -> int:
        """``updates`` forwards and backwards of packed groups, and one forward of a reference model."""
        total = 0
        for group in groups:
            tokens, targets, pairs = _counts(group)
            total += 2 * (2 * self._linear + self._trained_linear) * tokens
            total += 2 * (2 * self._head + self._trained_head) * targets + 3 * self._pair * pairs
        return updates * total + self.sampled(groups) * reference


def _elements(weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Of all of them, and of those that are trained."""
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


def _counts(group: ScoredGroup) -> tuple[int, int, int]:
    """Tokens that pass through the decoder, targets, and pairs of tokens that see each other; the prompt once."""
    prompt, lengths = len(group.prompt), [len(rollout.ids) for rollout in group.rollouts]
    pairs = prompt * (prompt + 1) // 2 + sum((n - 1) * prompt + n * (n - 1) // 2 for n in lengths)
    return prompt + sum(length - 1 for length in lengths), sum(lengths), pairs


@torch.no_grad()
def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square GEMM, the best of three: some hundredths of a second.

    0 where there is no memory for its matrices.
    """
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
