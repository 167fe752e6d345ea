"""What a run says of its cost: seconds by phase, the share of the device's arithmetic, memory planned and measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from toolx_kernels.errors import InputError
from toolx_kernels.rollout.pages import physical_memory
from toolx_kernels.train.batch import PackedGroup
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.flops import Flops, gemm_speed
from toolx_kernels.train.memory import Plan
from toolx_kernels.train.phases import Phases
from toolx_kernels.train.plan import plan_of
from toolx_kernels.train.rollouts import ScoredGroup


@dataclass(slots=True)
class StepCost:
    """The ``timing`` of a step's line in metrics.jsonl.

    seconds             of the whole step
    phases              seconds of each: rollout, reward, forward, backward, optimizer
    tokens_per_second   written in its rollouts, by the time of these
    flop_share          of its floating-point operations (``Flops``) in what a bare GEMM of the weights' dtype achieves
    """

    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    flop_share: float = 0.0

    def to_dict(self) -> dict:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __str__(self) -> str:
        """For the progress bar, e.g. ``812 tok/s, rollout 61%, backward 22%, forward 11%``."""
        largest = sorted(self.phases.items(), key=lambda of_phase: -of_phase[1])
        shares = (f"{name} {spent / self.seconds:.0%}" for name, spent in largest if spent >= 0.05 * self.seconds)
        return ", ".join([f"{self.tokens_per_second:.0f} tok/s", *shares])


class Accounts:
    """Keeps the accounts of one run with ``model``; ``phases`` is what its parts book their time and memory with."""

    def __init__(self, model: PreTrainedModel, args: ToolExpanderConfig):
        self.model, self.args = model, args
        self.phases = Phases(model.device)
        self._flops = Flops(model)
        self._gemm_speed = 0.0  # measured at the first step

    @contextmanager
    def step(self, cost: StepCost, sampled: list[ScoredGroup], trained: list[PackedGroup]) -> Iterator[None]:
        """Around a step: fills in its ``cost``, from what it ``sampled`` and ``trained``, lists that it fills."""
        self._gemm_speed = self._gemm_speed or gemm_speed(self.model.device, self.model.dtype)
        started, before = time.perf_counter(), self.phases.seconds.copy()
        yield
        cost.seconds, cost.phases = time.perf_counter() - started, self.phases.since(before)
        lengths = [(len(group.prompt), [len(rollout.ids) for rollout in group.rollouts]) for group in sampled]
        flops = self.args.num_iterations * self._flops.trained(trained)
        flops += sum(self._flops.sampled(*of_group) for of_group in lengths)
        cost.flop_share = flops / cost.seconds / self._gemm_speed
        written = sum(rollout.written for group in sampled for rollout in group.rollouts)
        cost.tokens_per_second = written / cost.phases["rollout"]

    @contextmanager
    def profiled(self, step: int, trace: Path) -> Iterator[None]:
        """Around step number ``step``: under torch's profiler where it is the one that was asked for."""
        if step != self.args.profile_step:
            yield
            return
        with torch.profiler.profile() as profiler:
            yield
        profiler.export_chrome_trace(str(trace))

    def plan(self, prompt_length: int, probe_rows: int) -> Plan | None:
        """What the run's memory is to be, by its settings; None of a model that cannot be planned for."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else physical_memory()
        try:
            return plan_of(
                self.model.config, replace(self.args, dtype=str(self.model.dtype).removeprefix("torch.")),
                device=device.type, memory=memory, prompt_length=prompt_length, probe_rows=probe_rows,
            )  # fmt: skip
        except InputError:
            return None

    def summary(self, plan: Plan | None) -> dict:
        """Of the whole run, for ``summary.json``."""
        peaks = self.phases.memory.peaks
        return {
            "peak_memory_bytes": max(peaks.values(), default=0),
            "phases": {name: round(spent, 1) for name, spent in self.phases.seconds.items()},
            "memory": plan.beside(peaks) if plan else None,
        }
