"""Common parts of several Triton kernels."""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(z, softcap):
    """``softcap * tanh(z / softcap)`` without libdevice, exact to the last bits of fp32 relative to softcap."""
    e = tl.exp(-2.0 * tl.abs(z / softcap))
    return tl.where(z < 0, -softcap, softcap) * ((1.0 - e) / (1.0 + e))


@triton.jit
def product_tile(
    hidden_ptr, weight_ptr,  # of the tile's first row and first token
    row, token,  # (BLOCK_N), (BLOCK_V) offsets within the tile, all of which may be read
    D, stride_hn, stride_hd, stride_wv, stride_wd,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr, DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``hidden (rows, D) @ weight (tokens, D).T``, (BLOCK_N, BLOCK_V) fp32."""
    in_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    hidden_ptrs = hidden_ptr + (row[:, None] * stride_hn + in_d[None, :] * stride_hd)
    weight_ptrs = weight_ptr + (token[None, :] * stride_wv + in_d[:, None] * stride_wd)
    for d in range(0, D, BLOCK_D):
        if EVEN_D:
            h = tl.load(hidden_ptrs)
            w = tl.load(weight_ptrs)
        else:
            h = tl.load(hidden_ptrs, mask=in_d[None, :] < D - d, other=0.0)
            w = tl.load(weight_ptrs, mask=in_d[:, None] < D - d, other=0.0)
        acc = tl.dot(h.to(DOT_DTYPE), w.to(DOT_DTYPE), acc, input_precision=PRECISION)
        hidden_ptrs += BLOCK_D * stride_hd
        weight_ptrs += BLOCK_D * stride_wd
    return acc


OF_HEAD = {"hidden_ptr", "weight_ptr", "bias_ptr", "out_ptr"}


def per_row_kernel(function):
    """A kernel that is not recompiled for another number of rows or another start of a chunk within a vector."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(
        function,
        do_not_specialize=[name for name in names if name in ("N", "V", "n_tiles")],
        do_not_specialize_on_alignment=[name for name in names if name.endswith("_ptr") and name not in OF_HEAD],
    )
