"""Training facts on a GPU: the tiny model end to end, and optimizer steps of real shapes, with planned and measured
memory, within the 24 GB of a consumer card.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench.common.timing import peak, reset_peak, synchronize
from bench.gpu.loss import profiled
from bench.gpu.runner import Bench, Fact
from bench.rollout.cases import model_of
from bench.step.cases import SETTINGS, Case, Count, make_rows
from bench.step.providers import Toolx
from toolx_kernels.cli import commands
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.train.memory.planner import plan_of
from toolx_kernels.train.memory.workload import Workload

SAMPLED = 4096  # entries of each parameter that are compared before and after
PLAN_TOLERANCE = 0.1  # of the measured peak
# A 24 GB card has 24 GiB; the 1.8 GB between the two are for the CUDA context and the desktop.
MEMORY_CAP_BYTES = 24e9


def best_of_1_5b() -> str:
    """The optimizer of the 1.5B shape: 8-bit states if torchao is installed, else masters and moments in CPU memory."""
    return "adamw_8bit" if importlib.util.find_spec("torchao") else "adamw_offload"


@dataclass(frozen=True, slots=True)
class Run:
    """Updates of ``case`` with one optimizer and gradient checkpointing."""

    case: Case
    optim: str


def runs() -> dict[str, Run]:
    def case(size: str) -> Case:
        return Case(f"qwen2.5-{size}-shape", 32, 1000, 10, 256, "bfloat16", rounds=2)

    return {
        "0.5b": Run(case("0.5b"), "adamw"),
        "1.5b": Run(case("1.5b"), best_of_1_5b()),
        "3b": Run(case("3b"), "adamw_offload"),
    }


class Trained(Toolx):
    def __init__(self, options: dict, *others):
        self.options = options
        super().__init__(*others)


@contextmanager
def trainer_of(run: Run, device: torch.device) -> Iterator[tuple[Trained, Count]]:
    """The trainer that takes the steps of ``run``, and their count; the trainer's folder exists during the block."""
    case, tokenizer = run.case, tiny_tokenizer()
    rows = make_rows(case, chat := Chat(tokenizer))
    count = Count(case, [len(chat.prompt_ids(row)) for row in rows])
    options = {"optim": run.optim, "gradient_checkpointing": True, "device": device.type}
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(case.model, case.dtype, device)
        yield Trained(options, model, tokenizer, case, SETTINGS, rows, count.reward, Path(folder)), count


def take_steps(run: Run, device: torch.device) -> dict:
    """Takes the steps of ``run``: seconds of each, planned and measured peak, and the share of weights that moved."""
    case, most = run.case, 0
    model = model_of(case.model, case.dtype, device)
    before = sampled_weights(model)
    reset_peak(device)
    with trainer_of(run, device) as (trainer, count):

        def look() -> None:
            nonlocal most
            most = max(most, peak(device), trainer.own_peak())

        def begin() -> None:
            look()
            count.begin()

        def end() -> None:
            synchronize(device)
            count.end()
            look()

        trainer.run(begin, end)
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else sys.maxsize
    plan = plan_of(
        model.config, trainer.args, device=device.type, memory=memory, workload=Workload(case.length, case.length, 0, 0)
    )
    moved = [float((new != old).double().mean()) for new, old in zip(sampled_weights(model), before, strict=True)]
    return {
        "model": case.model,
        "optim": run.optim,
        "steps_s": [round(step["step_s"], 3) for step in count.steps],
        "rollouts_s": [round(step["rollout_s"], 3) for step in count.steps],
        "step_s": round(median(step["step_s"] for step in count.steps[1:]), 3),
        "trained_tokens": [record["trained_tokens"] for record in trainer.records],
        "grad_norms": [update["grad_norm"] for update in trainer.updates()],
        "planned_bytes": plan.peak.device,
        "planned_host_bytes": plan.peak.host,
        "measured_bytes": most,
        "planned_by_measured": round(plan.peak.device / most, 3),
        "moved": sum(moved) / len(moved),
    }


def sampled_weights(model: torch.nn.Module) -> Sequence[torch.Tensor]:
    """Evenly spread entries of every parameter, in CPU memory."""
    flat = [parameter.detach().flatten() for parameter in model.parameters()]
    return [values[:: max(1, len(values) // SAMPLED)].to("cpu", copy=True) for values in flat]


@contextmanager
def capped(device: torch.device) -> Iterator[None]:
    """Limits torch to the memory of a 24 GB card during the block."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, MEMORY_CAP_BYTES / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def steps(size: str, seconds: float) -> Fact:
    """Takes optimizer steps of one shape; fails if the plan is off by more than a tenth, or if no weight moves."""

    def find(bench: Bench) -> dict:
        run = Run(Case("tiny", 3, 40, 4, 6, rounds=2), "adamw") if bench.toy else runs()[size]
        with capped(bench.device):
            found = take_steps(run, bench.device)
        failures = []
        # on a CPU, the plan does not include the memory of Python and torch
        if bench.device.type == "cuda" and not abs(found["planned_by_measured"] - 1) <= PLAN_TOLERANCE:
            planned, took = (found[name] / 1e9 for name in ("planned_bytes", "measured_bytes"))
            failures.append(f"planned {planned:.2f} GB, took {took:.2f} GB")
        if not found["moved"] > 0:
            failures.append(f"no weight moved in {len(found['steps_s'])} steps with {found['optim']}")
        return found | {"failures": failures}

    return Fact(f"train/steps {size}", seconds, find)


def kernels(bench: Bench) -> dict:
    """The time of a step of four prompts, rollout and update, kernel by kernel."""
    case = Case("tiny", 2, 40, 2, 4, rounds=5)
    if not bench.toy:
        case = Case("qwen2.5-0.5b-shape", 4, 1000, 10, 256, "bfloat16", rounds=5)
    with trainer_of(Run(case, "adamw"), bench.device) as (trainer, count):

        def step() -> None:
            count.begin()
            trainer.records.append(trainer.trainer.step())
            count.end()

        step()
        found = profiled(step, bench, listed=30)
        phases = trainer.records[-2]["timing"]["phases"]  # of the last step without a profiler
    return found | {f"{name}_s": seconds for name, seconds in phases.items()}


def tiny(bench: Bench) -> dict:
    """Runs ``toolx train`` like ``make train``, for fewer steps; held-out accuracy must rise."""
    size = ["--max_steps", "30"]
    if bench.toy:
        size = ["--max_steps", "1", "--cold_start_steps", "2", "--eval_rows", "4", "--train_rows", "8"]
    folder = bench.scratch / "train"
    code = commands.main(["train", "--device", bench.device.type, "--output_dir", str(folder), "--overwrite", *size])
    if code:
        return {"failures": [f"toolx train ended with status {code}"]}
    run = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ("eval_before", "eval_after", "steps", "sampled_tokens", "wall_seconds", "peak_memory_bytes")
    rose = bench.toy or run["eval_after"] > run["eval_before"]
    return {name: run[name] for name in names} | {"failures": [] if rose else ["held-out accuracy did not rise"]}
