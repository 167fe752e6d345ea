"""Correct bf16 in Triton's interpreter, which unpatched (3.6 to 3.9) adds and multiplies the bits of bf16.

With this patch a bf16 value is stored as the fp32 number that it represents, and every handle of type bf16 rounds on
creation: to nearest, ties to even, as a GPU rounds. Operations of the interpreter are then correct unchanged, except
those that access bits or memory, which are replaced. Atomics on bf16 are refused.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BF16 = tl.bfloat16


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == BF16


def _bits(numbers: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the bf16 nearest to each fp32 number; NaN stays NaN."""
    words = numbers.view(np.uint32)
    nearest = (words + 0x7FFF + (words >> 16 & 1)) >> 16
    return np.where(np.isnan(numbers), words >> 16 | 0x40, nearest).astype(np.uint16)


def _numbers(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_bits(value: TensorHandle | None) -> TensorHandle | None:
    """A bf16 value as its bits; any other value unchanged."""
    return TensorHandle(_bits(value.data), tl.uint16) if value is not None and _is_bf16(value.dtype) else value


def _replace(owner, name: str):
    """Replaces ``owner.name`` by the decorated function, which gets the original as its first argument."""

    def decorate(function):
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments: function(original, *arguments))

    return decorate


def install() -> None:
    @_replace(interpreter, "_get_np_dtype")
    def _(original, dtype):
        return np.dtype(np.float32) if _is_bf16(dtype) else original(dtype)

    @_replace(interpreter, "_validate_np_data_size")
    def _(original, array, dtype):
        return array.itemsize <= 4 if _is_bf16(dtype) else original(array, dtype)

    @_replace(TensorHandle, "__post_init__")
    def _(original, self):
        if _is_bf16(self.dtype) and self.data.dtype != np.bool_:  # a comparison's result has its operands' type
            assert self.data.dtype == np.float32, f"a bf16 value in {self.data.dtype}"
            self.data = _numbers(_bits(self.data))
        original(self)

    @_replace(InterpreterBuilder, "create_masked_load")
    def _(original, self, pointers, mask, other, *options):
        if not _is_bf16(pointers.get_element_ty()):
            return original(self, pointers, mask, other, *options)
        to_bits = TensorHandle(pointers.data, tl.pointer_type(tl.uint16))
        return TensorHandle(_numbers(original(self, to_bits, mask, _as_bits(other), *options).data), BF16)

    @_replace(InterpreterBuilder, "create_masked_store")
    def _(original, self, pointers, value, *options):
        original(self, pointers, _as_bits(value), *options)

    @_replace(InterpreterBuilder, "cast_impl")
    def _(original, self, value, dtype):
        if _is_bf16(value.dtype) or _is_bf16(dtype):
            return TensorHandle(value.data.astype(interpreter._get_np_dtype(dtype)), dtype.scalar)
        return original(self, value, dtype)

    @_replace(InterpreterBuilder, "create_fp_to_fp")
    def _(original, self, value, dtype, rounding):
        if not (_is_bf16(value.dtype) or _is_bf16(dtype)):
            return original(self, value, dtype, rounding)
        if tl.float16 in (value.dtype.scalar, dtype.scalar):
            return self.cast_impl(value, dtype)
        raise NotImplementedError(f"from {value.dtype} to {dtype} rounded {rounding}")

    @_replace(InterpreterBuilder, "create_bitcast")
    def _(original, self, value, dtype):
        if _is_bf16(dtype):
            return TensorHandle(_numbers(value.data.view(np.uint16)), BF16)
        return original(self, _as_bits(value), dtype)

    @_replace(InterpreterBuilder, "create_fabs")
    def _(original, self, value):
        return self.unary_op(value, np.abs) if _is_bf16(value.dtype) else original(self, value)

    for name in ("create_atomic_rmw", "create_atomic_cas"):

        @_replace(InterpreterBuilder, name)
        def _(original, self, *arguments):
            if any(isinstance(a, TensorHandle) and _is_bf16(a.dtype) for a in arguments):
                raise NotImplementedError("an atomic on bf16")
            return original(self, *arguments)
