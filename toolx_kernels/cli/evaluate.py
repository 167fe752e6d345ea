"""``toolx eval``: scores of a model on datasets."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import InputError, short
from toolx_kernels.evaluate.scores import check_sampling
from toolx_kernels.train.config import ChatSettings, ToolExpanderConfig

DEFAULT_MODEL = "runs/builtin"  # of toolx train without flags
MAX_COMPLETION_LENGTH, EVAL_FRACTION = 256, 0.2
CHAT_FLAGS = ("tool_format", "chat_template_kwargs", "date")


DESCRIPTION = """\
Scores a model or checkpoint on datasets: accuracy per category with 95 %
intervals, and pass@k if there are several completions per row.

  toolx eval --model runs/builtin
  toolx eval --model runs/rows --dataset rows.jsonl --split held-out
  toolx eval --dataset rows.jsonl --num_generations 8 --temperature 1 --k 1 8
"""


def add_flags(parser: Parser) -> None:
    parser.usage = f"{parser.prog} [--flag value ...]"
    parser.description = DESCRIPTION
    parser.flag("model", default=DEFAULT_MODEL, metavar="NAME", help="a run folder, or a model as for toolx train")
    parser.flag(
        "dataset",
        nargs="+",
        default=["builtin"],
        metavar="NAME",
        help="builtin, builtin-facts, builtin-turns, bfcl:<category>, bfcl:single_turn (the eight categories, 2,351 "
        "rows, that the paper averages over), seal-tools:<path>, a .jsonl, .json, .parquet or .csv file, or a dataset "
        "on the Hugging Face hub",
    )
    parser.flag("eval_rows", type=int, metavar="N", help="rows per dataset, drawn with a fixed seed (default: all)")
    parser.flag(
        "split",
        choices=("all", "held-out"),
        default="all",
        metavar="NAME",
        help="all: every row; held-out: the rows that toolx train --dataset with the same name does not train on",
    )
    parser.flag(
        "eval_fraction",
        type=float,
        metavar="X",
        help=f"share of held-out rows; unless given, that of the model's run, or else of toolx train (default: "
        f"{EVAL_FRACTION})",
    )
    parser.flag("temperature", type=float, default=0.0, metavar="X", help="sampling temperature; 0: greedy")
    parser.flag("num_generations", type=int, default=1, metavar="N", help="completions per row")
    parser.flag("k", type=int, nargs="+", default=[], metavar="K", help="report pass@k for these k")
    parser.flag(
        "max_completion_length",
        type=int,
        metavar="N",
        help=f"tokens per completion (default: {MAX_COMPLETION_LENGTH}, or more if the model was trained with more)",
    )
    parser.flag("seed", type=int, default=0, metavar="N", help="seed of sampling")
    parser.flag(
        "dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        metavar="NAME",
        help="data type of the weights: float32 or bfloat16",
    )
    parser.flag("device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
    parser.flag(
        "self_exemplify",
        action="store_true",
        help="let the model write examples and think first (a run folder says whether it was trained to)",
    )
    parser.flag(
        "tool_format",
        metavar="NAME",
        help="how the model writes tool calls, as in toolx train (default: as in the model's run, otherwise auto)",
    )
    parser.flag(
        "chat_template_kwargs",
        metavar="JSON",
        help="arguments of the chat template, as in toolx train (default: as in the model's run)",
    )
    parser.flag(
        "date",
        metavar="DATE",
        help="date shown by chat templates that have one, YYYY-MM-DD (default: as in the model's run, otherwise today)",
    )
    parser.flag(
        "output", metavar="FOLDER", help="new folder for scores.json, scores.md and answers.jsonl (default: none)"
    )


def check(args: argparse.Namespace) -> None:
    """Raises InputError for flags that cannot work."""
    for flag in ("eval_rows", "eval_fraction", "max_completion_length", "seed"):
        bounds, value = ToolExpanderConfig.__dataclass_fields__[flag].metadata["bounds"], getattr(args, flag)
        if value is not None and not bounds.allow(value):
            raise InputError(f"--{flag} {short(value)} must {bounds.words}.")
    if twice := [name for name in args.dataset if args.dataset.count(name) > 1]:
        raise InputError(f"--dataset names {twice[0]} twice: name it once.")
    check_sampling(args.temperature, args.num_generations, args.k)
    if args.model == DEFAULT_MODEL and not Path(args.model).exists():
        raise InputError(f"There is no run in {args.model}: run toolx train first, or name a --model.")


def run(args: argparse.Namespace) -> int:
    check(args)
    from transformers.utils import logging

    from toolx_kernels.engine import RolloutEngine, SamplingParams
    from toolx_kernels.evaluate.evaluate import evaluate
    from toolx_kernels.evaluate.scores import describe, write_scores
    from toolx_kernels.files import check_new, new_folder
    from toolx_kernels.models.load import check_tokenizer, load_model, processors_of, stop_token_ids
    from toolx_kernels.models.shape import context_of
    from toolx_kernels.progress import ProgressBar
    from toolx_kernels.rollout.rollout import Rollouter
    from toolx_kernels.rollout.single_turn import SingleTurn
    from toolx_kernels.rollout.tool_loop import ToolLoop
    from toolx_kernels.toolcall.datasets.builtin_turns import MAX_TURNS, Registry
    from toolx_kernels.toolcall.rows import Row
    from toolx_kernels.train.rows import BUILT_IN, load_eval_rows, some_rows, split_rows
    from toolx_kernels.train.task import judge_of, prompts_of

    if args.output:
        check_new(Path(args.output))
    trained = settings_of_run(args.model)
    length = args.max_completion_length or max(trained.get("max_completion_length", 0), MAX_COMPLETION_LENGTH)
    sampling = SamplingParams(length, temperature=args.temperature)
    chosen = {name: trained[name] for name in CHAT_FLAGS if trained.get(name) is not None}
    chosen |= {name: value for name in CHAT_FLAGS if (value := getattr(args, name)) is not None}
    asked = ChatSettings(**chosen)

    split = args.split == "held-out" and not BUILT_IN.keys() >= set(args.dataset)
    fraction = held_out_fraction(args, trained) if split else None

    def rows_of(dataset: str) -> list[Row]:
        if fraction is None or dataset in BUILT_IN:
            return load_eval_rows(dataset, args.eval_rows)
        return some_rows(split_rows(load_eval_rows(dataset), fraction)[1], args.eval_rows)

    rows = {dataset: rows_of(dataset) for dataset in args.dataset}
    logging.disable_progress_bar()  # ours is enough
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    check_tokenizer(model, tokenizer)
    engine = RolloutEngine(model, seed=args.seed)
    own_examples = args.self_exemplify or bool(trained.get("self_exemplify"))
    prompts = prompts_of(asked, tokenizer, context_of(model.get_decoder().config), own_examples)
    chat, form = prompts.chat, prompts.chat.tool_format
    if unlike := processors_of(model.generation_config):
        print(
            f"The model's generation_config names {unlike}, which transformers' generate applies and rollouts here do "
            "not: answers may differ from generate's, greedy ones too."
        )
    sampling = replace(sampling, stop_token_ids=stop_token_ids(model, chat))
    in_turns = partial(ToolLoop, engine, prompts, environment_factory=Registry, max_turns=MAX_TURNS)

    def rollouter_of(dataset: str) -> Rollouter:
        return in_turns(tool_timeout=10.0) if dataset == "builtin-turns" else SingleTurn(engine, chat)

    bar = ProgressBar()
    with new_folder(Path(args.output)) if args.output else nullcontext() as folder:
        scores = {
            dataset: evaluate(
                rollouter_of(dataset),
                prompts,
                of_dataset,
                sampling,
                n=args.num_generations,
                ks=args.k,
                judge=judge_of(chat, own_examples),
                bar=bar,
                title=dataset,
            )
            for dataset, of_dataset in rows.items()
        }
        print(describe(scores))
        sampled = "greedy" if args.temperature == 0 else f"temperature {args.temperature}, seed {args.seed}"
        print(
            f"Model {args.model}, {sampled}, calls as {form.name}, {args.split} rows"
            + (f"; see {args.output}." if args.output else ".")
        )
        if folder:
            settings = {name: value for name, value in vars(args).items() if name != "output"}
            settings |= {"self_exemplify": own_examples, "max_completion_length": length, "tool_format": form.name}
            settings |= {"chat_template_kwargs": asked.chat_template_kwargs, "date": asked.date}
            settings |= {"eval_fraction": fraction}
            write_scores(folder, scores, settings)
    return 0


def settings_of_run(model: str) -> dict[str, Any]:
    """The settings of the run, if ``model`` is a run folder or a checkpoint in one; otherwise empty.

    A folder is a run's if its log begins as a run's; one beside a model, whoever made it, says nothing about that model
    unless the model is a checkpoint of ours.
    """
    from toolx_kernels.train.run.checkpoint import STATE_FILE
    from toolx_kernels.train.run.folder import CONFIG, RunFolder

    path = Path(os.path.expanduser(model))
    folder = path.parent if (path / STATE_FILE).is_file() else path
    run = RunFolder(folder)
    return run.config() if (folder / CONFIG).is_file() and run.log_begins() else {}


def held_out_fraction(args: argparse.Namespace, trained: Mapping[str, Any]) -> float:
    """The share of rows that ``--split held-out`` takes of a dataset, as the run of the model did, whose settings are
    ``trained``. Raises InputError if it would take rows that the run was trained on."""
    held_out = trained.get("eval_fraction", EVAL_FRACTION)
    fraction = held_out if args.eval_fraction is None else args.eval_fraction
    if own := trained.get("eval_dataset"):
        raise InputError(
            f"--split held-out: the run of {args.model} has an eval_dataset, so it held out no rows of its dataset:"
            f" give --dataset {own} without --split."
        )
    if trained and fraction > held_out:
        raise InputError(
            f"--eval_fraction {fraction}: the run of {args.model} held out only {held_out} of the rows and trained on"
            " the others: give at most that, or leave it out."
        )
    return fraction
