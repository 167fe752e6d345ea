"""The LM head as the loss sees it: which logits there are, and what is alive at a time while they are swept.

    z = softcap(h W^T + u B^T + bias) / T        u = scaling * h A^T, the LoRA adapter's features

Everything that reads or checks the head's inputs is here; the sweeps themselves are in ``sweep_torch`` and
``sweep_triton``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from toolx_kernels.errors import InputError
from toolx_kernels.reference import compute_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class VocabShard:
    """This rank's rows ``start : start + V`` of a head whose vocabulary is cut over several ranks.

    Every rank passes the same hidden states, targets and per-token vectors, and its own rows of the weight (of the
    bias, of ``lora_b``). All results, the gradient of hidden included, are those of the whole vocabulary on every
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

    def __post_init__(self):
        object.__setattr__(self, "key", len(_shards))
        _shards.append(self)


_shards: list[VocabShard] = []  # an operator's schema cannot hold a function: it holds the shard's place in this list


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


def sweeps(head: Head) -> ModuleType:
    """The implementation of the sweeps for these tensors."""
    if head.hidden.device.type == "cuda" and head.dtype == torch.float32:
        from toolx_kernels.ops.lm_head import sweep_triton as module
    else:
        from toolx_kernels.ops.lm_head import sweep_torch as module
    return module


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


def blocks(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def row_temperatures(temperature: float | Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """(N), from a number or one per row."""
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise InputError(f"temperature={temperature} must be positive.")
        return torch.full(targets.shape, temperature, dtype=compute_dtype(hidden), device=hidden.device)
    if temperature.shape != targets.shape:
        raise InputError(
            f"temperature has shape {tuple(temperature.shape)}: give a number or one per row ({len(targets)})."
        )
    check_devices(hidden.device, temperature=temperature)
    return temperature


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, lora_a: Tensor | None,
    lora_b: Tensor | None, softcap: float | None, shard: VocabShard | None,
) -> None:  # fmt: skip
    """Raises InputError unless hidden (N, D), weight (V, D), targets (N) int64, bias (V), lora_a (R, D) and
    lora_b (V, R) fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.shape[1] == 0:
        raise InputError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D) with one D."
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype}: it must be fp32, bf16, fp16 or float64.")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise InputError(f"hidden is {hidden.dtype} and weight {weight.dtype}: float64 goes with float64 only.")
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise InputError(
            f"targets {tuple(targets.shape)} of {targets.dtype} must be int64 with one id for each of the "
            f"{len(hidden)} rows of hidden."
        )
    if softcap is not None and not 0 <= softcap < float("inf"):
        raise InputError(f"softcap={softcap} must be positive and finite, or None for none.")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias {tuple(bias.shape)} must have one entry for each of the {len(weight)} rows of weight.")
    if (lora_a is None) != (lora_b is None):
        raise InputError("Give both lora_a (R, D) and lora_b (V, R), or neither.")
    if lora_a is not None:
        expected = (lora_a.shape[0], hidden.shape[1]), (weight.shape[0], lora_a.shape[0])
        if (tuple(lora_a.shape), tuple(lora_b.shape)) != expected:
            raise InputError(
                f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be (R, {hidden.shape[1]}) and "
                f"({weight.shape[0]}, R) with one R."
            )
    check_devices(hidden.device, weight=weight, targets=targets, bias=bias, lora_a=lora_a, lora_b=lora_b)
    if shard is not None and not 0 <= shard.start <= shard.vocab_size - len(weight):
        raise InputError(
            f"shard.start={shard.start} and the {len(weight)} rows of weight must lie inside "
            f"shard.vocab_size={shard.vocab_size}."
        )


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name} is on {tensor.device} and hidden on {device}: move it with .to({str(device)!r}).")


def wrong_rows(targets: Tensor, temperature: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(N) bool each: the target is outside the vocabulary; the temperature is not positive."""
    return (targets < 0) | (targets >= vocab_size), ~((temperature > 0) & temperature.isfinite())


def check_values(targets: Tensor, temperature: Tensor, vocab_size: int, live: Tensor | None = None) -> None:
    """Raises InputError for a target outside the vocabulary or a temperature that is not positive, on live rows. Where
    all is well a GPU is waited for once."""
    outside, frozen = wrong_rows(targets, temperature, vocab_size)
    if live is not None:
        outside, frozen = outside & live, frozen & live
    if not (outside | frozen).any():
        return
    if outside.any():
        row = int(outside.nonzero()[0])
        raise InputError(
            f"targets[{row}] = {int(targets[row])} is outside the vocabulary of {vocab_size}: mask such rows."
        )
    row = int(frozen.nonzero()[0])
    raise InputError(f"temperature[{row}] = {float(temperature[row])} must be positive and finite.")


def as_given(function):
    """Runs in the tensors' own precision (autocast would make some reductions bf16) and on their own device."""

    @wraps(function)
    def wrapped(hidden, *arguments):
        with torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
            return function(hidden, *arguments)

    return wrapped


def check_first_derivative(upstream: Tensor) -> None:
    """Raises InputError where a graph of the gradient itself is asked for: it would silently lack this op."""
    if torch.is_grad_enabled() and type(upstream) is Tensor and not torch.compiler.is_compiling():
        raise InputError("the fused loss has no second derivative: leave create_graph=True out.")
