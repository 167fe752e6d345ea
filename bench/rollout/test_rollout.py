"""Benchmark of rollouts: ours, transformers' two ways, vLLM and nano-vllm, and the floor of a decode step.

``make bench`` runs this and ``bench/rollout/report.py`` after it. Names say what a case is for: ``measure`` (the shapes
that claims are based on), ``dtype`` (the same in fp32), ``small`` (every peer that runs here, in seconds). ``-k small``
runs one kind.
"""

import pytest
import torch

from bench.rollout.cases import Case
from bench.rollout.measure import measure
from bench.rollout.providers import PEERS, ToolxCompiled, TransformersBatching
from toolx_kernels.models.load import SMOLLM2

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def cases() -> dict[str, list[Case]]:
    if CUDA:
        work = dict(prompts=32, length=1000, n=10, new=256, limit_s=30.0)
        shapes = ("qwen2.5-0.5b-shape", "qwen2.5-1.5b-shape")
        return {"measure": [Case(shape, **work) for shape in shapes], "small": [Case(shapes[0], 2, 100, 10, 32)]}
    work = dict(prompts=4, length=500, n=10, new=96)
    return {
        "small": [Case(SMOLLM2, 2, 100, 5, 16)],
        "measure": [Case(SMOLLM2, **work)],
        "dtype": [Case(SMOLLM2, **work, dtype="float32")],
    }


def parameters():
    return [pytest.param(case, id=f"{kind}-{case}") for kind, named in cases().items() for case in named]


@pytest.mark.parametrize("case", parameters())
def test_rollout(benchmark, case):
    # On a CPU transformers' engine lets every row attend to every other row's cache under a mask, which takes minutes
    # where the caches are large.
    peers = [kind for kind in PEERS if CUDA or case.length <= 100 or kind is not TransformersBatching]
    kinds = [ToolxCompiled] * CUDA + peers
    benchmark.extra_info["rollout"] = measure(case, kinds, DEVICE, benchmark=benchmark)
