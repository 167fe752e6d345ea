"""Checks of the arguments of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from toolx_kernels.errors import InputError, short
from toolx_kernels.loss_config import GRPOLossConfig
from toolx_kernels.ops.lm_head.vocab_shard import VocabShard
from toolx_kernels.reference import compute_dtype
from toolx_kernels.settings import NOT_NEGATIVE, POSITIVE, check_number

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_ROWS = 2**31 - 1


def row_temperatures(temperature: float | Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """Temperatures (N), from a number or a tensor of one per row."""
    if not isinstance(temperature, Tensor):
        check_number("temperature", temperature, POSITIVE, whole=False)
        return torch.full(targets.shape, float(temperature), dtype=compute_dtype(hidden), device=hidden.device)
    if temperature.shape != targets.shape:
        raise InputError(
            f"temperature has shape {tuple(temperature.shape)}: give a number or one per row ({len(targets)})."
        )
    check_tensors(temperature=temperature)
    check_devices(hidden.device, temperature=temperature)
    return saved(temperature)


def given_denominator(denominator: float | Tensor | None, hidden: Tensor) -> Tensor | None:
    """The denominator (), from a number or a tensor of one element; None for none."""
    if denominator is None:
        return None
    if isinstance(denominator, Tensor):
        check_tensors(denominator=denominator)
        if denominator.numel() != 1 or denominator.dtype == torch.bool:
            raise InputError(
                f"denominator is {denominator.dtype} of shape {tuple(denominator.shape)}: it must be one number."
            )
        return denominator.reshape(()).to(hidden.device, compute_dtype(hidden))
    check_number("denominator", denominator, POSITIVE, whole=False)
    return torch.full((), float(denominator), dtype=compute_dtype(hidden), device=hidden.device)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
    """Raises InputError unless hidden (N, D), weight (V, D) and bias (V) fit together."""
    check_tensors(hidden=hidden, weight=weight)
    if bias is not None:
        check_tensors(bias=bias)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or hidden.shape[1] == 0:
        raise InputError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be (N, D) and (V, D) with one D."
        )
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.dtype not in DTYPES:
            raise InputError(f"{name} is {tensor.dtype}: it must be fp32, bf16, fp16 or float64.")
    if (hidden.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise InputError(f"hidden is {hidden.dtype} and weight {weight.dtype}: float64 goes with float64 only.")
    if len(hidden) > MOST_ROWS:
        raise InputError(f"hidden has {len(hidden):,} rows: give at most {MOST_ROWS:,}, as int32 bounds hold no more.")
    if softcap is not None:
        check_number("softcap", softcap, NOT_NEGATIVE, whole=False)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"bias {tuple(bias.shape)} must have one entry for each of the {len(weight)} rows of weight.")
    check_devices(hidden.device, weight=weight, bias=bias)


def check_targets(hidden: Tensor, weight: Tensor, targets: Tensor, shard: VocabShard | None) -> None:
    """Raises InputError unless targets (N) int64 fit hidden (N, D), and weight lies inside the shard's vocabulary."""
    check_tensors(targets=targets)
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise InputError(
            f"targets {tuple(targets.shape)} of {targets.dtype} must be int64 with one id for each of the "
            f"{len(hidden)} rows of hidden."
        )
    check_devices(hidden.device, targets=targets)
    if not isinstance(shard, VocabShard | None):
        raise InputError(f"shard is {short(shard)}: pass a VocabShard, or None.")
    if shard is not None and not 0 <= shard.start <= shard.vocab_size - len(weight):
        raise InputError(
            f"shard.start={shard.start} and the {len(weight)} rows of weight must lie inside "
            f"shard.vocab_size={shard.vocab_size}."
        )


def check_vectors(
    hidden: Tensor,
    cu_seqlens: Tensor,
    config: GRPOLossConfig,
    rewards: Tensor | None,
    advantages: Tensor | None,
    per_row: dict,
) -> None:
    """Raises InputError for vectors of a loss that do not fit; reads no values, so a GPU is not waited for."""
    vectors = {"rewards": rewards, "advantages": advantages, **per_row}
    check_tensors(cu_seqlens=cu_seqlens, **{name: vector for name, vector in vectors.items() if vector is not None})
    if not isinstance(config, GRPOLossConfig):
        raise InputError(f"config is {short(config)}: pass a GRPOLossConfig.")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise InputError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype} must hold the B + 1 bounds, int32 or int64, "
            "of at least one completion."
        )
    if (rewards is None) == (advantages is None):
        raise InputError("Give either rewards or advantages, not both.")
    n_completions, n_rows = len(cu_seqlens) - 1, len(hidden)
    if advantages is not None and advantages.shape != (n_completions,) and advantages.shape != (n_rows,):
        raise InputError(
            f"advantages has shape {tuple(advantages.shape)}: it must be ({n_completions},), one per completion of "
            f"cu_seqlens, or ({n_rows},), one per row of hidden."
        )
    for name, vector in {"rewards": rewards, **per_row}.items():
        size = n_completions if name == "rewards" else n_rows
        if vector is not None and vector.shape != (size,):
            raise InputError(
                f"{name} has shape {tuple(vector.shape)}: it must be ({size},) to fit cu_seqlens and hidden."
            )
    check_devices(hidden.device, cu_seqlens=cu_seqlens, **vectors)
    if (mask := per_row["mask"]) is not None and mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}: pass mask.bool(), True where a token counts.")
    if config.beta and per_row["ref_logprobs"] is None:
        raise InputError(f"beta={config.beta} needs ref_logprobs: pass the reference policy's log-probs or set beta=0.")


def check_tensors(**given: Any) -> None:
    """Raises InputError for what is not a dense tensor of real numbers."""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} is {short(tensor)}: pass a tensor.")
        narrow = tensor.is_floating_point() and tensor.itemsize < 2  # fp8 and fp4, which torch hardly computes with
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_complex() or narrow:
            nested = "nested " * tensor.is_nested
            raise InputError(
                f"{name} is a {nested}{tensor.layout} tensor of {tensor.dtype}: pass a dense one of real numbers of at "
                "least 16 bits."
            )


def check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name} is on {tensor.device} and hidden on {device}: move it with .to({str(device)!r}).")


def wrong_rows(targets: Tensor, temperature: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(N) bool each: the target is outside the vocabulary; the temperature is not positive."""
    return (targets < 0) | (targets >= vocab_size), ~((temperature > 0) & temperature.isfinite())


def check_values(targets: Tensor, temperature: Tensor, vocab_size: int, live: Tensor | None = None) -> None:
    """Raises InputError for a target outside the vocabulary or a temperature that is not positive and finite, on live
    rows. If there are none, it waits for a GPU only once."""
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


def wrong_denominator(denominator: Tensor) -> Tensor:
    """() bool"""
    return ~((denominator > 0) & denominator.isfinite())


def check_denominator(denominator: Tensor | None) -> None:
    """Raises InputError for a denominator that is not positive and finite."""
    if denominator is not None and wrong_denominator(denominator):
        raise InputError(f"denominator = {float(denominator)} must be positive and finite.")


def check_advantages(advantages: Tensor) -> None:
    """Raises InputError for an advantage that is not finite."""
    if not advantages.isfinite().all():
        at = int((~advantages.isfinite()).nonzero()[0])
        raise InputError(f"advantages[{at}] = {float(advantages[at])} is not finite.")


def check_bounds(bounds: list[int], n_rows: int) -> None:
    """Raises InputError unless the bounds of completions rise from 0 to n_rows."""
    falling = next((b for b, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)) if high < low), None)
    if falling is not None:
        raise InputError(
            f"cu_seqlens falls from {bounds[falling]} to {bounds[falling + 1]} at {falling + 1}: "
            f"it must rise from 0 to N = {n_rows}."
        )
    if bounds[0] != 0 or bounds[-1] != n_rows:
        raise InputError(f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}: it must rise from 0 to N = {n_rows}.")


def check_first_derivative(upstream: Tensor) -> None:
    """Raises InputError for ``create_graph=True``: the graph of the gradient would silently lack this op."""
    if torch.is_grad_enabled() and type(upstream) is Tensor and not torch.compiler.is_compiling():
        raise InputError("The fused loss has no second derivative: leave out create_graph=True.")


def check_transforms(*tensors: Tensor | None) -> None:
    """Raises InputError if an input is differentiated by ``torch.func`` or in forward mode, which would silently give
    zeros: only the backward pass is defined."""
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        refused = forward_ad.unpack_dual(tensor).tangent is not None
        while functorch.is_functorch_wrapped_tensor(tensor):
            refused |= functorch.is_gradtrackingtensor(tensor)
            tensor = functorch.get_unwrapped(tensor)
        if refused:
            raise InputError(
                "The fused loss has a backward pass only: use torch.autograd.grad or .backward() instead of torch.func "
                "(grad, jvp, vjp, ...) or forward-mode differentiation."
            )


def is_trained(tensor: Tensor | None) -> bool:
    """Whether a tensor needs a gradient; inside ``vmap`` the tensor that it maps over tells."""
    while tensor is not None and not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor is not None and tensor.requires_grad


def saved(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was made under ``torch.inference_mode`` and a backward pass could not read it."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def check_saved(**leaves: Tensor | None) -> None:
    """Raises InputError for a leaf made under ``torch.inference_mode`` if a backward pass has to read the leaves."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(leaf is not None and leaf.requires_grad for leaf in leaves.values()):
        for name, leaf in leaves.items():
            if leaf is not None and leaf.is_inference():
                raise InputError(
                    f"{name} was made under torch.inference_mode, so no backward pass can read it: make it under "
                    f"torch.no_grad, or pass {name}.clone()."
                )
