"""The LM head as the loss sees it: which logits there are, and what is alive at a time while they are swept.

    z = softcap(h W^T + u B^T + bias) / T        u = scaling * h A^T, the LoRA adapter's features

Everything that reads or checks the head's inputs is here; the sweeps themselves are in ``sweep_torch`` and
``sweep_triton``.
"""

from __future__ import annotations

from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.ops.lm_head.vocab_shard import start_of
from toolx_kernels.reference import compute_dtype


def pick(tensor: Tensor | None, index: slice | Tensor) -> Tensor | None:
    """Those rows of a tensor that may be absent."""
    return None if tensor is None else tensor[index]


class Head(NamedTuple):
    """The arguments of a sweep. All per-row tensors have the N rows of ``hidden``."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N) int64, ids in the whole vocabulary
    scale: Tensor  # (N) 1 / temperature, in compute_dtype
    bias: Tensor | None = None  # (V)
    features: Tensor | None = None  # (N, R) what the adapter makes of hidden, in compute_dtype
    lora_b: Tensor | None = None  # (V, R)
    softcap: float = 0.0
    start: int = 0  # token id of the first row of weight

    @property
    def dtype(self) -> torch.dtype:
        """In which logits and sums are held: fp32, or float64 for float64 inputs."""
        return compute_dtype(self.hidden)

    @property
    def weight_dtype(self) -> torch.dtype:
        """In which hidden and weight meet, should their dtypes differ."""
        return torch.promote_types(self.hidden.dtype, self.weight.dtype)

    def rows(self, index: slice | Tensor) -> Head:
        return self._replace(
            hidden=self.hidden[index], targets=self.targets[index], scale=self.scale[index],
            features=pick(self.features, index),
        )  # fmt: skip

    def columns(self, index: slice) -> Head:
        return self._replace(
            weight=self.weight[index],
            bias=pick(self.bias, index),
            lora_b=pick(self.lora_b, index),
            start=self.start + index.start,
        )

    def targets_inside(self) -> tuple[Tensor, Tensor]:
        """(N) bool: the target is one of these rows of weight; (N) int64: its row, clamped to them."""
        local = self.targets - self.start
        return (local >= 0) & (local < len(self.weight)), local.clamp(0, len(self.weight) - 1)


def make_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: Tensor, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, lora_scaling: float, softcap: float, shard: int,
) -> Head:  # fmt: skip
    """From the arguments of the operators, in their order."""
    dtype, features = compute_dtype(hidden), None
    if lora_a is not None:
        features = torch.cat([x.to(dtype) @ lora_a.to(dtype).T for x in hidden.split(4096)]) * lora_scaling
    return Head(
        hidden, weight, targets.contiguous(), temperature.to(dtype).reciprocal(),
        None if bias is None else bias.contiguous(), features, lora_b, softcap, start_of(shard),
    )  # fmt: skip


def blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def as_given(function):
    """Runs in the tensors' own precision (autocast would make some reductions bf16) and on their own device."""

    @wraps(function)
    def wrapped(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return function(hidden, *arguments)

    return wrapped
