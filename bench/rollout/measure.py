"""Measurement of a rollout case: whole calls and calls for one token, all providers in turn in one process.

A round samples all tokens, and then one token of each row, which is the prefill. The difference, divided by the number
of tokens in between, is the decode step: the time in which every row gets one more token. Each round has new prompts,
the same for all, so that no provider finds the last round's prefixes in its cache. Peak memory comes from the first
call. A peer that needs several times our time makes its one-token calls only in the first round; on a GPU also its
whole calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.common.absent import Absent, why_absent
from bench.common.machine import package_version
from bench.common.timing import MIB, SLOW, added_peak, seconds, take_rounds
from bench.rollout.cases import Case, Floor, make_prompts, model_of, token_bytes
from bench.rollout.providers import PEERS, RolloutProvider, Toolx

FLOOR_STEPS = 5  # per round


def check_amount(completions: Sequence[Sequence[int]], case: Case, new: int) -> None:
    """Raises ``Absent`` if a provider did not do all of the work."""
    lengths = [len(completion) for completion in completions]
    if len(lengths) < case.rows or any(length < new for length in lengths):
        raise Absent(f"{sum(lengths)} of {case.rows * new} tokens after {case.limit_s:.0f} s")
    if sum(lengths) != case.rows * new:
        raise RuntimeError(f"{sum(lengths)} tokens instead of {case.rows * new}")


def measure(
    case: Case,
    peers: Sequence[type[RolloutProvider]],
    device: torch.device,
    rounds: int = 3,
    benchmark: Any | None = None,
) -> dict:
    """Times ours and ``peers``; returns a record for each, with the reason, ``absent``, instead if it cannot run.

    ``benchmark``, pytest-benchmark's fixture, times our whole call too.
    """
    model = model_of(case.model, case.dtype, device)
    vocab_size = model.get_output_embeddings().weight.shape[0]
    seed = iter(range(2 * rounds + 1))
    first = make_prompts(case, vocab_size, next(seed))
    records: dict[str, dict] = {}
    runners: dict[str, RolloutProvider] = {}
    times: dict[str, dict[str, list[float]]] = {}
    floor_times: dict[str, list[float]] = {"gemms": [], "read": []}

    def fail(name: str, kind: type[RolloutProvider], error: Exception) -> None:
        if kind is Toolx:
            raise error
        records[name] = {"provider": name, "absent": why_absent(kind.package, error)}
        if name in runners:
            runners.pop(name).close()

    for kind in (Toolx, *peers):
        try:
            provider, record = admit(kind, model, case, first, device)
        except Exception as error:  # a peer may fail in any way, which the report then names
            fail(kind.name, kind, error)
            continue
        runners[kind.name], records[kind.name] = provider, record
        times[kind.name] = {"whole": [], "prefill": []}

    floor = Floor(model, case)
    floor.gemms(), floor.read()

    def run(name: str, what: str, prompts: list[list[int]]) -> None:
        new = case.new if what == "whole" else 1
        result: list[list[int]] = []
        times[name][what].append(seconds(lambda: result.extend(runners[name].generate(prompts, new)), device))
        check_amount(result, case, new)

    def once_is_enough(name: str, what: str) -> bool:
        ours, taken = times[Toolx.name][what], times[name][what]
        slow = name != Toolx.name and bool(taken) and bool(ours) and taken[0] > SLOW * ours[0]
        return slow and (what == "prefill" or device.type == "cuda")

    def others() -> tuple[str, str, list[list[int]]]:
        prompts = {what: make_prompts(case, vocab_size, next(seed)) for what in ("whole", "prefill")}
        for name in list(runners):
            try:
                for what in ("whole", "prefill"):
                    if (name, what) != (Toolx.name, "whole") and not once_is_enough(name, what):
                        run(name, what, prompts[what])
            except Exception as error:
                fail(name, type(runners[name]), error)
        floor_times["gemms"].append(seconds(lambda: [floor.gemms() for _ in range(FLOOR_STEPS)], device) / FLOOR_STEPS)
        floor_times["read"].append(seconds(floor.read, device))
        return Toolx.name, "whole", prompts["whole"]

    try:
        take_rounds(run, others, rounds, benchmark)
    finally:
        for provider in runners.values():
            provider.close()
    for name in runners:
        records[name] |= figures(case, times[name])
    duplicated = round(case.rows * (case.length + case.new) * token_bytes(model) / MIB, 1)
    return {
        "case": asdict(case) | {"kv_duplicated_mib": duplicated},
        "records": list(records.values()),
        "floor": floor_figures(floor, floor_times),
        "versions": {kind.package: package_version(kind.package) for kind in PEERS},
    }


def admit(
    kind: type[RolloutProvider], model: PreTrainedModel, case: Case, prompts: list[list[int]], device: torch.device
) -> tuple[RolloutProvider, dict]:
    """The provider after its first whole call, and its record with memory."""
    provider = kind(model, case)
    completions: list[list[int]] = []
    try:
        peak = added_peak(lambda: completions.extend(provider.generate(prompts, case.new)), device)
        check_amount(completions, case, case.new)
    except Exception:
        provider.close()
        raise
    record: dict[str, Any] = {"provider": kind.name, "note": provider.note}
    if provider.kv_bytes is not None:
        record["kv_mib"] = round(provider.kv_bytes / MIB, 1)
    if not provider.own_pool:
        record["peak_mib"] = round(peak / MIB, 1)
    return provider, record


def figures(case: Case, times: dict[str, list[float]]) -> dict:
    whole, prefill = median(times["whole"]), median(times["prefill"])
    return {
        "tokens_per_s": round(case.rows * case.new / whole, 2),
        "whole_s": round(whole, 4),
        "prefill_s": round(prefill, 4),
        "step_ms": round(1e3 * (whole - prefill) / (case.new - 1), 3),
        "rounds_s": {what: [round(t, 4) for t in taken] for what, taken in times.items()},
    }


def floor_figures(floor: Floor, times: dict[str, list[float]]) -> dict:
    """``ms`` is the floor; ``bytes_ms`` counts the weights, too, by their bytes, as if GEMMs cost nothing else."""
    gemms, bandwidth = median(times["gemms"]), floor.bytes_per_second(median(times["read"]))
    kv = floor.kv_bytes / bandwidth
    return {
        "gemms_ms": round(1e3 * gemms, 4),
        "kv_ms": round(1e3 * kv, 4),
        "ms": round(1e3 * (gemms + kv), 4),
        "bytes_ms": round(1e3 * (floor.weight_bytes + floor.kv_bytes) / bandwidth, 4),
        "weight_mib": round(floor.weight_bytes / MIB, 1),
        "kv_mib": round(floor.kv_bytes / MIB, 1),
        "bandwidth_gb_s": round(bandwidth / 1e9, 2),
    }
