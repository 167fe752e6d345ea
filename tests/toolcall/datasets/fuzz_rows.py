"""Rows of every known form with anything in them: they are read as rows, or refused with a sentence.

python -m tests.toolcall.datasets.fuzz_rows --cases 100000 --seed 0
"""

from __future__ import annotations

import copy
import datetime
import json
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tests.fuzzing import Fuzzer, main
from tests.toolcall.fuzz import MUTATIONS
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, is_correct, render_completion, rows_from

PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": ["string", "null"], "enum": ["x", None]}},
    "required": ["a"],
}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}
CALL = {"name": "f", "arguments": {"a": 1, "b": "x"}}
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
FLAT = {"a": {"type": "int", "description": "d"}, "b": {"type": "Optional[List[str]]", "default": ""}}
FORMS = {
    "ours": {"id": "r", "prompt": "p", "tools": [FUNCTION], "answer": [CALL], "level": 3},
    "messages as prompt": {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "tools": [{"type": "function", "function": FUNCTION}],
        "answer": json.dumps([CALL]),
    },
    "BFCL": {
        "prompt": "p",
        "tools": [FUNCTION],
        "answer": [],
        "category": "simple_python",
        "possible_answers": [{"f": {"a": [1], "b": ["x", ""]}}],
    },
    "xLAM": {
        "id": 0,
        "query": "q",
        "tools": json.dumps([{**FUNCTION, "parameters": FLAT}]),
        "answers": json.dumps([CALL]),
    },
    "ToolACE": {
        "system": f"Tools: {json.dumps([FUNCTION])}",
        "conversations": [{"from": "user", "value": "u"}, {"from": "assistant", "value": '[f(a=1, b="x")]'}],
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
    },
    "Hermes": {
        "conversations": [
            {"from": "system", "value": f"<tools>{json.dumps([FUNCTION])}</tools>"},
            {"from": "human", "value": "u"},
            {"from": "gpt", "value": f"<tool_call>{json.dumps(CALL)}</tool_call>"},
        ],
    },
}
ODD = [
    None, True, 0, -1, 1.0, math.nan, math.inf, "", " ", "x", "\ud800", "\x00", "null", "[", "{}", "[1]", "a\nb",
    [], [[]], [None], ["x"], {}, {"x": 1}, {"": None}, {1: 2}, {None: 1}, (1, 2), {1}, b"x", object,
    datetime.date(2026, 1, 1), {"type": "object"}, {"type": 1}, {"type": ["x"]}, {"anyOf": 1}, {"properties": []},
    {"$ref": "#"}, {"enum": 1}, [[[[[]]]]], "dict", "Union[int, str]", "list[", "accuracy", "user", "tool", "é" * 300,
]  # fmt: skip


def draw(rng: random.Random) -> tuple[None, list[Any]]:
    form = rng.choice(list(FORMS))
    rows = [copy.deepcopy(FORMS[form]) for _ in range(rng.choice([1, 1, 2]))]
    for _ in range(rng.choice([1, 1, 2, 3])):
        _change(rng, rng.choice(rows))
    if rng.random() < 0.05:
        rows.insert(rng.randint(0, len(rows)), rng.choice([_odd(rng), copy.deepcopy(rng.choice(list(FORMS.values())))]))
    return None, rows


def _change(rng: random.Random, row: dict) -> None:
    """Changes one place: an odd value, a missing or another key, a deep nest, or a broken text."""
    row.setdefault("prompt", "p")
    outer, key = rng.choice(list(_places(row)))
    kind = rng.randrange(8)
    if kind == 0:
        del outer[key]
    elif kind == 1 and isinstance(outer, dict):
        outer[rng.choice(["x", "", "type", "completions", "tier", "required", "items", 3])] = _odd(rng)
    elif kind == 2 and isinstance(outer[key], str):
        outer[key] = rng.choice(MUTATIONS)(rng, outer[key])
    elif kind == 3:
        as_text = json.dumps(outer[key], default=str)
        outer[key] = rng.choice([as_text, [outer[key]], {"x": outer[key]}])
    elif kind == 4:
        for _ in range(rng.choice([60, 64, 100])):
            outer[key] = {"items": outer[key]} if rng.random() < 0.5 else [outer[key]]
    else:
        outer[key] = _odd(rng)


def _odd(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in a value, as its container and its key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def check(_: None, raws: list[Any]) -> Counter:
    try:
        rows = rows_from(raws, "set")
    except InputError as error:
        assert str(error).startswith("set") and "\n" not in str(error), str(error)
        return Counter(refused=1)
    for row in rows:
        assert type(row) is Row and type(row.id) is str and all(type(name) is str for name in row.tool_names)
        assert json.loads(json.dumps([row.prompt, row.tools, row.answer], allow_nan=False)) is not None
        assert row.user_text is not None
        assert row.columns.get("possible_answers") is not None or is_correct(render_completion(row), row)
    return Counter(read=1)


FUZZER = Fuzzer("rows", "tests.toolcall.datasets.fuzz_rows", draw, check, lambda rows: 1.0)

if __name__ == "__main__":
    logging.disable()  # of rows that are left out
    main(FUZZER, __doc__)
