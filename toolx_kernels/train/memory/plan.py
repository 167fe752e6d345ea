"""The memory plan of a run, and its comparison with the measured memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from toolx_kernels.evaluate.tables import NOTHING, aligned

GIB = 1 << 30
# Memory outside tensors. On a GPU: CUDA's context, cuBLAS workspaces and fragmentation of the allocator; a guess, not
# measured. On a CPU: what importing torch and transformers takes.
OVERHEAD = {"cuda": 1 << 30, "cpu": 500 << 20}
# oneDNN's cache of primitives; how much it takes was not measured for this plan, because no such CPU was at hand.
BF16_ON_CPU = (
    "on a CPU with bfloat16 instructions, oneDNN keeps a kernel for each shape of a product, which has taken hundreds "
    "of MiB: they are not in this plan, and the environment variable ONEDNN_PRIMITIVE_CACHE_CAPACITY limits them"
)


class Bytes(NamedTuple):
    """Bytes on the model's device, and in the CPU's memory if that is separate."""

    device: int
    host: int = 0

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(self.device + other.device, self.host + other.host)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of a run, in bytes.

    parts     by name; ``gradients`` exist only from the first backward of a step to its update
    phases    the peak of each phase of a step, with all parts that exist then
    memory    of the device; compared with ``needed``
    kv        bytes of one token's keys and values, and of a step's rows with and without shared prompts
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
        """Peak bytes of all tensors: on a GPU what ``torch.cuda.max_memory_allocated`` should return."""
        return Bytes(max(p.device for p in self.phases.values()), max(p.host for p in self.phases.values()))

    @property
    def needed(self) -> int:
        """Bytes of the device's memory, overhead included; for a CPU, device and host memory together."""
        return max(self._measurable(phase) for phase in self.phases.values()) + (
            OVERHEAD["cuda"] if self.device == "cuda" else 0
        )

    @property
    def fits(self) -> bool:
        return self.needed <= self.memory

    def _measurable(self, phase: Bytes) -> int:
        """Returns the bytes that ``Phases`` would measure for a phase."""
        return phase.device if self.device == "cuda" else phase.device + phase.host + OVERHEAD["cpu"]

    def compared(self, measured: Mapping[str, int]) -> dict[str, dict[str, float]]:
        """Planned and measured bytes and their ratio, by phase and for the peak; ``measured`` as ``Phases.peaks``."""
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
        """Returns plain values for JSON."""
        columns = {
            name: {key: part._asdict() for key, part in getattr(self, name).items()} for name in ("parts", "phases")
        }
        plain = ("device", "memory", "parameters", "trained_parameters", "micro_batch_tokens", "kv", "needed", "fits")
        return {name: getattr(self, name) for name in plain} | columns

    def sentence(self) -> str:
        """One-line verdict, printed when a run starts."""
        needed, there = (f"{value / GIB:.1f} GiB" for value in (self.needed, self.memory))
        where = "GPU" if self.device == "cuda" else "machine"
        verdict = "" if self.fits else ", too much: toolx plan says what to change"
        return f"planned to need up to {needed} of the {there} of this {where}{verdict}"

    def table(self) -> str:
        """Table of parts and phases for a terminal, in GiB."""

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
