"""Planned and measured memory of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from toolx_kernels.evaluate.tables import NOTHING, aligned

GIB = 1 << 30
# What no tensor accounts for. Of a GPU: CUDA's context, cuBLAS' workspaces and what the allocator cannot hand out
# again; a guess, as no such measurement has been made. Of a CPU: what torch and transformers take when imported.
OVERHEAD = {"cuda": 1 << 30, "cpu": 500 << 20}


class Bytes(NamedTuple):
    """Bytes on the device that the model is on, and in the CPU's memory next to it."""

    device: int
    host: int = 0

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a run, in bytes.

    parts     by name; ``gradients`` only from the first backward of a step to its update
    phases    the peak of each phase of a step, with all parts that exist then
    memory    of the device, to which ``needed`` is compared
    kv        bytes of a token's keys and values, and of a step's rows when they share prompts and when they do not
    """

    device: str  # "cuda" or "cpu"
    memory: int
    parameters: int
    trained_parameters: int
    micro_batch_tokens: int
    parts: dict[str, Bytes]
    phases: dict[str, Bytes]
    kv: dict[str, int]

    @property
    def peak(self) -> Bytes:
        """Of all tensors: on a GPU what ``torch.cuda.max_memory_allocated`` should give."""
        return Bytes(max(p.device for p in self.phases.values()), max(p.host for p in self.phases.values()))

    @property
    def needed(self) -> int:
        """Bytes of the device's memory, what surrounds the tensors included; a CPU's is all the memory there is."""
        return max(self._measurable(phase) for phase in self.phases.values()) + (
            OVERHEAD["cuda"] if self.device == "cuda" else 0
        )

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    def _measurable(self, phase: Bytes) -> int:
        """The bytes that ``Phases`` would measure of a phase."""
        return phase.device if self.device == "cuda" else phase.device + phase.host + OVERHEAD["cpu"]

    def compared(self, measured: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Planned and measured bytes, and their ratio, by phase and in all; ``measured`` as ``Phases.peaks``."""
        both = {
            name: (self._measurable(phase), measured[name]) for name, phase in self.phases.items() if name in measured
        }
        if both:
            both["peak"] = tuple(map(max, zip(*both.values(), strict=True)))
        return {
            name: {"planned": ours, "measured": theirs, "planned_by_measured": round(ours / theirs, 3)}
            for name, (ours, theirs) in both.items()
        }

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        columns = {
            name: {key: part._asdict() for key, part in getattr(self, name).items()} for name in ("parts", "phases")
        }
        plain = ("device", "memory", "parameters", "trained_parameters", "micro_batch_tokens", "kv", "needed", "fits")
        return {name: getattr(self, name) for name in plain} | columns

    def sentence(self) -> str:
        """For the beginning of a run."""
        needed, there = (f"{value / GIB:.1f} GiB" for value in (self.needed, self.memory))
        where = "GPU" if self.device == "cuda" else "machine"
        verdict = "" if self.fits else ", too much: toolx plan tells what to change"
        return f"planned to need up to {needed} of the {there} of this {where}{verdict}"

    def table(self) -> str:
        """For a screen, in GiB."""

        def row(name: str, part: Bytes) -> list[str]:
            columns = part if self.device == "cuda" else (part.device + part.host,)
            return [name, *(f"{value / GIB:.2f}" if value else NOTHING for value in columns)]

        cells = [["GiB", "GPU", "CPU"] if self.device == "cuda" else ["GiB", "CPU"]]
        cells += [row(name, part) for name, part in self.parts.items()]
        cells += [row(f"peak of {name}", phase) for name, phase in self.phases.items()]
        cells += [row("around the tensors", Bytes(OVERHEAD[self.device]))]
        shared, apart = (f"{self.kv[key] / GIB:.2f}" for key in ("step_shared", "step_duplicated"))
        lines = [
            f"{self.parameters / 1e6:,.1f} million parameters, {self.trained_parameters / 1e6:,.1f} million trained; "
            f"micro-batches of {self.micro_batch_tokens:,} tokens",
            aligned(cells),
            f"Keys and values take {self.kv['token'] / 1024:.0f} KiB a token; those of a step's rollouts {shared} GiB "
            f"with shared prompts, {apart} without.",
        ]
        return "\n".join(lines)
