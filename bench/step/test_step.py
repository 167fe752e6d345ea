"""Benchmark of whole optimizer steps (rollout, reward, forward, backward, update): ours and TRL's GRPOTrainer.

``bench/step/report.py`` makes the tables. Names say what a case is for: ``measure`` (the shape that claims are based
on; every trainer with and without gradient checkpointing), ``batching`` (the same with TRL's continuous batching),
``dtype`` (in bf16), ``stop`` (completions end where the model ends them), ``dead`` (half of the groups have no
gradient), ``length``, ``group`` and ``new`` (one number of a smaller case varies), ``small`` (every trainer, in
seconds). ``-k measure`` runs one kind.
"""

import pytest
import torch

from bench.step.cases import Case
from bench.step.measure import measure
from bench.step.providers import TRL, Toolx, ToolxCheckpointing, TRLCheckpointing, TRLContinuousBatching
from toolx_kernels.models.load import SMOLLM2

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {  # in addition to ours, which always runs
    "small": (ToolxCheckpointing, TRL, TRLCheckpointing, TRLContinuousBatching),
    "measure": (ToolxCheckpointing, TRL, TRLCheckpointing),
    "batching": (TRLContinuousBatching,),
}


def scaled(**changed) -> Case:
    """A case a fifth of ``measure``'s size, with one number changed."""
    return Case(SMOLLM2, **{"length": 250, "n": 4, "new": 48} | changed)


def cases() -> dict[str, list[Case]]:
    return {
        "small": [Case(SMOLLM2, 2, 60, 4, 8)],
        "measure": [Case(SMOLLM2, rounds=2)],
        "batching": [Case(SMOLLM2)],
        "dtype": [Case(SMOLLM2, dtype="bfloat16", rounds=2)],
        "stop": [Case(SMOLLM2, stop=True)],
        "dead": [Case(SMOLLM2, dead=0.5)],
        "length": [scaled(length=length) for length in (125, 250, 500, 1000)],
        "group": [scaled(n=n) for n in (2, 8, 16)],
        "new": [scaled(new=new) for new in (24, 96, 192)],
    }


def parameters():
    return [pytest.param(kind, case, id=f"{kind}-{case}") for kind, named in cases().items() for case in named]


@pytest.mark.parametrize("kind, case", parameters())
def test_step(benchmark, kind, case):
    kinds = (Toolx, *KINDS.get(kind, (TRL,)))
    benchmark.extra_info["step"] = measure(case, kinds, DEVICE, benchmark=benchmark)
