"""Custom policy objects, as another system gives them to the trainer."""

import pytest
import torch

from tests.train.scripted import PLACES, scripted_trainer
from tests.train.test_trainer import metrics, training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import GroupPlan, Help
from toolx_kernels.train.trainer import ToolExpanderTrainer


class Twice:
    """A ``HardSamplePolicy``: samples dead groups again with a hint, at most twice, and learns on the hinted prompt."""

    needs_probe = False

    def __init__(self):
        self.asked = []

    def start_round(self, table, hard, round_index):
        pass

    def groups(self, table, row):
        return [GroupPlan(row)]

    def retry(self, table, groups):
        again = [group for group in groups if group.dead and not group.revived and group.tries < 2]
        self.asked.append([(group.plan.row, group.tries) for group in again])
        help = [Help(hint=f"Try {group.tries + 1} of {table.rows[group.plan.row].id}.") for group in again]
        return [(group, GroupPlan(group.plan.row, (one,), one)) for group, one in zip(again, help, strict=True)]


class OddFirst:
    """A ``PromptOrder`` that reads the table: odd rows, least drawn first; keeps groups of unequal rewards."""

    max_batches = 2

    def rows(self, batch, table):
        odd = range(1, 12, 2)
        return sorted(odd, key=lambda row: (table.states[row].draws[0], row))[:2]

    def candidates(self, batches):
        return list(range(1, 12, 2))

    def keeps(self, group):
        return not group.equal_rewards


class FirstAndLast:
    """A ``GroupSelector`` that keeps the first and the last rollout."""

    def __call__(self, groups):
        return [group.part([0, len(group.rollouts) - 1]) for group in groups]


class ByToken:
    """An ``AdvantageShaper`` of shape (N): a token's place, with the sign of its rollout."""

    def __call__(self, groups):
        rollouts = [(r, reward) for group in groups for r, reward in zip(group.rollouts, group.rewards, strict=True)]
        return torch.tensor([(1 if reward else -1) * place for r, reward in rollouts for place in range(len(r.ids))])


def test_policies_of_ones_own_run(tmp_path):
    """The second retry solves rows 1, 5 and 9 in one of two rollouts; 3 and 7 are live, 11 is never solved."""

    def right(row, help, index):
        place = PLACES[row.id]
        if place in (3, 7):
            return index == 0
        return place != 11 and index == 1 and f"Try 2 of {row.id}." in help

    hard, steps = Twice(), []
    policies = dict(
        hard_sample_policy=hard,
        prompt_order=OddFirst(),
        group_selector=FirstAndLast(),
        advantage_shaper=ByToken(),
    )
    settings = dict(num_generations=2, prompts_per_step=2, probe_rollouts=1, max_steps=3, save_steps=50)
    trainer = scripted_trainer(tmp_path / "run", right, policies=policies, **settings)
    improve = trainer.learner.improve
    trainer.learner.improve = lambda groups, *others: steps.append(groups) or improve(groups, *others)
    trainer.train()
    # the third step keeps one group of its first batch and fills up from a second batch
    assert [sorted({group.plan.row for group in groups}) for groups in steps] == [[1, 3], [5, 7], [3, 9]]
    assert hard.asked[:3] == [[(1, 0)], [(1, 1)], []]
    for group in (group for groups in steps for group in groups):
        live = group.plan.row in (3, 7)
        assert group.rewards == ([1.0, 0.0] if live else [0.0, 1.0])
        assert bool(group.plan.scored_with.hint) == (not live)
        signs = [1 if reward else -1 for reward in group.rewards]
        assert group.advantages == [
            [sign * place for place in range(len(rollout.ids))]
            for sign, rollout in zip(signs, group.rollouts, strict=True)
        ]
    lines = metrics(tmp_path / "run", ["step"])
    assert [line["retried"] for line in lines[:2]] == [1, 1] and [line["revived"] for line in lines[:2]] == [1, 1]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert metrics(tmp_path / "run", ["probe"])[0]["rows"] == 6


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("hard_sample_policy", ("start_round", "groups", "retry", "needs_probe")),
        ("prompt_order", ("rows", "candidates", "keeps", "max_batches")),
        ("group_selector", ("__call__",)),
        ("advantage_shaper", ("__call__",)),
    ],
)
def test_a_policy_without_a_method_is_refused_in_a_sentence(tmp_path, name, methods):
    rows = training_rows(), builtin.heldout_rows(2, 0, ("easy",))
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"))
    for missing in methods:
        part = type("Mine", (), {method: lambda self: None for method in methods if method != missing})()
        with pytest.raises(InputError, match=f"^{name} is an object of Mine, which has no {missing}: see .*[.]$"):
            ToolExpanderTrainer("tiny", None, args, *rows, **{name: part})
    assert not (tmp_path / "run").exists()


def test_advantages_of_another_shape_are_refused_in_a_sentence(tmp_path):
    trainer = scripted_trainer(
        tmp_path / "run",
        lambda row, help, index: index == 0,
        policies={"advantage_shaper": lambda groups: torch.ones(3)},
    )
    with pytest.raises(InputError, match=r"shaper returned advantages of shape \(3,\): return one for each of"):
        trainer.train()
