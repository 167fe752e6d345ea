"""``toolx train | eval | compare | plan | doctor``. Bad input ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

# Two OpenMP pools that spin while waiting slow each other down many times; this must be set before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# transformers loads torchao, where it is installed, and that complains of parts for other machines and of torch.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)

from toolx_kernels.errors import MEMORY_ERRORS, InputError, first_line, out_of_memory  # noqa: E402

MAX_COMPLETION_LENGTH = 256  # of toolx eval
USAGE = """usage: toolx <command> [flags]

  train    train a model to call tools; without flags: the built-in task, in minutes on a laptop
  eval     score a model or checkpoint on datasets
  compare  put learning curves and final figures of several runs side by side
  plan     the memory that a run would take, before anything is loaded, and what to change if it does not fit
  doctor   what is installed here, and which backend each op uses

toolx <command> --help lists the flags.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": train, "eval": evaluate, "compare": compare, "plan": plan, "doctor": doctor}
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        print(f"toolx: {argv[0]!r} is no command: use one of {', '.join(commands)}.", file=sys.stderr)
        return 2
    try:
        return commands[argv[0]](argv[1:])
    except InputError as error:
        print(f"toolx {argv[0]}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be written, a full disk
        print(f"toolx {argv[0]}: {error.filename or 'file'}: {error.strerror or error}.", file=sys.stderr)
        return 2
    except MEMORY_ERRORS as error:
        if not out_of_memory(error):
            raise
        print(
            f"toolx {argv[0]}: memory ran out ({first_line(error)}): toolx plan tells what a run needs and what to "
            "change; a run goes on from its last checkpoint with --resume.",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        remedy = "; the same command with --resume goes on from the last checkpoint" if argv[0] == "train" else ""
        print(f"toolx {argv[0]}: interrupted{remedy}.", file=sys.stderr)
        return 130


def train(argv: list[str]) -> int:
    args = parse_train(argv)
    from transformers.utils import logging

    from toolx_kernels.toolcall.datasets import builtin_turns
    from toolx_kernels.train.cold_start import built_in_cold_start
    from toolx_kernels.train.rows import load_demonstrations, load_rows
    from toolx_kernels.train.run.folder import RunFolder
    from toolx_kernels.train.run.stopping import Stopped, stop_on_signals
    from toolx_kernels.train.trainer import ToolExpanderTrainer

    logging.disable_progress_bar()  # ours is enough
    RunFolder(args.output_dir).check(args)
    try:
        with stop_on_signals() as stop:
            rows, eval_rows = load_rows(args)
            summary = ToolExpanderTrainer(
                args.model,
                args=args,
                train_dataset=rows,
                eval_dataset=eval_rows,
                cold_start=built_in_cold_start(args),
                demonstrations=load_demonstrations(args.demonstration_dataset),
                environment_factory=builtin_turns.Registry if args.dataset == "builtin-turns" else None,
            ).train(stop)
    except Stopped as stopped:
        saved = RunFolder(args.output_dir).latest_checkpoint()
        how = f"--resume goes on from {saved}" if saved else "nothing was saved yet, so --overwrite starts it again"
        print(f"toolx train: stopped by {stopped.signal.name}: {how}.", file=sys.stderr)
        return 128 + stopped.signal
    before = "not evaluated" if summary["eval_before"] is None else f"{summary['eval_before']:.3f}"
    seen = summary["eval_rows_seen"]
    hard = f"hard rows {summary['hard_before']} -> {summary['hard_after']} of {summary['probed_rows']}; "
    print(
        f"accuracy on {summary['eval_rows']} rows of {args.eval_dataset or args.dataset} "
        f"{f'({seen} of them shown in training)' if seen else 'held out from training'}: "
        f"{before} -> {summary['eval_after']:.3f}; {hard if summary['probed_rows'] else ''}{summary['steps']} steps, "
        f"{summary['wall_seconds']:.0f} s; see {args.output_dir}/curves.png and {args.output_dir}/summary.json"
    )
    return 0


def parse_train(argv: list[str]):
    """The run's config: defaults, then the recipe of the tiny model, then ``--config``'s YAML, then flags.

    With ``--resume`` the settings that the run was started with stand in for recipe and YAML.
    """
    from transformers import HfArgumentParser

    from toolx_kernels.models.tiny import is_tiny
    from toolx_kernels.train.config import ToolExpanderConfig
    from toolx_kernels.train.run.folder import CONFIG, RunFolder

    class Parser(_OneSentence, HfArgumentParser):
        pass

    parser = Parser(ToolExpanderConfig, prog="toolx train", allow_abbrev=False)
    parser.add_argument(
        "--config", nargs="+", action="extend",
        help="YAML files, or names of those in toolx_kernels/configs; of two values the later file's counts; the tiny "
        "model starts from builtin",
    )  # fmt: skip
    for action in parser._actions:  # only what was typed
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    flags = vars(parser.parse_args(argv))
    settings = {}
    for config in flags.pop("config", ()):
        settings |= read_config(config)
    settings |= flags
    names = list(ToolExpanderConfig.__dataclass_fields__)
    if unknown := [name for name in settings if name not in names]:
        raise InputError(f"--config: {unknown[0]!r} is not a setting: see toolx train --help.")
    run = Path(str(settings.get("output_dir") or ToolExpanderConfig().output_dir))
    if settings.get("resume") and (run / CONFIG).exists():
        started = RunFolder(run).config()
        settings = {**{name: started[name] for name in names if name in started}, **settings, "output_dir": str(run)}
    settings = {"model": "tiny", "dataset": "builtin"} | {
        k: v for k, v in settings.items() if v is not None or k not in ("model", "dataset")
    }
    if is_tiny(settings["model"]):
        recipe = settings["dataset"] if settings["dataset"] in ("builtin", "builtin-turns") else "builtin"
        settings = read_config(recipe) | settings
    return ToolExpanderConfig(**settings)


def read_config(name: str) -> dict:
    """The settings of a YAML file, or of the recipe of that name in ``toolx_kernels/configs``."""
    import yaml

    recipes = files("toolx_kernels") / "configs"
    path = Path(name) if Path(name).is_file() else recipes / f"{name}.yaml"
    if not path.is_file():
        shipped = sorted(
            recipe.name.removesuffix(".yaml") for recipe in recipes.iterdir() if recipe.name.endswith(".yaml")
        )
        raise InputError(f"--config {name}: there is no such file, and the recipes are {', '.join(shipped)}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {name} is not YAML: {first_line(error)}.") from None
    if not isinstance(settings, dict):
        raise InputError(f"--config {name} must hold one setting per line, as 'learning_rate: 0.0005'.")
    return settings


class _OneSentence:
    """A parser whose errors are one sentence instead of a page of usage."""

    def error(self, message):
        raise InputError(f"{message}; see {self.prog} --help.")


class _Parser(_OneSentence, argparse.ArgumentParser):
    pass


def evaluate(argv: list[str]) -> int:
    parser = _Parser(
        prog="toolx eval", allow_abbrev=False,
        description="Accuracy per category with 95 %% intervals; of several samples a row also pass@k.",
    )  # fmt: skip
    parser.add_argument(
        "--model", default="runs/train", help="as for toolx train, or a run folder (default: runs/train)"
    )
    parser.add_argument(
        "--dataset", nargs="+", default=["builtin"],
        help="one or several of: builtin, builtin-turns, bfcl:<category>, bfcl:single_turn (the eight categories, "
        "2,351 rows, that the paper averages over), seal-tools:<path>, a .jsonl path, a hub name",
    )  # fmt: skip
    parser.add_argument("--eval_rows", "--eval-rows", type=int, help="so many rows a dataset, drawn with a fixed seed")
    parser.add_argument(
        "--split", choices=("all", "held-out"), default="all",
        help="held-out: only the part that toolx train --dataset of the same name does not train on",
    )  # fmt: skip
    parser.add_argument("--eval_fraction", "--eval-fraction", type=float, default=0.2, help="as in toolx train")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--num_generations", "--num-generations", type=int, default=1, help="completions per row")
    parser.add_argument("--k", type=int, nargs="+", default=[], help="report pass@k for these k")
    parser.add_argument(
        "--max_completion_length", "--max-completion-length", type=int,
        help=f"tokens (default: {MAX_COMPLETION_LENGTH}, or what the model's run had, if that is more)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--self_exemplify", "--self-exemplify", action="store_true",
        help="the model writes examples and thinks first; a run that was trained so is known by its folder",
    )  # fmt: skip
    parser.add_argument("--output", help="a new folder for scores.json, scores.md and answers.jsonl")
    args = parser.parse_args(argv)
    for flag in ("eval_rows", "max_completion_length"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise InputError(f"--{flag} {getattr(args, flag)} must be at least 1.")
    if not 0 < args.eval_fraction < 1:
        raise InputError(f"--eval_fraction {args.eval_fraction} must lie between 0 and 1.")
    if twice := [name for name in args.dataset if args.dataset.count(name) > 1]:
        raise InputError(f"--dataset names {twice[0]} twice: name it once.")
    if args.model == parser.get_default("model") and not Path(args.model).exists():
        raise InputError(f"There is no run in {args.model}: run toolx train first, or name a --model.")

    from transformers.utils import logging

    from toolx_kernels.engine import RolloutEngine, SamplingParams
    from toolx_kernels.evaluate.evaluate import check_sampling
    from toolx_kernels.evaluate.evaluate import evaluate as score
    from toolx_kernels.evaluate.scores import check_new, describe, new_folder, write_scores
    from toolx_kernels.models.load import load_model, stop_token_ids
    from toolx_kernels.rollout.tool_loop import ToolLoop
    from toolx_kernels.toolcall.datasets.builtin_turns import MAX_TURNS, Registry
    from toolx_kernels.toolcall.rewards import is_correct
    from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS, is_answer_correct
    from toolx_kernels.train.groups import SingleTurn
    from toolx_kernels.train.rows import MADE_UP, Prompts, load_eval_rows, some_rows, split_rows

    check_sampling(args.temperature, args.num_generations, args.k)
    if args.output:
        check_new(Path(args.output))
    trained = settings_of_run(args.model)
    length = args.max_completion_length or max(trained.get("max_completion_length", 0), MAX_COMPLETION_LENGTH)
    sampling = SamplingParams(length, temperature=args.temperature)

    def rows_of(dataset: str):
        if args.split == "held-out" and dataset not in MADE_UP:
            return some_rows(split_rows(load_eval_rows(dataset), args.eval_fraction)[1], args.eval_rows)
        return load_eval_rows(dataset, args.eval_rows)

    rows = {dataset: rows_of(dataset) for dataset in args.dataset}
    logging.disable_progress_bar()  # ours is enough
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    sampling = replace(sampling, stop_token_ids=stop_token_ids(model, tokenizer))
    own_examples = args.self_exemplify or bool(trained.get("self_exemplify"))
    context = model.get_decoder().config.max_position_embeddings
    prompts = Prompts(tokenizer, context, INSTRUCTIONS if own_examples else "")
    engine = RolloutEngine(model, seed=args.seed)
    in_turns = partial(ToolLoop, engine, tokenizer, prompts, environment_factory=Registry, max_turns=MAX_TURNS)

    def sampler_of(dataset: str):
        return in_turns(tool_timeout=10.0) if dataset == "builtin-turns" else SingleTurn(engine, tokenizer)

    with new_folder(Path(args.output)) if args.output else nullcontext() as folder:
        scores = {
            dataset: score(
                sampler_of(dataset), prompts, of_dataset, sampling, n=args.num_generations, ks=args.k, progress=dataset,
                judge=is_answer_correct if own_examples else is_correct,
            )
            for dataset, of_dataset in rows.items()
        }  # fmt: skip
        print(describe(scores))
        how = "greedy" if args.temperature == 0 else f"temperature {args.temperature}, seed {args.seed}"
        print(f"Model {args.model}, {how}, {args.split} rows" + (f"; see {args.output}." if args.output else "."))
        if folder:
            settings = {name: value for name, value in vars(args).items() if name != "output"}
            settings |= {"self_exemplify": own_examples, "max_completion_length": length}
            write_scores(folder, scores, settings)
    return 0


def settings_of_run(model: str) -> dict:
    """The settings of the run whose folder, or a checkpoint of which, ``model`` is; empty when it is none."""
    from toolx_kernels.train.run.folder import CONFIG, RunFolder

    folders = (Path(model), Path(model).parent) if Path(model).is_dir() else ()
    return next((RunFolder(folder).config() for folder in folders if (folder / CONFIG).is_file()), {})


def compare(argv: list[str]) -> int:
    parser = _Parser(
        prog="toolx compare", allow_abbrev=False,
        description="Runs side by side: curves in one picture, final figures with 95 %% intervals in tables. Runs "
        "whose settings differ only in the seed are one arm; differences are to the first arm, paired by seed.",
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", help="run folders of toolx train")
    parser.add_argument(
        "--names", nargs="+",
        help="one for each arm in order, or one for each run, where runs of the same name are one arm",
    )  # fmt: skip
    parser.add_argument(
        "--output", default="runs/comparison",
        help="the folder for comparison.png, .md and .json, which are replaced there (default: runs/comparison)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file: name a folder.")

    from toolx_kernels.compare.report import describe, write_comparison
    from toolx_kernels.compare.runs import arms_of, read_run

    arms = arms_of([read_run(Path(run)) for run in args.runs], args.names)
    write_comparison(output, arms)
    print(describe(arms))
    print(f"See {output}/comparison.md, which shows comparison.png, and comparison.json.")
    return 0


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
    from toolx_kernels.train.memory.at_hand import config_of, work_at_hand
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


def doctor(argv: list[str]) -> int:
    _Parser(prog="toolx doctor", allow_abbrev=False, description="What is installed here.").parse_args(argv)
    from toolx_kernels.cli.doctor import report

    print(report())
    return 0
