"""``toolx plan``: the estimated memory of a run."""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from toolx_kernels.cli import train
from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import InputError, short

if TYPE_CHECKING:
    from toolx_kernels.train.memory.plan import MemoryPlan

MOST_MEMORY, MOST_TOKENS = 10**6, 1 << 20  # GiB; of a prompt
DESCRIPTION = """\
Estimates the memory that toolx train takes with the same settings, before
anything is loaded, and suggests settings that fit. Exits with 1 if it does not
fit.

  toolx plan --model Qwen/Qwen2.5-1.5B-Instruct --memory 24
  toolx plan --config replace --optim adamw_8bit --dtype bfloat16
"""


def add_flags(parser: Parser) -> None:
    parser.usage = f"{parser.prog} [--memory GIB] [--config NAME ...] [--setting value ...]"
    parser.description = DESCRIPTION
    parser.flag(
        "memory",
        type=float,
        metavar="GIB",
        help="memory of the GPU, or with --device cpu of the machine (default: 24 for a GPU; without a GPU here, and "
        "with neither this nor --device, the plan is for this machine's CPU and memory)",
    )
    parser.flag(
        "prompt_length",
        type=int,
        metavar="N",
        help="tokens of the longest prompt, demonstrations included (default: measured if dataset and tokenizer are on "
        "this machine, otherwise 1000)",
    )
    parser.flag("json", action="store_true", help="print the plan as JSON")
    train.add_settings(parser)
    parser.epilog = textwrap.fill(f"Settings of toolx train are flags too, in groups: {', '.join(parser.groups)}.", 78)


def run(args: argparse.Namespace) -> int:
    flags = vars(args)
    given, prompt_length, as_json = (flags.pop(name) for name in ("memory", "prompt_length", "json"))
    if given is not None and not 0 < given <= MOST_MEMORY:
        raise InputError(f"--memory {given} must be a positive number of GiB, at most {MOST_MEMORY:,}.")
    if prompt_length is not None and not 1 <= prompt_length <= MOST_TOKENS:
        raise InputError(f"--prompt_length {short(prompt_length)} must be at least 1 and at most {MOST_TOKENS:,}.")
    config = train.config_from(flags)

    import torch

    from toolx_kernels.engine.pool_size import physical_memory
    from toolx_kernels.models.config import config_of
    from toolx_kernels.models.shape import EXPERTS_NOTE, has_experts
    from toolx_kernels.models.support import check_config
    from toolx_kernels.train.memory.plan import BF16_ON_CPU, GIB
    from toolx_kernels.train.memory.planner import Planner
    from toolx_kernels.train.memory.workload import Workload
    from toolx_kernels.train.run.folder import RunFolder

    if config.resume:
        RunFolder(config.output_dir).check_content(config)
    on_gpu = config.device.startswith("cuda") or (
        config.device == "auto" and (given is not None or torch.cuda.is_available())
    )
    memory = round((given or 24) * GIB) if on_gpu or given else physical_memory()
    assert config.model  # config_from names one
    shape = config_of(config.model)
    check_config(shape)
    work, assumed = Workload.planned(config, shape, prompt_length)
    planner = Planner(shape, device="cuda" if on_gpu else "cpu", memory=memory, workload=work)
    planned = planner.plan(config)
    better = None if planned.fits else planner.advice(config)
    if as_json:
        advice = {"settings": better[0], "plan": better[1].to_dict()} if better else None
        print(json.dumps(planned.to_dict() | {"work": asdict(work), "assumed": assumed, "advice": advice}, indent=2))
        return 0 if planned.fits else 1
    shown = f", {work.shown_length:,} with demonstrations" * (work.shown_length > work.prompt_length)
    print(f"{config.model}, {config.dtype}, {config.optim}; prompts of up to {work.prompt_length:,} tokens{shown}")
    if assumed:
        print(f"assumption: {assumed}")
    if has_experts(shape.get_text_config(decoder=True)):
        print(f"model: {EXPERTS_NOTE}")
    if not on_gpu and config.dtype == "bfloat16":
        print(f"bfloat16: {BF16_ON_CPU}")
    print(planned.table())
    print(verdict(planned, better))
    return 0 if planned.fits else 1


def verdict(planned: MemoryPlan, better: tuple[dict, MemoryPlan] | None) -> str:
    """Whether the plan fits, and what to change if it does not: ``better``, if anything helps."""
    from toolx_kernels.train.memory.plan import GIB
    from toolx_kernels.train.memory.planner import flags_of

    needs = f"Needs {planned.needed / GIB:.1f} GiB"
    device = f"{'a GPU' if planned.device == 'cuda' else 'a machine'} with {planned.memory / GIB:.1f} GiB"
    if planned.fits:
        return f"{needs}: fits {device}, with {(planned.memory - planned.needed) / GIB:.1f} GiB to spare."
    if better:
        settings, plan = better
        return (
            f"{needs}: does not fit {device}. It fits with {flags_of(settings)}, which needs "
            f"{plan.needed / GIB:.1f} GiB."
        )
    return (
        f"{needs}: does not fit {device}, nor with any optimizer, an adapter and the smallest micro-batches: choose "
        "shorter completions, fewer prompts per step, a smaller model, or more memory."
    )
