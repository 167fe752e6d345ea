"""Recipes: YAML files of settings, and where in them each setting is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from toolx_kernels.cli.trl import SEE, is_trls
from toolx_kernels.errors import InputError, did_you_mean, first_line
from toolx_kernels.train.config import ToolExpanderConfig

SHIPPED = files("toolx_kernels") / "configs"
EXAMPLE = "as 'learning_rate: 0.0005'"


class Recipe(NamedTuple):
    """``places`` says of each setting where it is: ``mine.yaml, line 3``."""

    settings: dict[str, Any]
    places: dict[str, str]


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.name.removesuffix(".yaml") for file in SHIPPED.iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> Recipe:
    """The settings of a YAML file, or of the recipe of that name in ``toolx_kernels/configs``.

    Raises InputError, naming file and line, for what is not YAML and for a key that is not a setting. Values are not
    checked here: later files and flags may replace them.
    """
    path, shown = Path(name), name
    if not path.is_file():
        path, shown = Path(str(SHIPPED / f"{name}.yaml")), f"recipe {name}"
    if not path.is_file():
        known = recipe_names()
        remedy = did_you_mean(name, known, f"the recipes are {', '.join(known)}.")
        raise InputError(f"--config {name}: there is no such file or recipe: {remedy}")
    recipe = Recipe({}, {})
    for key, line, value in _entries(path, shown):
        place = f"{shown}, line {line}"
        if key not in ToolExpanderConfig.__dataclass_fields__:
            names = ToolExpanderConfig.__dataclass_fields__
            remedy = SEE if is_trls(key) else did_you_mean(key, names, "see toolx train --help.")
            raise InputError(f"{place}: {key!r} is not a setting: {remedy}")
        if key in recipe.places:
            raise InputError(f"{place}: {key!r} is set twice, first in {recipe.places[key]}: leave one of them out.")
        recipe.settings[key], recipe.places[key] = value, place
    return recipe


@contextmanager
def naming(places: Mapping[str, str]) -> Iterator[None]:
    """Adds to an InputError, which names settings as ``name=value``, where those of ``places`` are."""
    try:
        yield
    except InputError as error:
        named = re.findall(r"\b(\w+)=", str(error))
        if where := dict.fromkeys(places[name] for name in named if name in places):
            raise InputError(f"{' and '.join(where)}: {error}") from None
        raise


def _entries(path: Path, shown: str) -> list[tuple[str, int, Any]]:
    """Each key of a YAML file, its line and its value."""
    line, entries = 0, []
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line + 1
            entries.append((str(key.value), line, loader.construct_object(value, deep=True)))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise InputError(f"{shown}, line {line} is not YAML ({error.problem}): write settings {EXAMPLE}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not text, an impossible date, or nested too deep
        where = f"{shown}, line {line}" if line else shown
        raise InputError(f"{where} is not YAML ({first_line(error)}): write settings {EXAMPLE}.") from None
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{shown} must have one setting per line, {EXAMPLE}.")
    return entries
