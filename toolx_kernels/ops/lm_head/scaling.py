"""Scaling of gradients by the upstream gradient of a backward pass, without reading it from a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without triton
    triton = None


def scaled(gradients: Sequence[Tensor], factor: Tensor) -> Sequence[Tensor]:
    """Each of ``gradients`` times ``factor`` (), in its dtype; overwrites them if no later backward pass reads them.

    The factor is nearly always 1, which leaves nothing to do: on a CPU the host checks it, on a GPU the kernel does.
    """
    if not torch.compiler.is_compiling() and type(factor) is Tensor:
        if on_gpu(factor):
            if triton is not None and not _are_read_again():
                scale_in_place(gradients, factor)
                return gradients
        elif bool(factor == 1):
            return gradients
    return [(gradient.to(factor.dtype) * factor).to(gradient.dtype) for gradient in gradients]


def on_gpu(factor: Tensor) -> bool:
    return factor.device.type == "cuda"


def _are_read_again() -> bool:
    """Whether the running backward pass has ``retain_graph=True``."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


if triton is not None:

    @triton.jit
    def scale_kernel(gradient_ptr, factor_ptr, n, BLOCK: tl.constexpr):
        """``gradient (n) *= factor`` in the factor's precision; few programs, because the factor is nearly always 1."""
        factor = tl.load(factor_ptr)
        if factor != 1.0:
            for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
                place = start + tl.arange(0, BLOCK)
                value = tl.load(gradient_ptr + place, mask=place < n).to(factor.dtype)
                tl.store(gradient_ptr + place, (value * factor).to(gradient_ptr.dtype.element_ty), mask=place < n)

    def scale_in_place(gradients: Sequence[Tensor], factor: Tensor) -> None:
        for gradient in gradients:
            if gradient.numel():
                n_programs = min(triton.cdiv(gradient.numel(), 4096), 1024)
                with torch.cuda.device_of(gradient):
                    scale_kernel[(n_programs,)](gradient.view(-1), factor, gradient.numel(), BLOCK=4096)
