"""docs/remedies.md: the remedies that it shows do what it says, and it lists every recipe."""

import re
from types import SimpleNamespace

from tests.docs.markdown import ROOT, Page
from toolx_kernels.cli.recipes import recipe_names
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.train.arguments import PARTS
from toolx_kernels.train.groups import RAW, GroupPlan, Help, ScoredGroup
from toolx_kernels.train.policies.advantages import GroupRelative

PAGE = Page(ROOT / "docs" / "remedies.md")


def test_its_remedies_are_what_the_trainer_takes(reader):
    shown = reader.follow(PAGE)
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


def test_it_lists_every_recipe():
    listed = re.findall(r"^\| `([\w-]+)` \|", "\n".join(PAGE.prose), re.MULTILINE)
    recipes = recipe_names()
    assert set(listed) & set(recipes) == {name for name in recipes if not re.match("builtin|self-exemplify", name)}
