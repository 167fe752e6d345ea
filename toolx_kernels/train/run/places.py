"""Paths in the settings of a run: its files keep them absolute, and they are compared by their last names."""

from __future__ import annotations

import os
import re
from typing import Any

from toolx_kernels.models.load import SMOLLM2
from toolx_kernels.models.tiny import is_tiny
from toolx_kernels.train.rows import BUILT_IN

DATASETS = ("dataset", "eval_dataset", "demonstration_dataset")


def absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with the absolute path of each model, dataset and reward file that exists, so that a run can
    be resumed, and its config.yaml used, from any working directory."""
    found = dict(settings)
    if (model := found["model"]) and not is_tiny(model) and model != SMOLLM2:
        found["model"] = _path(model)
    for name in DATASETS:
        found[name] = found[name] and _dataset(found[name])
    if found["reward_funcs"]:
        parts = [name.rpartition(":") for name in found["reward_funcs"]]
        found["reward_funcs"] = [f"{_path(file)}{colon}{function}" for file, colon, function in parts]
    return found


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with the last name alone of each absolute path, because a project's folder may be moved, or
    be mounted elsewhere. Rows and weights are compared themselves."""
    shortened = {
        name: [_last(item) for item in value] if isinstance(value, list) else _last(value)
        for name, value in settings.items()
        if name in ("model", "reward_funcs", *DATASETS)
    }
    return settings | shortened


def _path(path: str) -> str:
    return os.path.abspath(path) if path and os.path.exists(path) else path


def _dataset(spec: str) -> str:
    if spec in BUILT_IN:
        return spec
    prefix, colon, place = spec.partition(":") if spec.startswith("seal-tools:") else ("", "", spec)
    if "," in spec and not os.path.exists(place):
        return ",".join(_dataset(part.strip()) for part in spec.split(","))
    return f"{prefix}{colon}{_path(place)}"


def _last(value: Any) -> Any:
    """``rows.jsonl`` of ``/data/rows.jsonl``, also after a comma or ``seal-tools:``."""
    return re.sub(r"(?<![^,:])/(?:[^/,]*/)*(?=[^/,])", "", value) if isinstance(value, str) else value
