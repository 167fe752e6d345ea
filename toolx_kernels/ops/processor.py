"""The processor's unit for bf16 products: AMX or not."""

from __future__ import annotations

import os

import torch

# Values of ONEDNN_MAX_CPU_ISA that switch AMX off: all instruction sets without it. oneDNN ignores values that it does
# not know. (oneDNN's documentation, "CPU Dispatcher Control".)
WITHOUT_AMX = {
    "sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2",
    "avx512_core", "avx512_core_vnni", "avx512_core_bf16", "avx512_core_fp16",
    "avx10_1_512", "avx10_2", "avx10_2_512",
}  # fmt: skip


def bf16_runs_on_amx() -> bool:
    """Whether torch's bf16 products use AMX tiles.

    They run in oneDNN, which reads ONEDNN_MAX_CPU_ISA (or its older name) at its first product.
    """
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return torch.cpu._is_amx_tile_supported() and most.lower() not in WITHOUT_AMX
