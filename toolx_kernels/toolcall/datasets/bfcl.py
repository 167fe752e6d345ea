"""Rows of the Berkeley Function Calling Leaderboard (BFCL), from the data files of the bfcl-eval package.

BFCL is an evaluation set: a run that trains on part of it should say so.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets.type_names import json_schema
from toolx_kernels.toolcall.literals import write_literal
from toolx_kernels.toolcall.rows import Row, check_rows

CATEGORIES = (
    "simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple",
    "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "irrelevance", "live_irrelevance",
)  # fmt: skip
GROUPS = {
    # what ToolExpander (arXiv 2510.07737) averages over: 2,351 rows
    "single_turn": (
        "simple_python", "multiple", "parallel", "parallel_multiple",
        "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple",
    ),
}  # fmt: skip
_LANGUAGES = {"simple_java": ("java", "Java", "Java 8 SDK"), "simple_javascript": ("javascript",) + ("JavaScript",) * 2}


def read_bfcl(category: str) -> list[Row]:
    """Reads the rows of one single-turn category of ``CATEGORIES``, or of all categories of one of ``GROUPS``.

    Tools have BFCL's names, dots included, its note on the language, and JSON Schema types. Java and JavaScript
    arguments are strings; ``format`` is their type in the language, with the type of items in angle brackets
    (``ArrayList<long>``). ``columns`` holds ``category`` and ``possible_answers``, the lists of acceptable values;
    ``answer`` is one acceptable list of calls: the first value of each argument, without those that may be left out.
    In the irrelevance categories it is empty.

    Raises InputError for an unknown category, or if the bfcl-eval package is not installed.
    """
    if category in GROUPS:
        return check_rows((row for member in GROUPS[category] for row in read_bfcl(member)), f"bfcl:{category}")
    if category not in CATEGORIES:
        raise InputError(f"unknown BFCL category {category!r}: choose one of {', '.join((*GROUPS, *CATEGORIES))}.")
    rows = _read_lines(f"BFCL_v4_{category}.json")
    possible: dict[str, list[dict]] = {row["id"]: [] for row in rows}
    if "irrelevance" not in category:
        possible = {row["id"]: row["ground_truth"] for row in _read_lines(f"possible_answer/BFCL_v4_{category}.json")}
    return check_rows((_row(raw, possible[raw["id"]], category) for raw in rows), f"bfcl:{category}")


def _row(raw: dict, possible: list[dict], category: str) -> dict:
    tools = [_tool(function, category) for function in raw["function"]]
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    return {
        "id": raw["id"],
        "prompt": raw["question"][0],
        "tools": tools,
        "answer": [
            {"name": name, "arguments": _arguments(acceptable, schemas[name], category)}
            for expected in possible
            for name, acceptable in expected.items()
        ],
        "category": category,
        "possible_answers": possible,
    }


def _tool(function: dict, category: str) -> dict:
    _, _, syntax = _LANGUAGES.get(category, ("python", "Python", "Python 3"))
    parameters = json_schema(function["parameters"], any_as="string")  # as its checker expects
    if category in _LANGUAGES:
        parameters["properties"] = {
            name: _literal_schema(spec, category) for name, spec in function["parameters"]["properties"].items()
        }
    description = f"{function['description']} Note that the provided function is in {syntax} syntax."
    return {
        "type": "function",
        "function": {"name": function["name"], "description": description, "parameters": parameters},
    }


def _literal_schema(spec: dict, category: str) -> dict:
    """The schema of a string that holds a literal, with the description that BFCL shows to models."""
    language = _LANGUAGES[category][1]
    name, items = spec["type"], spec.get("items", {}).get("type")
    if name == "any":
        note = f"This parameter can be of any type of {language} object in string representation."
    else:
        note = f"This is {language} {name} type parameter in string representation."
    if items:
        note += f" The list elements are of type {items}; they are not in string representation."
    if "properties" in spec:
        note += (
            " The dictionary entries have the following schema; they are not in string representation."
            f" {json.dumps(spec['properties'])}"
        )
    rest = {key: value for key, value in spec.items() if key not in ("type", "items", "properties", "description")}
    return {
        "type": "string",
        "description": f"{spec['description']} {note}",
        "format": f"{name}<{items}>" if items else name,
        **rest,
    }


def _arguments(acceptable: dict[str, list], schema: dict, category: str) -> dict:
    arguments = {}
    for name, values in acceptable.items():
        required = name in schema.get("required", ())
        if "" in values and not required:
            continue
        value = _plain(next((option for option in values if option != ""), values[0] if values else []))
        if category in _LANGUAGES:
            value = write_literal(value, _LANGUAGES[category][0], schema["properties"][name]["format"])
        arguments[name] = value
    return arguments


def _plain(value: Any) -> Any:
    """An acceptable value, with one alternative for each member of an object."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: options[0] for key, options in value.items() if "" not in options}
    return value


def _read_lines(name: str) -> list[dict]:
    package = importlib.util.find_spec("bfcl_eval")
    if package is None or not package.submodule_search_locations:
        raise InputError(
            "the BFCL data are in the package bfcl-eval, which is not installed: run `pip install --no-deps bfcl-eval`"
            " or `make models`."
        )
    path = Path(package.submodule_search_locations[0], "data", name)
    if not path.is_file():
        raise InputError(
            f"the installed bfcl-eval has no file data/{name}: run `pip install --no-deps --upgrade bfcl-eval`."
        )
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
