"""Memory of optimizers: gradients, states, and temporary memory of an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from toolx_kernels.train.memory.plan import Bytes
from toolx_kernels.train.update.adamw import CHUNK
from toolx_kernels.train.update.offload import STAGING_BYTES


class OptimizerMemory(NamedTuple):
    gradients: Bytes  # held from a backward to the update
    states: Bytes
    update: int = 0  # bytes on the device while one parameter is updated


def _adamw(trained: list[Tensor], device: str) -> OptimizerMemory:
    """Gradients are accumulated in fp32, and narrower weights have an fp32 master."""
    gradients = sum(4 * p.numel() for p in trained)
    states = sum((8 if p.itemsize == 4 else 12) * p.numel() + 4 for p in trained)
    return OptimizerMemory(Bytes(gradients), Bytes(states))


def _adamw_8bit(trained: list[Tensor], device: str) -> OptimizerMemory:
    """torchao: each moment takes one byte per element, an fp32 scale per 256 elements and a table of 256 fp32 values;
    parameters with few elements, or a number that 256 does not divide, have moments in the weight's dtype.

    An update makes fp32 copies of a parameter and its moments: on a GPU torch.compile fuses all but the two moments
    (not measured); on a CPU about seven are alive at once.
    """

    def moments(p: Tensor) -> int:
        if p.numel() < 4096 or p.numel() % 256:
            return 2 * p.nbytes
        return 2 * (p.numel() + p.numel() // 256 * 4 + 256 * 4)

    gradients, states = sum(p.nbytes for p in trained), sum(moments(p) + 4 for p in trained)
    update = (8 if device == "cuda" else 28) * max(p.numel() for p in trained)
    return OptimizerMemory(Bytes(gradients), Bytes(states), update)


def _adamw_stochastic(trained: list[Tensor], device: str) -> OptimizerMemory:
    gradients, states = sum(p.nbytes for p in trained), sum(8 * p.numel() + 4 for p in trained)
    chunk = min(CHUNK, max(p.numel() for p in trained))
    return OptimizerMemory(Bytes(gradients), Bytes(states), 4 * 4 * chunk)  # weight, gradient, noise and their sum


def _adamw_offload(trained: list[Tensor], device: str) -> OptimizerMemory:
    """Only gradients in transfer are on the device: the input embedding's and those of two other weights."""
    largest = sorted((p.nbytes for p in trained), reverse=True)[:3]
    n_elements = sum(p.numel() for p in trained)
    states = Bytes(0, 12 * n_elements + 4 * len(trained) + STAGING_BYTES)
    return OptimizerMemory(Bytes(sum(largest), 4 * n_elements), states)


# memory for the given trained parameters on a device, by the setting ``optim``
OPTIMIZERS: dict[str, Callable[[list[Tensor], str], OptimizerMemory]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_stochastic": _adamw_stochastic,
    "adamw_offload": _adamw_offload,
}
