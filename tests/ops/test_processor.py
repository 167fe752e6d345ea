"""Branches that depend on the processor: AMX for bf16 products, and each instruction set of the kernels."""

import pytest
import torch

from tests.ops.attention.cases import assert_as_good_as_torch, make_grouped
from toolx_kernels.ops import library, processor
from toolx_kernels.ops.lm_head import sampling_torch, sweep_torch

INSTRUCTION_SETS = [
    "default",
    pytest.param("avx2", marks=pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")),
    pytest.param("avx512", marks=pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_compiled = pytest.mark.skipif(library.compiled_error is not None, reason="needs the compiled part")


@pytest.mark.parametrize(
    "variable, value, left_on",
    [
        ("ONEDNN_MAX_CPU_ISA", None, True),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16", False),
        ("DNNL_MAX_CPU_ISA", "avx2", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX10_1_512_AMX_FP16", True),
        ("ONEDNN_MAX_CPU_ISA", "DEFAULT", True),
        ("ONEDNN_MAX_CPU_ISA", "no instruction set", True),
    ],
)
def test_amx_is_used_where_the_processor_has_it_and_onednn_may(variable, value, left_on, monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    for has_it in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_it=has_it: has_it)
        assert processor.bf16_runs_on_amx() == (has_it and left_on)


def exp_sums(kernel, dtype):
    z = torch.randn(300, 41, generator=torch.Generator().manual_seed(0)).T
    out, sums = torch.empty(300, 41, dtype=dtype).T, torch.zeros(2, 41)
    kernel(z.clone(), torch.linspace(-1, 1, 41), out, sums)
    return out, sums


def drawn(kernels, dtype):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 90, generator=g), torch.randn(700, 90, generator=g) / 6
    streams = torch.arange(25).view(5, 5)
    tokens, stats, logits = torch.empty(5, dtype=torch.int64), torch.empty(3, 5), torch.empty(5, 700)
    kernels.sample_sweep(hidden, weight.to(dtype), streams, 0.9, None, 4.0, tokens, stats, logits)
    kernels.add_gumbel(logits, streams)
    return tokens, stats, logits


@needs_compiled
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_for_each_instruction_set(dtype, instruction_set, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", instruction_set)
    for groups, window in (([(2, [(9, 1), (40, 1)])], 0), ([(0, [(70, 70), (3, 2)])], 30)):
        case = make_grouped(groups, 16, heads=6, dim=36, dtype=dtype, device="cpu")
        assert_as_good_as_torch(case, 2.0, window)
    torch.testing.assert_close(drawn(torch.ops.toolx, dtype), drawn(sampling_torch, dtype), rtol=1e-5, atol=1e-5)
    if dtype != torch.float16:  # fp16 cannot hold exponentials
        ours, expected = exp_sums(torch.ops.toolx.exp_sums, dtype), exp_sums(sweep_torch.exp_sums, dtype)
        torch.testing.assert_close(ours, expected, rtol=torch.finfo(dtype).eps + 1e-5, atol=1e-5)


@needs_compiled
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs a second instruction set, AVX2")
def test_the_bound_on_instruction_sets_reaches_every_kernel(monkeypatch):
    """Results differ in the last bits if sums are taken in another order or fused with their products."""
    query, *rest = make_grouped([(0, [(200, 1)])], 16, dim=64, dtype=torch.float32, device="cpu").tensors
    results = []
    for instruction_set in ("default", "avx2"):
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", instruction_set)
        attended = torch.ops.toolx.paged_attention(query, *rest, None, None, 1, 0.3, 0.0, 0)
        _, stats, logits = drawn(torch.ops.toolx, torch.float32)
        noise = torch.zeros(5, 700)
        torch.ops.toolx.add_gumbel(noise, torch.arange(25).view(5, 5))
        sums = [exp_sums(torch.ops.toolx.exp_sums, dtype)[1] for dtype in (torch.float32, torch.bfloat16)]
        results.append([attended, stats, logits, noise, *sums])
    assert not any(torch.equal(*pair) for pair in zip(*results, strict=True))
