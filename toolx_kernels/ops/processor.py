"""Products of bf16 on this processor: AMX or not."""

from __future__ import annotations

import os

import torch

# Values of ONEDNN_MAX_CPU_ISA that leave AMX off: all instruction sets without it. What oneDNN does not know bounds
# nothing. (oneDNN's documentation, "CPU Dispatcher Control".)
WITHOUT_AMX = {
    "sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2",
    "avx512_core", "avx512_core_vnni", "avx512_core_bf16", "avx512_core_fp16",
    "avx10_1_512", "avx10_2", "avx10_2_512",
}  # fmt: skip


def bf16_runs_on_amx() -> bool:
    """Whether torch's products of bf16 use AMX tiles: they go through oneDNN, which leaves them off where
    ONEDNN_MAX_CPU_ISA (or its older name) says so when it first multiplies."""
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.cpu._is_amx_tile_supported() and most.lower() not in WITHOUT_AMX
