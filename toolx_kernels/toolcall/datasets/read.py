"""Readers of datasets: files, the Hugging Face hub, Python objects, BFCL and Seal-Tools."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError, first_line
from toolx_kernels.files import expanded
from toolx_kernels.toolcall.datasets.bfcl import read_bfcl
from toolx_kernels.toolcall.datasets.containers import chosen_split, values_of, without_filling
from toolx_kernels.toolcall.datasets.forms import read_rows
from toolx_kernels.toolcall.datasets.seal_tools import read_seal_tools
from toolx_kernels.toolcall.rows import Row, check_set
from toolx_kernels.toolcall.strict_json import json_lines

_NAMES = "bfcl:<category>, seal-tools:<path>, a file of rows, or a dataset on the Hugging Face hub"
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv"}  # ending -> builder of ``datasets``
_ENDINGS = (*_TABLES, ".jsonl", ".json", ".ndjson", ".txt", ".tsv", ".gz", ".zip", ".zst", ".yaml")
# what libraries say of a table without rows
_NO_ROWS = (
    "No columns to parse from file", "corresponds to no data", "BatchSize must be greater than 0",
    "file size is 0 bytes", "File is too small: 0", "list index out of range",
)  # fmt: skip


def read_dataset(spec: str) -> list[Row]:
    """Reads the rows of ``spec``: ``bfcl:<category>``, ``seal-tools:<path>`` (``read_seal_tools``), a table
    (``read_table``), any other file (``read_jsonl``), or else a folder or a name on the hub (``read_hub``); or several
    of these, separated by commas.

    Raises InputError for what cannot be found or read, and for an id that occurs in two of them.
    """
    if not spec.strip():
        raise InputError(f"the dataset name {spec!r} is empty: give {_NAMES}.")
    spec = expanded(spec)
    kind, _, name = spec.partition(":")
    if "," in spec and not os.path.exists(name if kind == "seal-tools" else spec):
        return check_set([row for part in spec.split(",") for row in read_dataset(part.strip())], spec)
    if kind == "bfcl":
        return read_bfcl(name)
    if kind == "seal-tools":
        return read_seal_tools(name)
    if os.path.isfile(spec) and _ending(spec) in _TABLES:
        return read_table(spec)
    is_file = not os.path.isdir(spec) if os.path.exists(spec) else is_path(spec)
    return read_jsonl(spec) if is_file else read_hub(spec)


def read_jsonl(path: str | Path) -> list[Row]:
    """Reads rows from a file with one JSON object per line, or with one array of objects, in any form that
    ``rows_from`` recognizes. Raises InputError, naming file and line (of an array: the place in it, from 0)."""
    numbered = list(json_lines(path))
    numbers = [number for number, _ in numbered]
    return read_rows(list(zip(numbers, without_filling([raw for _, raw in numbered]), strict=True)), str(path))


def read_table(path: str | Path) -> list[Row]:
    """Reads rows from a .parquet, .arrow, .csv or .csv.gz file, whose lists and objects may be JSON text.

    Raises InputError if the ``datasets`` library is not installed or cannot load it.
    """
    return rows_from(_loaded(str(path), _TABLES[_ending(path)], data_files=str(path), split="train"), str(path))


def read_hub(name: str, split: str | None = None) -> list[Row]:
    """Reads the rows of a dataset on the Hugging Face hub, or in a local folder that ``datasets`` can load or has
    saved: of ``split``, or else as ``rows_from`` chooses it.

    Raises InputError if the ``datasets`` library is not installed, or cannot load that name or split.
    """
    return rows_from(_loaded(name, name, split=split), name)


def rows_from(dataset: Iterable[Mapping | Row], where: str = "dataset", *, for_training: bool = True) -> list[Row]:
    """Reads rows from a list, tuple or generator of dicts (or of ``Row``s), a ``datasets.Dataset`` or
    ``IterableDataset``, a pandas frame, or the ``train`` split, or else the only one, of a ``DatasetDict``.

    The fields of the first row determine the form of all (``FORMS`` in ``forms.py``): ours (``check_row``), or TRL's,
    OpenAI's, ToolACE's, Hermes' or ShareGPT's, or xLAM's, which is converted and logged in one line, together with the
    rows that had to be left out. A ``datasets.Dataset`` fills missing keys of an object with None, so None is dropped
    from its objects, and from those of rows that look as if they came from one (``without_filling``); an argument that
    is really null is safe as JSON text.

    Args:
        for_training: whether the split ``train`` of several may be chosen.

    Raises InputError for an invalid row, an unknown form, several splits without one to choose, or an empty dataset.
    """
    chosen, split = chosen_split(dataset, where, for_training)
    return read_rows(list(enumerate(values_of(chosen, where))), where, split)


def _ending(path: str | Path) -> str:
    return Path(str(path).lower().removesuffix(".gz")).suffix


def is_path(name: str) -> bool:
    """Whether a name can only be a path: the hub has none with a file's ending, or with more than one slash."""
    return name.lower().endswith(_ENDINGS) or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def _loaded(shown: str, kind: str, **options: Any) -> Any:
    """What ``datasets`` loads, called ``shown`` in messages."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading the dataset {shown!r} needs the datasets library: run `pip install 'toolx_kernels[data]'`."
        ) from error
    split = options.get("split")
    try:
        if any((Path(kind) / name).is_file() for name in ("state.json", "dataset_dict.json")):  # save_to_disk's
            saved = datasets.load_from_disk(kind)
            return saved if split is None else saved[split]
        return datasets.load_dataset(kind, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, KeyError, IndexError) as error:
        reason = first_line(error.__cause__ or error)
        if any(words in reason for words in _NO_ROWS):
            raise InputError(f"{shown} holds no rows: give a dataset with at least one.") from error
        part = f"split {split!r} of " if split else ""
        raise InputError(f"cannot load {part}dataset {shown!r} ({reason}): give {_NAMES}.") from error
