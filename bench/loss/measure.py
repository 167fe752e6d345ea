"""Measurement of a loss case: every provider is checked against float64, then all are timed in turn in one process.

A round calls each provider once, so that a change of clock rate or load affects all of them; the figure is each
provider's median over the rounds. Peak memory comes from separate calls, which also warm up. On a CPU a peer that needs
several times our time is timed only in the first round, because some take half a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from statistics import median
from typing import Any

import torch

from bench.common.absent import why_absent
from bench.common.machine import package_version
from bench.common.timing import MIB, SLOW, added_peak, seconds, take_rounds
from bench.loss.cases import Case, Problem, make_problem
from bench.loss.providers import PEERS, Floor, LiveFloor, LossProvider, Toolx
from toolx_kernels import reference
from toolx_kernels.loss_config import GRPOLossConfig

# Relative errors (absolute for log-probs) beyond which a provider is called wrong: several times what the rounding of
# its inputs, TF32 in fp32, and sums in bf16 explain.
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}


def errors(provider: LossProvider, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Largest log-prob error and relative (Frobenius) gradient errors against float64 on a small ragged shape."""
    p = make_problem(192, 128, 5003, dtype=dtype, device=device, dead=0.25)
    hidden, weight = (t.detach().double().requires_grad_() for t in (p.hidden, p.weight))
    config, advantages = GRPOLossConfig(compute_all_logprobs=True), p.advantages.double()
    truth = reference.linear_grpo_loss(
        hidden, weight, p.targets, cu_seqlens=p.cu_seqlens, advantages=advantages, config=config
    )
    truth.loss.backward()
    provider.stage("both", p)()
    found = {
        "hidden": float((p.hidden.grad - hidden.grad).norm() / hidden.grad.norm()),
        "weight": float((p.weight.grad - weight.grad).norm() / weight.grad.norm()),
    }
    if "forward" in provider.passes:
        found["logprobs"] = float((provider.stage("forward", p)() - truth.logprobs).abs().max())
    return found


@lru_cache
def load(kind: type[LossProvider], dtype: torch.dtype, device: torch.device) -> tuple[LossProvider | None, Any]:
    """The provider and its errors, or None and the reason why it cannot run here."""
    try:
        provider = kind(device)
        return provider, {} if issubclass(kind, Floor) else errors(provider, dtype, device)
    except Exception as error:  # a peer may fail in any way, which the report then names
        if kind not in PEERS:
            raise
        return None, why_absent(kind.package, error)


def admit(
    kind: type[LossProvider], case: Case, problem: Problem, device: torch.device
) -> tuple[LossProvider | None, dict]:
    """Checks a provider, runs it once and measures its memory. Returns it, or None if it cannot run, and its record."""
    dtype = problem.hidden.dtype
    provider, found = load(kind, dtype, device)
    if provider is None:
        return None, {"provider": kind.name, "absent": found}
    try:
        # On a GPU the first call also tunes, which needs additional memory.
        for _ in range(2 if device.type == "cuda" else 1):
            peak = added_peak(provider.stage(case.what, problem), device)
    except Exception as error:  # out of memory, mostly: that is a result, not a fault of the benchmark
        if kind is Toolx:
            raise
        return None, {"provider": kind.name, "absent": why_absent(kind.package, error)}
    finally:
        problem.forget_gradients()
    wrong = any(not error <= TOLERANCE[dtype] for error in found.values())
    record: dict[str, Any] = {"provider": kind.name, "errors": found, "wrong": wrong}
    if not isinstance(provider, Floor) and case.what != "backward":
        gradients = problem.gradient_bytes() if case.what == "both" else 0
        record |= {"mib": round(peak / MIB, 1), "mib_beyond_gradients": round((peak - gradients) / MIB, 1)}
    return provider, record


def measure(
    case: Case,
    kinds: Sequence[type[LossProvider]],
    device: torch.device,
    rounds: int = 3,
    benchmark: Any | None = None,
) -> dict:
    """Times ``kinds`` on one case; returns a record for each, with the reason, ``absent``, instead if it cannot run.

    ``benchmark``, pytest-benchmark's fixture, times our call too.
    """
    dtype = getattr(torch, case.dtype)
    problem = make_problem(case.n, case.d, case.v, dtype=dtype, device=device, dead=case.dead, frozen=case.frozen)
    records: dict[str, dict] = {}
    runners: dict[str, LossProvider] = {}
    times: dict[str, list[float]] = {}
    for kind in kinds:
        if case.what not in kind.passes or (kind is LiveFloor and not case.dead):
            continue
        provider, records[kind.name] = admit(kind, case, problem, device)
        if provider is not None:
            runners[kind.name], times[kind.name] = provider, []

    def run(name: str, call: Callable[[], object]) -> None:
        times[name].append(seconds(call, device))
        problem.forget_gradients()

    def once_is_enough(name: str) -> bool:
        ours = times[Toolx.name]
        peer = device.type == "cpu" and isinstance(runners[name], PEERS)
        return bool(peer and ours and times[name][0] > SLOW * ours[0])

    def others() -> tuple[str, Callable[[], object]]:
        for name, provider in runners.items():
            if name != Toolx.name and not once_is_enough(name):
                run(name, provider.stage(case.what, problem))
        return Toolx.name, runners[Toolx.name].stage(case.what, problem)

    take_rounds(run, others, rounds, benchmark)
    for name, taken in times.items():
        records[name] |= {"ms": round(1e3 * median(taken), 3), "rounds_ms": [round(1e3 * t, 3) for t in taken]}
    packages = dict.fromkeys(kind.package for kind in PEERS if kind.package)
    versions = {package: package_version(package) for package in packages}
    return {"case": asdict(case), "records": list(records.values()), "versions": versions}
