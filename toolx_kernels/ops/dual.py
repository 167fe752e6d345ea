"""Dual functions: short elementwise functions, written once for torch and for Triton kernels.

A function decorated with ``dual`` is a Triton device function if triton is installed, and ``in_torch`` holds its twin:
the same code object run on torch tensors. So its body may only use what both support: arithmetic, comparisons,
``&`` and ``|``, ``tl.exp``, ``tl.abs``, ``tl.where`` (at least one branch a tensor), ``tl.sigmoid``,
``tl.static_range``, other dual functions, and ``if`` on attributes of CONFIG (a GRPOLossConfig, a ``tl.constexpr`` in a
kernel) and on HAS_* flags.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, SimpleNamespace

import torch

from toolx_kernels.reference import K3_TERMS, LARGEST_COEFFICIENT, LARGEST_LOSS, LOG_RATIO_BOUND

try:
    import triton
    import triton.language as tl

    TERMS = tl.constexpr(K3_TERMS)
except ImportError:  # a CPU build of torch comes without triton; then only the twins exist
    triton = None

in_torch = SimpleNamespace()
_twin_globals = {
    "__builtins__": __builtins__,  # C code that imports something looks here
    "tl": SimpleNamespace(exp=torch.exp, abs=torch.abs, where=torch.where, sigmoid=torch.sigmoid, static_range=range),
    # the constants, by their names in the modules of dual functions
    "BOUND": LOG_RATIO_BOUND,
    "TERMS": K3_TERMS,
    "MOST_LOSS": LARGEST_LOSS,
    "MOST": LARGEST_COEFFICIENT,
}


def dual(function: Callable) -> Callable:
    """Decorator: compiles ``function`` for Triton kernels and adds its torch twin to ``in_torch`` by the same name."""
    twin = FunctionType(function.__code__, _twin_globals, function.__name__)
    _twin_globals[function.__name__] = twin
    setattr(in_torch, function.__name__, twin)
    return function if triton is None else triton.jit(function)


@dual
def is_finite(x):
    return tl.abs(x) < float("inf")


@dual
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@dual
def k3_estimate(gap):
    """``exp(gap) - gap - 1`` and its slope in the log-prob, ``1 - exp(gap)``; by a series near 0, where they cancel."""
    near = tl.abs(gap) < 1.0
    small = tl.where(near, gap, 0.0)
    series = 1.0 + 0.0 * small
    for k in tl.static_range(TERMS, 2, -1):
        series = 1.0 + small * series * (1.0 / k)
    value = 0.5 * small * small * series
    growth = tl.exp(gap)
    return tl.where(near, value, growth - gap - 1.0), tl.where(near, -small - value, 1.0 - growth)
