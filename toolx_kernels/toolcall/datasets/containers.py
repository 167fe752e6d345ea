"""Containers of rows, such as ``datasets.Dataset`` and pandas' frames, as lists of Python values."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from os import PathLike
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.offered import values_in
from toolx_kernels.toolcall.datasets.queries import TOOLS
from toolx_kernels.toolcall.strict_json import is_shallow

_Path = tuple[str, ...]
_VALUES = ("default", "const", "example")  # keywords of a schema whose null means null


def has_splits(dataset: Any) -> bool:
    """Whether ``dataset`` is a ``datasets.DatasetDict`` or ``IterableDatasetDict``."""
    return isinstance(dataset, Mapping) and bool(dataset) and all(hasattr(d, "features") for d in dataset.values())


def chosen_split(dataset: Any, where: str, for_training: bool) -> tuple[Any, str]:
    """The only split of a dataset with splits, or, ``for_training``, the one called ``train`` of several; and its name.
    Any other dataset, and "". Raises InputError, naming the splits, if there is none to choose."""
    if not has_splits(dataset):
        return dataset, ""
    name = "train" if for_training and "train" in dataset else next(iter(dataset))
    if len(dataset) > 1 and not (for_training and name == "train"):
        raise InputError(f"{where} has the splits {', '.join(dataset)}: pass one of them, such as dataset[{name!r}].")
    return dataset[name], name


def values_of(dataset: Any, where: str) -> list[Any]:
    """The rows of ``dataset`` as Python values, without the nulls that Arrow filled in.

    A ``datasets.Dataset`` gives each object all keys that any row has there, and null where a row has none; its own
    features say where. Rows from elsewhere may come from such a dataset, see ``without_filling``. Missing cells of a
    pandas frame become None, and numpy's arrays and numbers Python's.

    Raises InputError for what holds no rows.
    """
    iterable = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
    if not iterable or isinstance(dataset, str | bytes | PathLike | Mapping | type):
        remedy = "give a list of rows" if isinstance(dataset, Mapping) else "give the rows that read_dataset returns"
        raise InputError(f"{where} is of type {type(dataset).__name__}: {remedy}.")
    if type(dataset).__module__.partition(".")[0] == "pandas" and hasattr(dataset, "columns"):
        if not dataset.columns.is_unique:
            twice = dataset.columns[dataset.columns.duplicated()][0]
            raise InputError(f"{where} has two columns of the name {twice!r}: give each a name of its own.")
        records = dataset.to_dict("records")
        return without_filling([{k: None if _is_missing(v) else _plain(v) for k, v in raw.items()} for raw in records])
    if hasattr(dataset, "with_format"):
        dataset = dataset.with_format(None)  # not as tensors
    features = getattr(dataset, "features", None)
    if features:
        return [{key: _stored(value, features.get(key)) for key, value in raw.items()} for raw in dataset]
    return without_filling([_plain(raw) if isinstance(raw, dict) and is_shallow(raw) else raw for raw in dataset])


def without_filling(raws: list[Any]) -> list[Any]:
    """Rows without the nulls that a ``datasets.Dataset`` has filled into the tools and the arguments of calls before it
    was written, for instance by ``to_json``.

    Rows show that they were filled by a null keyword in the schema of a tool; then nulls of tools are dropped. Nulls of
    arguments are dropped as well if all calls in the same field have the same argument names, as filling makes them.
    Without such a keyword, a null argument is dropped only if, besides, another call gives that argument and no schema
    allows null for it: so an argument that is meant to be null is lost only if it looks like filling in all of this.
    JSON text is never changed.
    """
    if not all(is_shallow(raw) for raw in raws if isinstance(raw, dict | list | tuple)):
        return raws  # they will be refused
    tools = [raw[name] for raw in raws if isinstance(raw, Mapping) for name in TOOLS if raw.get(name) is not None]
    filled = any(map(_has_null_keyword, tools))
    calls: dict[_Path, list[Mapping]] = defaultdict(list)
    for raw in raws:
        for path, arguments in _arguments(raw):
            calls[path].append(arguments)
    droppable = {path: names for path, group in calls.items() if (names := _null_names(group, filled))}
    if droppable and not filled:
        allowed = {name for value in tools for name in _nullable(value)}
        droppable = {path: names - allowed for path, names in droppable.items()}
    return [_unfilled(raw, filled, droppable) for raw in raws] if filled or droppable else raws


def _null_names(calls: list[Mapping], filled: bool) -> set[str]:
    """The names whose nulls may be filling, in objects that the same keys lead to."""
    if len({tuple(arguments) for arguments in calls}) > 1:
        return set()
    null = {name for arguments in calls for name, value in arguments.items() if value is None}
    given = {name for arguments in calls for name, value in arguments.items() if value is not None}
    return null if filled else null & given


def _unfilled(raw: Any, filled: bool, droppable: dict[_Path, set[str]]) -> Any:
    if not isinstance(raw, Mapping):
        return raw
    return {
        key: (_without_none(value) if filled else value) if key in TOOLS else _dropped(value, droppable, (key,))
        for key, value in raw.items()
    }


def _dropped(value: Any, droppable: dict[_Path, set[str]], path: _Path) -> Any:
    """``value`` without the ``droppable`` null arguments of its calls."""
    if isinstance(value, list):
        return [_dropped(item, droppable, path) for item in value]
    if not isinstance(value, Mapping):
        return value
    names = droppable.get(path, ())
    kept = {key: item for key, item in value.items() if item is not None or key not in names}
    return {key: _dropped(item, droppable, (*path, key)) for key, item in kept.items()}


def _arguments(value: Any, path: _Path = ()) -> Iterator[tuple[_Path, Mapping]]:
    """The arguments of all calls in a row, and the objects in them, except in JSON text, with the keys that lead to
    each."""
    if isinstance(value, Mapping):
        if "arguments" in path:
            yield path, value
        for name, item in value.items():
            if path or name not in TOOLS:
                yield from _arguments(item, (*path, name))
    elif isinstance(value, list):
        for item in value:
            yield from _arguments(item, path)


def _has_null_keyword(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(key not in _VALUES and (item is None or _has_null_keyword(item)) for key, item in value.items())
    return isinstance(value, list) and any(item is not None and _has_null_keyword(item) for item in value)


def _nullable(tools: Any) -> Iterator[str]:
    """Names of parameters that may be null, and of other members of ``tools`` that look like such a parameter."""
    if isinstance(tools, str):
        tools = values_in(tools) or []
    if isinstance(tools, list):
        for tool in tools:
            yield from _nullable(tool)
    elif isinstance(tools, Mapping):
        for name, spec in tools.items():
            if isinstance(spec, Mapping):
                if _allows_null(spec):
                    yield name
                yield from _nullable(spec)


def _allows_null(spec: Mapping) -> bool:
    choices = [choice for name in ("anyOf", "oneOf") for choice in spec.get(name) or [] if isinstance(choice, Mapping)]
    stated = spec.get("type", spec.get("enum"))
    if isinstance(stated, list):
        return "null" in stated or None in stated
    if isinstance(stated, str) and any(word in stated.lower() for word in ("null", "none", "optional[")):
        return True
    return spec.get("nullable") is True or any(map(_allows_null, choices)) or (stated is None and not choices)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _stored(value: Any, feature: Any) -> Any:
    """``value`` without the nulls that the objects of ``feature`` may have been filled with."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {key: _stored(item, feature.get(key)) for key, item in value.items() if item is not None}
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    return [_stored(item, inner) for item in value] if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _is_missing(cell: Any) -> bool:
    return cell is None or type(cell).__name__ in ("NAType", "NaTType") or (isinstance(cell, float) and cell != cell)
