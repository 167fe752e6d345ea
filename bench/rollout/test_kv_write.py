"""Benchmark of one decode step's paged KV write: the dispatcher's kernel (compiled if it is built) and plain torch."""

import pytest
import torch

from toolx_kernels import kv_write, reference


@pytest.mark.parametrize("provider", [kv_write, reference.kv_write], ids=["toolx", "plain torch"])
@pytest.mark.parametrize("tokens", [40, 2048], ids=lambda n: f"T{n}")
def test_kv_write(benchmark, provider, tokens):
    key, value = torch.randn(2, tokens, 3, 64).bfloat16()  # SmolLM2-135M
    key_cache, value_cache = torch.zeros(2, 256, 16, 3, 64).bfloat16()
    slots = torch.randperm(256 * 16)[:tokens]
    benchmark(provider, key, value, key_cache, value_cache, slots)
