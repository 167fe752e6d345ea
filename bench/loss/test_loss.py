"""Benchmark of the fused GRPO loss, plain torch, the bare GEMMs and other projects' fused losses.

``make bench`` runs this and ``bench/loss/report.py`` after it, which takes minutes even on a CPU.
Names say what a case is for: ``measure`` (the shapes that claims are based on), ``pass`` (forward, backward and dead
rows), ``length`` (memory against N), ``shape``. ``-k measure`` runs one kind; TOOLX_BENCH=full runs the whole grid.
"""

import os
from itertools import product

import pytest
import torch

from bench.loss.cases import Case
from bench.loss.measure import measure
from bench.loss.providers import OURS, PEERS

SMOLLM2 = (576, 49_152)  # D, V
QWEN_05B, QWEN_15B = (896, 151_936), (1536, 151_936)
CUDA = torch.cuda.is_available()
FULL = os.environ.get("TOOLX_BENCH") == "full"
DEVICE = torch.device("cuda" if CUDA else "cpu")


def default_cases() -> dict[str, list[Case]]:
    n, small = (8192, 8192) if CUDA else (4096, 1024)
    dtypes = ["bfloat16"] if CUDA else ["bfloat16", "float32"]
    measured = [QWEN_05B, QWEN_15B] if CUDA else [SMOLLM2]
    main = measured[0]
    grid = product((n,), (576, 896, 1536, 2560, 4096), (49_152, 151_936, 256_000))
    return {
        "measure": [
            Case("both", n, *shape, dtype, dead, frozen)
            for shape, dtype, frozen, dead in product(measured, dtypes, (False, True), (0.0, 0.5))
        ],
        "pass": [Case(what, small, *main) for what in ("forward", "backward")]
        + [Case("both", small, *main, dtype) for dtype in dtypes]
        + [Case("both", small, *main, dead=dead) for dead in (0.5, 0.8)],
        "length": [Case("both", n, *main) for n in ((1024, 4096, 16_384, 65_536) if CUDA else (2048,))],
        "shape": [Case("both", *shape) for shape in (grid if CUDA else ((512, *QWEN_05B), (256, *QWEN_15B)))],
    }


def full_cases() -> dict[str, list[Case]]:
    lengths = [2**k for k in range(10, 17 if CUDA else 13)]
    dims, vocabs = (576, 896, 1536, 2560, 4096), (49_152, 151_936, 256_000)
    if not CUDA:
        dims, vocabs = dims[:3], vocabs[:2]
    grid = product(lengths, dims, vocabs, ("bfloat16", "float32"), (0.0, 0.5, 0.8), (False, True))
    return {
        "full": [
            Case(what, n, d, v, dtype, dead, frozen)
            for n, d, v, dtype, dead, frozen in grid
            for what in ("forward", "backward", "both")
        ]
    }


def parameters():
    kinds = full_cases() if FULL else default_cases()
    named = {case: kind for kind, cases in reversed(kinds.items()) for case in cases}  # a case of two kinds runs once
    ordered = sorted(named, key=lambda case: (case.n, case.d, case.v, case.dtype))  # tensors of a shape are made once
    return [pytest.param(case, id=f"{named[case]}-{case}") for case in ordered]


@pytest.mark.parametrize("case", parameters())
def test_loss(benchmark, case):
    # Some peers need half a minute for a large case on a CPU. There they run one variant of it, bf16 without dead rows
    # and with a trained head; the others run ours, plain torch and the floors.
    everyone = CUDA or FULL or case.n <= 1024 or case == Case(case.what, case.n, case.d, case.v)
    kinds = OURS + PEERS if everyone else OURS
    benchmark.extra_info["loss"] = measure(case, kinds, DEVICE, benchmark=benchmark)
