"""Forward and backward of the GRPO loss: vocabulary tiles (ours) beside materialised logits (plain torch).

``make bench`` runs both in one process. Time comes from pytest-benchmark; ``extra_info`` holds the peak of memory that
one call adds, read from the kernel (VmHWM after a reset).
"""

from pathlib import Path

import pytest
import torch

from toolx_kernels import linear_grpo_loss, reference

SHAPES = [(1024, 576, 49_152), (1024, 896, 151_936)]  # N, D, V: SmolLM2-135M and Qwen2.5-0.5B
PROVIDERS = {"toolx": linear_grpo_loss, "materialised": reference.linear_grpo_loss}


def resident_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def added_peak(call) -> int:
    """Bytes that ``call`` needs at its peak beyond what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - before


@pytest.mark.parametrize("dead", [0.0, 0.5], ids=lambda share: f"dead={share:.0%}")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "N{}-D{}-V{}".format(*shape))
@pytest.mark.parametrize("provider", PROVIDERS)
def test_forward_and_backward(benchmark, provider, shape, dead):
    n, d, v = shape
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, d, generator=g, requires_grad=True)
    weight = (torch.randn(v, d, generator=g) / d**0.5).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    cu_seqlens = torch.arange(0, n + 1, 64, dtype=torch.int32)
    rewards = torch.rand(n // 64, generator=g)
    rewards[: int(dead * len(rewards))] = 1.0  # groups of equal reward have no gradient

    def call():
        hidden.grad = weight.grad = None
        PROVIDERS[provider](
            hidden, weight, targets, cu_seqlens=cu_seqlens, rewards=rewards, group_size=4
        ).loss.backward()

    call()
    benchmark.extra_info["added_peak_mib"] = round(added_peak(call) / 2**20)
    benchmark.pedantic(call, rounds=3, iterations=1)
