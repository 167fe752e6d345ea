"""``toolx train``: from flags and recipes to a training run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolx_kernels.cli.parser import Parser
from toolx_kernels.cli.recipes import naming, read_recipe, recipe_names
from toolx_kernels.errors import counted
from toolx_kernels.files import expanded
from toolx_kernels.train.config import ToolExpanderConfig

DEFAULT_MODEL, DEFAULT_DATASET = "tiny", "builtin"
DESCRIPTION = """\
Trains a model to call tools, by reinforcement learning. Without flags: a tiny
model on the built-in task, in minutes on a laptop, into runs/builtin.

  toolx train
  toolx train --model Qwen/Qwen2.5-0.5B-Instruct --dataset rows.jsonl
  toolx train --config replace --seed 1 --output_dir runs/replace-seed1
"""
LEGEND = """\
Settings by group, with their defaults; one without a default is off or not set.
toolx train --help GROUP explains those of a group. The tiny model starts from
the recipe of its task, which changes some defaults. A switch takes true or
false; --resume alone is true."""


def add_flags(parser: Parser) -> None:
    add_settings(parser)
    parser.usage = f"{parser.prog} [--config NAME ...] [--setting value ...]"
    parser.description = DESCRIPTION
    parser.epilog = f"{LEGEND}\n{parser.overview()}"


def add_settings(parser: Parser) -> None:
    """The flags of all settings, and ``--config``."""
    defaults = {"model": DEFAULT_MODEL, "dataset": DEFAULT_DATASET, "output_dir": "runs/<recipe or dataset>"}
    parser.settings_flags(ToolExpanderConfig, defaults)
    parser.flag(
        "config",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="YAML files of settings, or recipes; later ones override earlier ones, flags override both. Recipes: "
        + ", ".join(recipe_names()),
    )


def run(args: argparse.Namespace) -> int:
    flags = vars(args)
    config = config_from(flags)
    from transformers.utils import logging

    from toolx_kernels.toolcall.datasets import builtin_turns
    from toolx_kernels.train.cold_start import built_in_cold_start
    from toolx_kernels.train.rows import load_demonstrations, load_rows
    from toolx_kernels.train.run.folder import RunFolder
    from toolx_kernels.train.run.stopping import Stopped, stop_on_signals
    from toolx_kernels.train.task import reward_process
    from toolx_kernels.train.trainer import ToolExpanderTrainer

    logging.disable_progress_bar()  # ours is enough
    run = RunFolder(config.output_dir)
    run.check(config)
    reward_funcs = reward_process(config)  # before models and datasets are loaded
    print(announcement(config, flags["config"]), flush=True)
    try:
        with stop_on_signals() as stop:
            rows, eval_rows = load_rows(config)
            summary = ToolExpanderTrainer(
                config.model,
                reward_funcs,
                config,
                train_dataset=rows,
                eval_dataset=eval_rows,
                cold_start=built_in_cold_start(config),
                demonstrations=load_demonstrations(config),
                environment_factory=builtin_turns.Registry if config.dataset == "builtin-turns" else None,
            ).train(stop)
    except Stopped as stopped:
        how, code = f"stopped by {stopped.signal.name}", 128 + stopped.signal
    except KeyboardInterrupt:
        how, code = "interrupted", 130
    else:
        print(describe(config, summary))
        return 0
    print(f"toolx train: {how}: {run.way_on()}.", file=sys.stderr)
    return code


def announcement(config: ToolExpanderConfig, recipes: Sequence[str]) -> str:
    """The first line of a run."""
    from toolx_kernels.train.run.places import without_folders

    shown = without_folders(config.to_dict()) if config.resume else config.to_dict()
    what = f"{shown['model']} on {shown['dataset']}"
    if shown["reward_funcs"]:
        what += f", rewarded by {', '.join(shown['reward_funcs'])}"
    if config.resume:
        return f"Resuming {config.output_dir}: {what}."
    names = [*base_recipe(config.model, config.dataset), *recipes]
    settings = f"settings of {', then '.join(names)}" if names else "default settings"
    return f"Training {what}, {settings}, into {config.output_dir}."


def describe(config: ToolExpanderConfig, summary: dict[str, Any]) -> str:
    """The last lines of a run: its notices, then where it came."""
    before, after = _figure(summary["eval_before"]), _figure(summary["eval_after"])
    trained_on = summary["eval_rows_seen"]
    hard = f"hard rows {summary['hard_before']} -> {summary['hard_after']} of {summary['probed_rows']}; "
    reward = ""
    if "eval_reward_after" in summary:  # of the user's own functions
        figures = (_figure(summary[f"eval_reward_{when}"]) for when in ("before", "after"))
        reward = f"their mean reward {' -> '.join(figures)}; "
    notices = "".join(f"notice: {sentence}\n" for sentence in summary["notices"])
    return notices + (
        f"accuracy on {counted(summary['eval_rows'], 'row')} of {config.eval_dataset or config.dataset} "
        f"{f'({trained_on} of them shown in training)' if trained_on else 'held out from training'}: "
        f"{before} -> {after}; {reward}{hard if summary['probed_rows'] else ''}"
        f"{counted(summary['steps'], 'step')}, "
        f"{summary['wall_seconds']:.0f} s; see {config.output_dir}/curves.png and {config.output_dir}/summary.json"
    )


def _figure(value: float | None) -> str:
    return "not evaluated" if value is None else f"{value:.3f}"


def parse_train(argv: list[str]) -> ToolExpanderConfig:
    """The config of ``toolx train`` with these flags."""
    parser = Parser(prog="toolx train")
    add_flags(parser)
    return config_from(vars(parser.parse_args(argv)))


def config_from(flags: dict[str, Any]) -> ToolExpanderConfig:
    """The run's config: defaults, then the recipe of the tiny model, then ``--config``'s YAML, then flags.

    With ``--resume`` the settings that the run was started with take the place of the tiny model's recipe.

    Raises InputError, which names the file and line of a setting that comes from one.
    """
    from toolx_kernels.train.run.folder import RunFolder

    settings: dict[str, Any] = {}
    places: dict[str, str] = {}
    for recipe in map(read_recipe, flags["config"]):
        settings |= recipe.settings
        places |= recipe.places
    settings |= {name: value for name, value in flags.items() if name != "config"}
    if settings.get("output_dir") is None:
        settings["output_dir"] = default_folder(flags["config"], str(settings.get("dataset") or DEFAULT_DATASET))
    folder = Path(expanded(str(settings["output_dir"])))
    if settings.get("resume") and RunFolder(folder).holds_run():
        started, names = RunFolder(folder).config(), ToolExpanderConfig.__dataclass_fields__
        settings = {name: value for name, value in started.items() if name in names} | settings
    settings |= {
        name: default
        for name, default in (("model", DEFAULT_MODEL), ("dataset", DEFAULT_DATASET))
        if settings.get(name) is None
    }
    for recipe in map(read_recipe, base_recipe(str(settings["model"]), str(settings["dataset"]))):
        places = {name: place for name, place in recipe.places.items() if name not in settings} | places
        settings = recipe.settings | settings
    with naming({name: place for name, place in places.items() if name not in flags}):
        return ToolExpanderConfig(**settings)


def base_recipe(model: str | None, dataset: str | None) -> list[str]:
    """The recipe that the tiny model starts from; of other models none."""
    from toolx_kernels.models.tiny import is_tiny
    from toolx_kernels.train.rows import BUILT_IN

    return [str(dataset) if dataset in BUILT_IN else "builtin"] if is_tiny(str(model)) else []


def default_folder(recipes: Sequence[str], dataset: str) -> str:
    """The run folder where none is named: ``runs/<recipe>``, several joined by ``-``, and without a recipe
    ``runs/<dataset>``.

    >>> default_folder(["grpo", "mine.yaml"], "builtin"), default_folder([], "data/rows.jsonl")
    ('runs/grpo-mine', 'runs/rows')
    >>> default_folder([], "bfcl:simple_python")
    'runs/bfcl-simple_python'
    """
    parts = []
    for name in recipes or dataset.split(","):
        kind, _, place = name.strip().rpartition(":")
        parts += [kind, re.sub(r"\.(jsonl?|ya?ml|parquet|csv|arrow)$", "", Path(place).name)]
    safe = [re.sub(r"[^\w.]+", "-", part).strip("-.") for part in parts]
    return f"runs/{'-'.join(filter(None, safe)) or 'run'}"
