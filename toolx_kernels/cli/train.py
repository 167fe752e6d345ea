"""``toolx train``."""

from __future__ import annotations

import argparse
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from toolx_kernels.cli.parser import Parser
from toolx_kernels.errors import InputError, first_line
from toolx_kernels.train.config import ToolExpanderConfig


def add_flags(parser: Parser, in_help: bool = True) -> None:
    parser.settings_flags(ToolExpanderConfig, in_help)
    help = (
        "YAML files, or names of those in toolx_kernels/configs; later files override earlier ones, flags override "
        "both; the tiny model starts from builtin"
    )
    parser.flag("config", nargs="+", action="extend", default=[], help=help if in_help else argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    config = config_from(vars(args))
    from transformers.utils import logging

    from toolx_kernels.toolcall.datasets import builtin_turns
    from toolx_kernels.train.cold_start import built_in_cold_start
    from toolx_kernels.train.rows import load_demonstrations, load_rows
    from toolx_kernels.train.run.folder import RunFolder
    from toolx_kernels.train.run.stopping import Stopped, stop_on_signals
    from toolx_kernels.train.trainer import ToolExpanderTrainer

    logging.disable_progress_bar()  # ours is enough
    RunFolder(config.output_dir).check(config)
    try:
        with stop_on_signals() as stop:
            rows, eval_rows = load_rows(config)
            summary = ToolExpanderTrainer(
                config.model,
                args=config,
                train_dataset=rows,
                eval_dataset=eval_rows,
                cold_start=built_in_cold_start(config),
                demonstrations=load_demonstrations(config),
                environment_factory=builtin_turns.Registry if config.dataset == "builtin-turns" else None,
            ).train(stop)
    except Stopped as stopped:
        saved = RunFolder(config.output_dir).latest_checkpoint()
        how = f"--resume goes on from {saved}" if saved else "nothing was saved yet, so --overwrite starts it again"
        print(f"toolx train: stopped by {stopped.signal.name}: {how}.", file=sys.stderr)
        return 128 + stopped.signal
    print(describe(config, summary))
    return 0


def describe(config: ToolExpanderConfig, summary: dict[str, Any]) -> str:
    """The last line of a run."""
    before = "not evaluated" if summary["eval_before"] is None else f"{summary['eval_before']:.3f}"
    trained_on = summary["eval_rows_seen"]
    hard = f"hard rows {summary['hard_before']} -> {summary['hard_after']} of {summary['probed_rows']}; "
    return (
        f"accuracy on {summary['eval_rows']} rows of {config.eval_dataset or config.dataset} "
        f"{f'({trained_on} of them shown in training)' if trained_on else 'held out from training'}: "
        f"{before} -> {summary['eval_after']:.3f}; {hard if summary['probed_rows'] else ''}{summary['steps']} steps, "
        f"{summary['wall_seconds']:.0f} s; see {config.output_dir}/curves.png and {config.output_dir}/summary.json"
    )


def parse_train(argv: list[str]) -> ToolExpanderConfig:
    """The config of ``toolx train`` with these flags."""
    parser = Parser(prog="toolx train")
    add_flags(parser)
    return config_from(vars(parser.parse_args(argv)))


def config_from(flags: dict[str, Any]) -> ToolExpanderConfig:
    """The run's config: defaults, then the recipe of the tiny model, then ``--config``'s YAML, then flags.

    With ``--resume`` the settings that the run was started with stand in for recipe and YAML.
    """
    from toolx_kernels.models.tiny import is_tiny
    from toolx_kernels.train.rows import BUILT_IN
    from toolx_kernels.train.run.folder import CONFIG, RunFolder

    settings: dict[str, Any] = {}
    for name in flags["config"]:
        settings |= read_config(name)
    settings |= {name: value for name, value in flags.items() if name != "config"}
    names = list(ToolExpanderConfig.__dataclass_fields__)
    if unknown := [name for name in settings if name not in names]:
        raise InputError(f"--config: {unknown[0]!r} is not a setting: see toolx train --help.")
    folder = Path(str(settings.get("output_dir") or ToolExpanderConfig.output_dir))
    if settings.get("resume") and (folder / CONFIG).exists():
        started = RunFolder(folder).config()
        settings = {**{name: started[name] for name in names if name in started}, **settings, "output_dir": str(folder)}
    settings = {"model": "tiny", "dataset": "builtin"} | {
        k: v for k, v in settings.items() if v is not None or k not in ("model", "dataset")
    }
    if is_tiny(settings["model"]):
        recipe = settings["dataset"] if settings["dataset"] in BUILT_IN else "builtin"
        settings = read_config(recipe) | settings
    return ToolExpanderConfig(**settings)


def read_config(name: str) -> dict[str, Any]:
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
