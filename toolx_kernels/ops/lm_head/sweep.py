"""The sweep backend: torch or Triton."""

from __future__ import annotations

from types import ModuleType

import torch

from toolx_kernels.ops.lm_head import sweep_torch
from toolx_kernels.ops.lm_head.head import Head


def backend(head: Head) -> ModuleType:
    """The implementation of the sweeps for these tensors."""
    if head.hidden.device.type == "cuda" and head.dtype == torch.float32:
        from toolx_kernels.ops.lm_head import sweep_triton

        return sweep_triton
    return sweep_torch
