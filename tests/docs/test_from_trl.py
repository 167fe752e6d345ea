"""docs/from-trl.md: what it says of the names and defaults here is so. TRL's side is of the version that it names."""

import ast
import inspect
import json
import re
from dataclasses import fields

import pytest

from tests.docs.markdown import ROOT, Page, rows_of, spans_of
from toolx_kernels import GRPOLossConfig, ToolExpanderConfig, ToolExpanderTrainer, linear_grpo_loss
from toolx_kernels.cli.trl import is_trls
from toolx_kernels.loss_config import LOSS_TYPES

PAGE = Page(ROOT / "docs" / "from-trl.md")


def parameters(function):
    return dict.fromkeys(inspect.signature(function).parameters)


def defaults(config):
    return {field.name: field.default for field in fields(config)}


# what stands in code in the second column of the section of a class, and its default
KNOWN = {
    "ToolExpanderConfig": defaults(ToolExpanderConfig),
    "ToolExpanderTrainer": parameters(ToolExpanderTrainer) | defaults(ToolExpanderConfig),
    "GRPOLossConfig": parameters(linear_grpo_loss) | dict.fromkeys(LOSS_TYPES) | defaults(GRPOLossConfig),
}


def names_in(text):
    """Names, with what stands behind their ``=``."""
    found = (re.fullmatch(r"([a-z_0-9]+)(?:=(.+))?", span) for span in spans_of(text))
    return [(name[1], name[2]) for name in found if name]


@pytest.mark.parametrize("section", KNOWN)
def test_names_and_defaults(section):
    lines, known = PAGE.section(f"`{section}`"), KNOWN[section]
    same = "\n".join(lines).partition("Same name")[2].partition("\n\n")[0]
    here = [name for row in rows_of(lines) for name in names_in(row[1])]
    assert len(names_in(same)) >= 6 and len(here) >= 6
    for name, default in names_in(same) + here:
        assert name in known, f"{section} has no {name}"
        if default is not None:
            assert repr(ast.literal_eval(default)) == repr(known[name]), f"{name} is {known[name]!r} by default"


def test_trls_settings_are_known_where_a_flag_is_not():
    """A flag of TRL's is answered with this page, not with the flag of ours that is spelled most like it."""
    for row in rows_of(PAGE.section("`ToolExpanderConfig`")):
        for name, _ in names_in(row[0]):
            assert is_trls(name) != (name in KNOWN["ToolExpanderConfig"]), name
    assert not any(map(is_trls, KNOWN["ToolExpanderConfig"]))


def test_the_arguments_in_their_order():
    (words,) = (line for line in PAGE.section("`ToolExpanderTrainer`") if line.startswith("Same name and position"))
    both = [name for name, _ in names_in(words.partition("Keyword")[0])]
    assert [*inspect.signature(ToolExpanderTrainer).parameters][: len(both)] == both


def test_the_other_sections_settings():
    known = defaults(ToolExpanderConfig)
    for row in rows_of(PAGE.section("Rows, rewards, tools")):
        assert all(repr(ast.literal_eval(value)) == repr(known[name]) for name, value in names_in(row[1]) if value)
    only_here = PAGE.section("Only there")[-5:]
    assert {"max_tokens", "max_fe"} <= {name for name, _ in names_in("\n".join(only_here)) if name in known}


def test_the_names_in_the_logs(toy_run):
    lines = PAGE.section("Logs")
    logged = {key for line in (toy_run() / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    own = "\n".join(lines).partition("TRL's names for")[2].partition("\n\n")[0]
    named = names_in(own) + [name for row in rows_of(lines) for name in names_in(row[1])]
    assert len(named) > 20 and {name for name, _ in named} <= logged
