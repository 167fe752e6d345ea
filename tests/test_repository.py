"""What is written in words runs: examples in docstrings, modules on command lines, the targets of make."""

import doctest
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.arguments import PARTS
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.policies.advantages import GroupRelative

ROOT = Path(__file__).resolve().parents[1]
WITH_EXAMPLES = [path for path in (ROOT / "toolx_kernels").rglob("*.py") if ">>> " in path.read_text()]
PAGES = [ROOT / "Makefile", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*/*.py")]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    found = doctest.testmod(module)
    assert found.attempted and not found.failed


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_on_command_lines(page):
    for module in re.findall(r"(?:-m|from) ((?:bench|tests|toolx_kernels)\b[\w.]*)", page.read_text()):
        assert importlib.util.find_spec(module.rstrip(".")), module


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[1].split()
    assert re.findall(r"^([a-z-]+):.*  ## \S.*", makefile, re.MULTILINE) == targets


def test_the_remedies_that_the_documentation_shows_are_what_the_trainer_takes():
    block = re.search(r"```python\n(from .*?)```", (ROOT / "docs" / "remedies.md").read_text(), re.DOTALL)[1]
    shown: dict = {}
    exec(block, shown)
    policy = shown["SecondChance"](helper=None)
    assert all(hasattr(policy, name) for name in PARTS["hard_sample_policy"])
    draws = {0: [4, 0], 1: [8, 0], 2: [8, 3]}
    table = SimpleNamespace(rows=range(3), states={row: SimpleNamespace(draws=of) for row, of in draws.items()})
    groups = [group_of(row, solved) for row, solved in ((0, []), (1, []), (2, [0]))]
    policy = shown["SecondChance"](helper=Always())
    assert [group.plan.row for group, _ in policy.retry(table, groups)] == [1], "dead, and not for the first time"
    groups[2].retried = [False, False, True, True]
    advantages = shown["MilderFailures"]()(groups[2:])
    plain = GroupRelative(min_std=0.1)(groups[2:])
    assert advantages.tolist() == [a if a > 0 else a / 2 for a in plain.tolist()] and advantages.min() < 0


class Always:
    tries = 1

    def __call__(self, row, visit, number):
        return Help(hint="so")


def group_of(row, solved):
    """Of four rollouts, of which those at the places ``solved`` are."""
    flags = [place in solved for place in range(4)]
    rollouts = [Rollout([1], [0.0], [0.0], None, "", [], "stop") for _ in flags]
    drawn = dict(rollouts=rollouts, shown=[RAW] * 4, retried=[False] * 4, rewards=list(map(float, flags)))
    return ScoredGroup(GroupPlan(row), [3], **drawn, solved=flags)


def test_the_documentation_lists_every_recipe():
    page = (ROOT / "docs" / "remedies.md").read_text()
    listed = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    recipes = {path.stem for path in (ROOT / "toolx_kernels" / "configs").glob("*.yaml")}
    assert set(listed) & recipes == {name for name in recipes if not name.startswith(("builtin", "self-exemplify"))}
