"""``toolx plan``."""

from __future__ import annotations

from dataclasses import asdict

from toolx_kernels.cli.parser import _Parser
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError  # noqa: E402


def plan(argv: list[str]) -> int:
    parser = _Parser(
        prog="toolx plan", allow_abbrev=False,
        description="The memory that toolx train would take with the same flags, told before anything is loaded, and "
        "what to change if it does not fit. The exit code is 1 if it does not.",
        epilog="All other flags are those of toolx train: see toolx train --help.",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=float,
        help="GiB of the GPU to plan for (default: 24), or of the machine with --device cpu. Left out, where torch "
        "sees no GPU and --device names none, the plan is for the CPU and the memory of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--prompt_length", "--prompt-length", type=int,
        help="tokens of the longest prompt, its demonstrations included (default: found where the dataset is on this "
        "machine, else 1000)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    own, others = parser.parse_known_args(argv)
    if own.memory is not None and not 0 < own.memory < float("inf"):
        raise InputError(f"--memory {own.memory} must be a positive number of GiB.")
    if own.prompt_length is not None and own.prompt_length < 1:
        raise InputError(f"--prompt_length {own.prompt_length} must be at least 1.")
    args = parse_train(others)

    import json

    import torch

    from toolx_kernels.engine.pages import physical_memory
    from toolx_kernels.models.config import config_of
    from toolx_kernels.train.memory.at_hand import work_at_hand
    from toolx_kernels.train.memory.plan import GIB
    from toolx_kernels.train.memory.planner import Planner, flags_of
    from toolx_kernels.train.memory.work import Work
    from toolx_kernels.train.run.folder import RunFolder

    if args.resume:
        RunFolder(args.output_dir).check(args)
    on_gpu = args.device.startswith("cuda") or (
        args.device == "auto" and (own.memory is not None or torch.cuda.is_available())
    )
    memory = round((own.memory or 24) * GIB) if on_gpu or own.memory else physical_memory()
    config = config_of(args.model)
    seen = None if own.prompt_length else work_at_hand(args, config)
    work = seen or Work.assumed(args, own.prompt_length or 1000)
    planner = Planner(config, device="cuda" if on_gpu else "cpu", memory=memory, work=work)
    planned = planner.plan(args)
    better = None if planned.fits else planner.advice(args)
    if own.json:
        found = {"settings": better[0], "plan": better[1].to_dict()} if better else None
        print(json.dumps(planned.to_dict() | {"work": asdict(work), "advice": found}, indent=2))
        return 0 if planned.fits else 1
    shown = f", {work.shown_length:,} with demonstrations" * (work.shown_length > work.prompt_length)
    print(f"{args.model}, {args.dtype}, {args.optim}; prompts of up to {work.prompt_length:,} tokens{shown}")
    print(planned.table())
    device = f"{'a GPU' if on_gpu else 'a machine'} with {memory / GIB:.1f} GiB"
    needed = f"{planned.needed / GIB:.1f} GiB"
    if planned.fits:
        print(f"Needs {needed}: fits {device}, with {(memory - planned.needed) / GIB:.1f} GiB to spare.")
    elif better:
        print(
            f"Needs {needed}: does not fit {device}. It fits with {flags_of(better[0])}, which needs "
            f"{better[1].needed / GIB:.1f} GiB."
        )
    else:
        print(
            f"Needs {needed}: does not fit {device}, nor with any optimizer, an adapter and the smallest "
            "micro-batches: take shorter completions, fewer prompts a step, a smaller model, or more memory."
        )
    return 0 if planned.fits else 1
