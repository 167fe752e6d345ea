"""How much of a device's arithmetic a step uses: its floating-point operations, beside what a bare GEMM achieves."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from toolx_kernels.ops.hf_attention import cache_shape
from toolx_kernels.train.rollouts import ScoredGroup

SIDE = {"cpu": 1024, "cuda": 4096}  # of the square matrices that are multiplied


class Flops:
    """Counts what has to be multiplied, whatever is computed twice: 2 a weight and token in a forward pass, 4 a visible
    pair of tokens and element of a query, and twice of both in a backward pass; of frozen weights once."""

    def __init__(self, model: PreTrainedModel):
        decoder = model.get_decoder()
        linear = [m.weight for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        head = model.get_output_embeddings().weight
        layers, _, head_dim = cache_shape(decoder.config)
        self._linear, self._head = sum(w.numel() for w in linear), head.numel()
        self._pair = 4 * layers * decoder.config.num_attention_heads * head_dim
        self._passes = 3 if any(w.requires_grad for w in linear) else 2

    def trained(self, groups: Sequence[ScoredGroup]) -> int:
        """Forward and backward of packed groups."""
        return self._passes * self.sampled(groups)

    def sampled(self, groups: Sequence[ScoredGroup]) -> int:
        """Sampling the groups' rollouts."""
        return sum(self._forward(len(g.prompt), [len(rollout.ids) for rollout in g.rollouts]) for g in groups)

    def _forward(self, prompt: int, completions: Sequence[int]) -> int:
        tokens = prompt + sum(length - 1 for length in completions)
        pairs = prompt * (prompt + 1) // 2 + sum((n - 1) * prompt + n * (n - 1) // 2 for n in completions)
        return 2 * self._linear * tokens + 2 * self._head * sum(completions) + self._pair * pairs


@torch.no_grad()
def gemm_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square GEMM, the best of three: some hundredths of a second."""
    side = SIDE[device.type]
    left, right = torch.ones(side, side, device=device, dtype=dtype), torch.ones(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        started = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    del product
    return 2 * side**3 / min(seconds[1:])
