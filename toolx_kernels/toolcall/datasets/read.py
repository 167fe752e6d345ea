"""Rows from files and datasets: JSONL, the Hugging Face hub, BFCL, Seal-Tools, and the formats of ToolACE and
xLAM."""

import ast
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.bfcl import read_bfcl
from toolx_kernels.toolcall.datasets.seal_tools import read_seal_tools
from toolx_kernels.toolcall.parse import read_json
from toolx_kernels.toolcall.rows import Row, check_numbered, check_rows, check_set, json_lines, short
from toolx_kernels.toolcall.schema import annotation_schema, json_schema

_log = logging.getLogger(__name__)
_NAMES = "bfcl:<category>, seal-tools:<path>, a JSONL file, or a dataset on the Hugging Face hub"


def read_dataset(spec: str) -> list[Row]:
    """The rows of `spec`: `bfcl:<category>`, `seal-tools:<path>` (`read_seal_tools`), a file or any path that ends in
    `.jsonl`, else a name on the hub; or the rows of several of these, joined by commas.

    Raises InputError for what cannot be found or read, and for an id that occurs in two of them.
    """
    if not spec.strip():
        raise InputError(f"the dataset name {spec!r} is empty; give {_NAMES}")
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
    """Rows from a file with one JSON object a line (see `check_row`). Raises InputError, naming file and line."""
    return check_numbered(json_lines(path), str(path))


def read_hub(name: str, split: str = "train") -> list[Row]:
    """Rows of split `split` of a dataset on the Hugging Face hub, or in a local folder that `datasets` can load.

    Raises InputError when the `datasets` library is absent, or cannot load that name or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"reading the dataset {name!r} takes the datasets library: run `pip install 'toolx_kernels[data]'`"
        ) from error
    try:
        dataset = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"cannot load split {split!r} of dataset {name!r} ({reason}); give {_NAMES}") from error
    return rows_from(dataset, name)


def rows_from(dataset: Iterable[Mapping | Row], where: str = "dataset") -> list[Row]:
    """Rows from a list of dicts (or of `Row`s), or from a `datasets.Dataset`.

    The format shows in the first row: ours (`check_row`); xLAM-function-calling-60k's (`query`, `tools`, `answers`); or
    ToolACE's (`system`, `conversations`), of which rows with more than one user turn or with calls that cannot be read
    are left out and counted in a warning. A `datasets.Dataset` fills the keys that an object lacks with None, so None
    is dropped from objects there; an argument that is really null has to be stored as JSON text.

    Raises InputError for a row that is wrong, or an empty dataset.
    """
    raws = list(dataset)
    if hasattr(dataset, "features"):
        raws = [{key: _without_none(value) for key, value in raw.items()} for raw in raws]
    keys = raws[0].keys() if raws and isinstance(raws[0], Mapping) else set()
    if {"query", "answers", "tools"} <= keys:
        raws = [_from_xlam(raw, f"{where}:{n}") for n, raw in enumerate(raws)]
    elif {"system", "conversations"} <= keys:
        raws = _from_toolace(raws, where)
    return check_rows(raws, where)


def _parse(text: str, place: str, remedy: str) -> Any:
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place} is not JSON ({error}); {remedy}") from error


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _from_xlam(raw: Any, place: str) -> dict:
    """`parameters` is flat there: name -> `{"type": a Python annotation, "description", "default"?}`; what has a
    default or says "optional" need not be given."""
    if not isinstance(raw, Mapping):
        raise InputError(
            f"{place}: a row in xLAM's format is an object with query, tools and answers, not {short(raw)}"
        )
    tools, answer = raw.get("tools"), raw.get("answers")
    tools = _parse(tools, f"{place}: field 'tools'", "write it as a list") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"{place}: field 'tools' must be a list of functions, as in xLAM's format")
    return {
        **{key: value for key, value in raw.items() if key not in ("query", "answers")},
        "prompt": raw.get("query"),
        "tools": [_xlam_tool(tool, place) for tool in tools],
        "answer": answer,
    }


def _xlam_tool(tool: Mapping, place: str) -> dict:
    properties, required = {}, []
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping) or not all(isinstance(spec, Mapping) for spec in parameters.values()):
        raise InputError(f"{place}: the parameters of tool {tool.get('name')!r} must map names to their descriptions")
    for name, spec in parameters.items():
        annotation = str(spec.get("type", "any"))
        rest = {key: value for key, value in spec.items() if key not in ("type", "required")}
        properties[name] = {**annotation_schema(annotation), **rest}
        if "default" not in spec and "optional" not in annotation.lower():
            required.append(name)
    schema = {"type": "object", "properties": properties, "required": required}
    return {"name": tool.get("name"), "description": tool.get("description", ""), "parameters": schema}


def _from_toolace(raws: list, where: str) -> list[dict]:
    """The system text holds the tools as a JSON list; the assistant's first reply is `[name(arg=value, ...), ...]`, or
    prose when no call is right."""
    rows, skipped = [], Counter()
    for n, raw in enumerate(raws):
        system, turns = _toolace_fields(raw, f"{where}:{n}")
        roles = [turn["from"] for turn in turns]
        if roles.count("user") != 1 or roles[:2] != ["user", "assistant"]:
            skipped["more than one user turn"] += 1
            continue
        tools = _toolace_tools(system)
        if tools is None:
            skipped["no list of tools in the system text"] += 1
            continue
        answer = _toolace_calls(turns[1]["value"], [tool["name"] for tool in tools])
        if answer is None:
            skipped["calls that cannot be read"] += 1
            continue
        row_id = raw.get("id", f"{where}:{n}")
        rows.append({"id": row_id, "prompt": turns[0]["value"], "tools": tools, "answer": answer})
    if skipped:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
        _log.warning("%s: %d of %d rows left out: %s", where, skipped.total(), len(raws), reasons)
    return rows


def _toolace_fields(raw: Any, place: str) -> tuple[str, list]:
    """System text and turns of a row, checked."""
    system, turns = (raw.get("system"), raw.get("conversations")) if isinstance(raw, Mapping) else (None, None)
    if not isinstance(system, str) or not isinstance(turns, list):
        raise InputError(
            f"{place}: a row in ToolACE's format has a text 'system' and a list 'conversations', not {short(raw)}"
        )
    for turn in turns:
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise InputError(
                f"{place}: a turn of field 'conversations' must have a 'from' and a 'value' that are strings, not"
                f" {short(turn)}"
            )
    return system, turns


def _toolace_tools(system: str) -> list[dict] | None:
    decoder, start = json.JSONDecoder(), system.find("[{")
    while start >= 0:
        try:
            tools, _ = decoder.raw_decode(system, start)
        except (ValueError, RecursionError):
            start = system.find("[{", start + 1)
            continue
        if all(isinstance(tool, dict) and isinstance(tool.get("name"), str) for tool in tools):
            return [
                {
                    "name": tool["name"],
                    "description": tool.get("description") or "",
                    "parameters": json_schema(parameters) if isinstance(parameters, dict) else parameters,
                }
                for tool in tools
                for parameters in [tool.get("parameters") or {"type": "object", "properties": {}}]
            ]
        start = system.find("[{", start + 1)
    return None


def _toolace_calls(text: str, names: list[str]) -> list[dict] | None:
    """Calls with Python literals as keyword arguments. Tool names may hold spaces and dots, so the names that the row
    offers are looked for, and only the argument list is read as Python."""
    rest = text.strip()
    if not rest.startswith("["):
        return []
    calls, rest = [], rest[1:].lstrip()
    while True:
        name = max((name for name in names if rest.startswith(name + "(")), key=len, default=None)
        if name is None:
            return None
        arguments, rest = _keywords(rest[len(name) :])
        if arguments is None:
            return None
        calls.append({"name": name, "arguments": arguments})
        if rest == "]":
            return calls
        if not rest.startswith(","):
            return None
        rest = rest[1:].lstrip()


def _keywords(text: str) -> tuple[dict | None, str]:
    """The keyword arguments in the parenthesis that opens `text`, and what follows it."""
    end = text.find(")")
    while end >= 0:
        try:
            call = ast.parse("f" + text[: end + 1], mode="eval").body
            break
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            end = text.find(")", end + 1)
    else:
        return None, ""
    if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
        return None, ""
    try:
        return {keyword.arg: _literal(keyword.value) for keyword in call.keywords}, text[end + 1 :].lstrip()
    except ValueError:
        return None, ""


class _Constants(ast.NodeTransformer):
    """JSON's names of constants, which some rows mix into the Python, as constants."""

    values = {"true": True, "false": False, "null": None}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.values[node.id]) if node.id in self.values else node


def _literal(node: ast.expr) -> Any:
    """The JSON value of a Python literal; ValueError for anything else. Nothing is evaluated."""
    try:
        return json.loads(json.dumps(ast.literal_eval(_Constants().visit(node)), allow_nan=False))
    except (TypeError, RecursionError) as error:
        raise ValueError("not a JSON value") from error
