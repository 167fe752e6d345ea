"""What a run says of its cost: seconds by phase, the share of the device's arithmetic, memory planned and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from toolx_kernels.engine.pages import physical_memory
from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import ScoredGroup
from toolx_kernels.train.memory.flops import Flops, gemm_speed
from toolx_kernels.train.memory.plan import MemoryPlan
from toolx_kernels.train.memory.planner import plan_of
from toolx_kernels.train.memory.work import Work
from toolx_kernels.train.phases import Phases

BETWEEN = ("probe", "evaluation")  # phases that belong to no step


class Accounts:
    """Keeps the accounts of one run with ``model``; ``phases`` is what its parts book their time and memory with."""

    def __init__(self, model: PreTrainedModel, args: ToolExpanderConfig):
        self.model, self.args = model, args
        self.phases = Phases(model.device)
        self._flops = Flops(model)
        self._gemm_speed: float | None = None  # measured at the first step
        self._told = self.phases.seconds.copy()  # by the steps so far

    def resume(self, seconds: Mapping[str, float], peaks: Mapping[str, int]) -> None:
        """Goes on from what ``phases`` had when the run was saved."""
        self.phases.seconds.update(seconds)
        self.phases.peaks.update(peaks)
        self._told = self.phases.seconds.copy()

    def start_step(self) -> Callable[[Sequence[ScoredGroup], Sequence[ScoredGroup]], dict]:
        """A step begins; what comes back is to be called at its end with the groups that it sampled and trained on.

        That gives the ``timing`` of the step's line in metrics.jsonl:

        seconds             of the whole step
        phases              seconds of each: rollout, reward, forward, backward, optimizer; and what came between the
                            step before and this one: probe, evaluation
        tokens_per_second   written in its rollouts, by the time of these
        flop_share          of its floating-point operations (``Flops``) in what a bare GEMM of the weights' dtype does;
                            None where there is no memory for one
        """
        if self._gemm_speed is None:
            self._gemm_speed = gemm_speed(self.model.device, self.model.dtype)
        started, before = time.perf_counter(), self.phases.seconds.copy()
        between = {name: spent for name, spent in self.phases.since(self._told).items() if name in BETWEEN}

        def timing(sampled: Sequence[ScoredGroup], trained: Sequence[ScoredGroup]) -> dict:
            seconds, phases = time.perf_counter() - started, between | self.phases.since(before)
            self._told = self.phases.seconds.copy()
            learned = self._flops.trained(trained, self.args.num_iterations, reference=bool(self.args.beta))
            flops = self._flops.sampled(sampled) + learned
            written = sum(rollout.written for group in sampled for rollout in group.rollouts)
            return {
                "seconds": seconds,
                "phases": phases,
                "tokens_per_second": written / phases["rollout"],
                "flop_share": flops / seconds / self._gemm_speed if self._gemm_speed else None,
            }

        return timing

    @contextmanager
    def profiled(self, step: int, trace: Path) -> Iterator[None]:
        """Around step number ``step``: under torch's profiler where it is the one that was asked for."""
        if step != self.args.profile_step:
            yield
            return
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(trace))

    def plan(self, work: Work) -> MemoryPlan | None:
        """What the run's memory is to be, by its settings; None of a model that cannot be planned for."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else physical_memory()
        try:
            return plan_of(
                self.model.config, replace(self.args, dtype=str(self.model.dtype).removeprefix("torch.")),
                device=device.type, memory=memory, work=work,
            )  # fmt: skip
        except InputError:
            return None

    def summary(self, plan: MemoryPlan | None) -> dict:
        """Of the whole run, for ``summary.json``."""
        peaks = self.phases.peaks
        return {
            "peak_memory_bytes": max(peaks.values(), default=0),
            "phases": {name: round(spent, 1) for name, spent in self.phases.seconds.items()},
            "memory": plan.beside(peaks) if plan else None,
        }


def describe_timing(timing: dict) -> str:
    """For the progress bar, e.g. ``812 tok/s, 31% of a GEMM, rollout 61%, backward 22%, forward 11%``."""
    largest = sorted(timing["phases"].items(), key=lambda of_phase: -of_phase[1])
    whole = sum(timing["phases"].values())
    parts = ((name, spent / whole) for name, spent in largest)
    shares = [f"{name} {share:.0%}" for name, share in parts if share >= 0.05]
    speed = [f"{timing['tokens_per_second']:.0f} tok/s"]
    if timing["flop_share"] is not None:
        speed.append(f"{timing['flop_share']:.0%} of a GEMM")
    return ", ".join([*speed, *shares])
