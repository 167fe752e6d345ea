"""Readers of datasets: JSONL, the Hugging Face hub, BFCL, Seal-Tools, and the formats of ToolACE and xLAM."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.bfcl import read_bfcl
from toolx_kernels.toolcall.datasets.seal_tools import read_seal_tools
from toolx_kernels.toolcall.datasets.toolace import from_toolace
from toolx_kernels.toolcall.datasets.xlam import from_xlam
from toolx_kernels.toolcall.rows import Row, check_numbered, check_rows, check_set, json_lines

_NAMES = "bfcl:<category>, seal-tools:<path>, a JSONL file, or a dataset on the Hugging Face hub"


def read_dataset(spec: str) -> list[Row]:
    """Reads the rows of ``spec``: ``bfcl:<category>``, ``seal-tools:<path>`` (``read_seal_tools``), a file or any path
    that ends in ``.jsonl``, or else a name on the hub; or several of these, separated by commas.

    Raises InputError for what cannot be found or read, and for an id that occurs in two of them.
    """
    if not spec.strip():
        raise InputError(f"the dataset name {spec!r} is empty: give {_NAMES}.")
    kind, _, name = spec.partition(":")
    if "," in spec and not Path(name if kind == "seal-tools" else spec).exists():
        return check_set([row for part in spec.split(",") for row in read_dataset(part.strip())], spec)
    if kind == "bfcl":
        return read_bfcl(name)
    if kind == "seal-tools":
        return read_seal_tools(name)
    if spec.endswith(".jsonl") or Path(spec).is_file():
        return read_jsonl(spec)
    return read_hub(spec)


def read_jsonl(path: str | Path) -> list[Row]:
    """Reads rows from a file with one JSON object per line (see ``check_row``). Raises InputError, naming file and
    line."""
    return check_numbered(json_lines(path), str(path))


def read_hub(name: str, split: str = "train") -> list[Row]:
    """Reads the rows of a split of a dataset on the Hugging Face hub, or in a local folder that ``datasets`` can load.

    Raises InputError if the ``datasets`` library is not installed, or cannot load that name or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading the dataset {name!r} needs the datasets library: run `pip install 'toolx_kernels[data]'`."
        ) from error
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot load split {split!r} of dataset {name!r} ({reason}): give {_NAMES}.") from error
    return rows_from(dataset, name)


def rows_from(dataset: Iterable[Mapping | Row], where: str = "dataset") -> list[Row]:
    """Reads rows from a list of dicts (or of ``Row``s), or from a ``datasets.Dataset``.

    The first row determines the format: ours (``check_row``); xLAM-function-calling-60k's (``query``, ``tools``,
    ``answers``); or ToolACE's (``system``, ``conversations``), of which rows with more than one user turn or with
    unreadable calls are left out and counted in a warning. A ``datasets.Dataset`` fills missing keys of an object with
    None, so None is dropped from its objects; an argument that is really null must be stored as JSON text.

    Raises InputError for an invalid row, or an empty dataset.
    """
    raws: list[Any] = list(dataset)
    if hasattr(dataset, "features"):
        raws = [{key: _without_none(value) for key, value in raw.items()} for raw in raws]
    keys = raws[0].keys() if raws and isinstance(raws[0], Mapping) else set()
    if {"query", "answers", "tools"} <= keys:
        raws = from_xlam(raws, where)
    elif {"system", "conversations"} <= keys:
        raws = from_toolace(raws, where)
    return check_rows(raws, where)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
