"""Rows of Seal-Tools (Wu et al., arXiv 2405.08355; github.com/fairyshine/Seal-Tools, folder Seal-Tools_Dataset).

Each line of a split file such as ``dev.jsonl`` holds a request and its calls, ``{"id", "query", "calling": [{"api",
"parameters", "responses"}]}``. ``tool.jsonl`` in the same folder describes all tools: ``{"api_name", "api_description",
"field": "area/field", "parameters": {name: {"type", "description"}}, "required"}``. The tools that a request offers are
not published; here they are those of its calls and some distractors.
"""

import logging
import random
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError, short
from toolx_kernels.toolcall.datasets.type_names import json_schema
from toolx_kernels.toolcall.rows import Row, check_numbered, check_set
from toolx_kernels.toolcall.strict_json import json_lines

SPLITS = ("train", "dev", "test_in_domain", "test_out_domain")
_OUTPUT = re.compile(r"API_call_\d+")
_log = logging.getLogger(__name__)


def read_seal_tools(path: str | Path, *, distractors: int = 3) -> list[Row]:
    """Reads the rows of a published split file next to ``tool.jsonl``, or of all ``SPLITS`` in a folder.

    A row offers the tools of its calls and ``distractors`` others, in an order drawn from its id. Distractors come from
    the fields of its own tools, then from their areas if there are too few, then from all tools. Ids, requests and
    calls are as published, including calls whose arguments break the schema of their tool, such as "63" for an integer
    (see ``dataset_report``). Rows with a call that uses the output of another need more than one turn; they are left
    out and counted in a warning.

    Raises InputError, naming file and line, for what is missing or not in the published format, for a call of a tool
    that ``tool.jsonl`` lacks, and if no row is left.
    """
    if distractors < 0:
        raise InputError(f"distractors is {distractors}: give 0 or a number of tools to offer besides the right ones.")
    path = Path(path)
    folder, files = path.parent, [path]
    if path.is_dir():
        folder, files = path, [file for split in SPLITS if (file := path / f"{split}.jsonl").is_file()]
        if not files:
            raise InputError(f"the folder {path} holds none of {', '.join(SPLITS)} as .jsonl: give Seal-Tools_Dataset.")
    elif path.suffix == ".json":
        raise InputError(f"{path} is Seal-Tools' format for fine-tuning: give the .jsonl file of that split.")
    tools = _Tools(folder / "tool.jsonl")
    return check_set([row for file in files for row in _read_split(file, tools, distractors)], str(path))


class _Tools:
    """The tools of a ``tool.jsonl`` by name, and the names in each field and area."""

    def __init__(self, path: Path) -> None:
        self.functions: dict[str, dict] = {}
        self._fields: dict[str, str] = {}
        self._groups: dict[str, list[str]] = defaultdict(list)
        for number, raw in json_lines(path):
            place = f"{path}:{number}"
            if not _has(raw, api_name=str, api_description=str, field=str, parameters=Mapping):
                raise InputError(
                    f"{place}: a tool must have api_name, api_description, field and parameters, not {short(raw)}."
                )
            name, field = raw["api_name"], raw["field"]
            if name in self.functions:
                raise InputError(f"{place}: the tool {name!r} occurs twice: give each tool a different name.")
            schema = {"type": "object", "properties": dict(raw["parameters"]), "required": raw.get("required", [])}
            self.functions[name] = {
                "name": name,
                "description": raw["api_description"],
                "parameters": json_schema(schema),
            }
            self._fields[name] = field
            for group in (field, _area(field), ""):
                self._groups[group].append(name)

    def offered(self, used: list[str], distractors: int, rng: random.Random) -> list[dict]:
        """The functions of ``used`` and of ``distractors`` others, from the nearest groups, in random order."""
        offered = [name for name in dict.fromkeys(used) if name in self.functions]
        wanted = len(offered) + distractors
        fields = dict.fromkeys(self._fields[name] for name in offered)
        for groups in (fields, dict.fromkeys(map(_area, fields)), [""]):
            pool = [name for group in groups for name in self._groups[group] if name not in offered]
            offered += rng.sample(pool, min(wanted - len(offered), len(pool)))
        rng.shuffle(offered)
        return [self.functions[name] for name in offered]


def _area(field: str) -> str:
    return field.partition("/")[0] + "/"


def _read_split(file: Path, tools: _Tools, distractors: int) -> list[Row]:
    raws = [(number, _row(raw, f"{file}:{number}", tools, distractors)) for number, raw in json_lines(file)]
    kept = [(n, raw) for n, raw in raws if not any(_uses_output(call["arguments"]) for call in raw["answer"])]
    if left_out := len(raws) - len(kept):
        _log.warning("%s: %d of %d rows left out: a call uses the output of another", file, left_out, len(raws))
    return check_numbered(kept, str(file))


def _row(raw: Any, place: str, tools: _Tools, distractors: int) -> dict:
    if not _has(raw, id=str, query=str, calling=list) or not all(
        _has(call, api=str, parameters=Mapping) for call in raw["calling"]
    ):
        raise InputError(
            f"{place}: a row must have id, query and calling (a list of api and parameters), as in the published"
            f" splits, not {short(raw)}."
        )
    calls = raw["calling"]
    rng = random.Random(f"seal-tools {raw['id']}")
    return {
        "id": raw["id"],
        "prompt": [{"role": "user", "content": raw["query"]}],
        "tools": tools.offered([call["api"] for call in calls], distractors, rng),
        "answer": [{"name": call["api"], "arguments": call["parameters"]} for call in calls],
    }


def _has(raw: Any, **types: type) -> bool:
    return isinstance(raw, Mapping) and all(isinstance(raw.get(name), kind) for name, kind in types.items())


def _uses_output(value: Any) -> bool:
    if isinstance(value, str):
        return _OUTPUT.search(value) is not None
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return any(map(_uses_output, inner))
