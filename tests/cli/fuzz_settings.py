"""Flags of ``toolx train`` with any words: they make a config, or are refused with a sentence.

python -m tests.cli.fuzz_settings --cases 20000 --seed 0
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

from tests.fuzzing import Fuzzer, main
from toolx_kernels.cli.parser import Parser
from toolx_kernels.cli.train import add_flags, config_from
from toolx_kernels.errors import InputError
from toolx_kernels.settings import without_none
from toolx_kernels.train.config import ToolExpanderConfig

NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "0.5",
    "1e-300",
    "1e30",
    "1e999",
    "-0.0",
    "nan",
    "-inf",
    "9" * 30,
    "9" * 5000,
    "1_0",
]
WORDS = [
    "", " ", "x", "a,b", "true", "False", "none", "null", "{", "{}", '{"a": 1}', '{"a": NaN}', "[1]",
    "[" * 3000, "\x00", "\ud800", "a\nb", "٣", "0x10", "½", "é" * 300, "/", ".", "..", "~", "~nobody/x", "a/../b",
    "tiny", "builtin", "builtin_turns", "bfcl:x", "grpo", "toolexpander",
    "x.yaml", "x.jsonl", "/dev/null", "x:y", "math:sqrt", "a.b", "--x", "-x", "=",
]  # fmt: skip
KINDS = {name: without_none(kind) for name, kind in get_type_hints(ToolExpanderConfig).items()}
NAMES = [each.name for each in fields(ToolExpanderConfig)]


PARSER = Parser(prog="toolx train")
add_flags(PARSER)
config_from({"config": []})  # makes the imports that it makes when it is called


def draw(rng: random.Random) -> tuple[None, list[list[str]]]:
    return None, [_flag(rng) for _ in range(rng.choice([1, 2, 3, 5]))]


def _flag(rng: random.Random) -> list[str]:
    if rng.random() < 0.05:
        return ["--config", rng.choice(WORDS)]
    name = rng.choice(NAMES)
    kind = KINDS[name]
    if rng.random() < 0.1:
        word = rng.choice([*NUMBERS, *WORDS])
    elif get_origin(kind) is Literal:
        word = str(rng.choice(get_args(kind)))
    elif kind is bool:
        word = rng.choice(["true", "false"])
    else:
        word = rng.choice(NUMBERS if kind in (int, float) else WORDS)
    if rng.random() < 0.1:
        return [f"--{name}", word, word] if rng.random() < 0.5 else [f"--{name}"]
    return [f"--{name}={word}"] if rng.random() < 0.5 else [f"--{name}", word]


def check(_: None, flags: list[list[str]]) -> Counter:
    try:
        config = config_from(vars(PARSER.parse_args([word for flag in flags for word in flag])))
    except (InputError, OSError) as error:  # what the command prints as a sentence
        assert str(error)
        return Counter(refused=1)
    assert type(config) is ToolExpanderConfig
    return Counter(taken=1)


FUZZER = Fuzzer("settings", "tests.cli.fuzz_settings", draw, check, lambda flags: 2.0)

if __name__ == "__main__":
    main(FUZZER, __doc__)
