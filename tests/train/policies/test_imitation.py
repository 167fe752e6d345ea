"""Imitation of demonstrations: its gradient, its share of a run, and its end."""

import math
from dataclasses import replace

import pytest
import torch

from tests.train.scripted import PLACES, scripted_trainer
from tests.train.test_trainer import metrics
from tests.train.update.test_learner import learner_of, log_probs, model, some_groups
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.train.groups import GroupPlan, ScoredGroup
from toolx_kernels.train.update.batch import PackedGroup


def gradient(learner, improve):
    """The gradients that the optimizer would get, and the result of ``improve``."""
    found = []

    def spy(*_):
        found.append(torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None]))
        learner.optimizer.drop_gradients()
        return 0.0

    learner.optimizer.apply = spy
    told = improve(learner)
    return found, told


def examples():
    generator = torch.Generator().manual_seed(3)

    def ids(n):
        return torch.randint(3, 131, (n,), generator=generator).tolist()

    return [PackedGroup(ids(5), [ids(6)]), PackedGroup(ids(9), [ids(3)]), PackedGroup(ids(4), [ids(8)])]


def test_imitation_adds_its_gradient(monkeypatch):
    """In float64; the coefficient is a power of two because transformers computes norms in fp32."""
    coefficient, of = 0.25, model()
    groups, imitated = some_groups(of), examples()
    (plain,), _ = gradient(learner_of(of), lambda learner: learner.improve(groups, 0))
    (alone,), _ = gradient(learner_of(of), lambda learner: learner.imitate(imitated, 0))
    (both,), told = gradient(learner_of(of), lambda learner: learner.improve(groups, 0, imitated, coefficient))
    assert both.dtype == torch.float64 and plain.norm() > 0.1 and alone.norm() > 0.1
    torch.testing.assert_close(both, plain + coefficient * alone, rtol=0, atol=1e-10)
    logprobs = [row for group in log_probs(of, [scored(group) for group in imitated]) for row in group]
    tokens = [value for row in logprobs for value in row]
    assert told["imitation_loss"] == pytest.approx(-sum(tokens) / len(tokens), rel=1e-9), "a mean over tokens"
    (none,), told = gradient(learner_of(of), lambda learner: learner.improve(groups, 0, imitated, 0.0))
    assert torch.equal(none, plain) and "imitation_loss" not in told
    (only,), told = gradient(learner_of(of), lambda learner: learner.improve([], 0, imitated, 1.0))
    assert torch.equal(only, alone) and told["trained_tokens"] == sum(group.n_tokens for group in imitated)


def scored(example):
    """A scored group of the example's completion."""
    (ids,) = example.completions
    return ScoredGroup(GroupPlan(0), example.prompt, [Rollout(ids, [], [], None, "", [], "stop")], advantages=[1.0])


def spied_improve(trainer):
    """Records what each step gives the learner: groups, imitated examples, coefficient."""
    given, improve = [], trainer.learner.improve

    def spy(groups, number, imitated=(), coefficient=0.0):
        given.append((groups, imitated, coefficient))
        return improve(groups, number, imitated, coefficient)

    trainer.learner.improve = spy
    return given


def mixed(row, help, index):
    return PLACES[row.id] % 2 == 0 and (help != "raw" or index % 2 == 0)


SFT = dict(
    num_generations=2, prompts_per_step=2, hard_sampling="none", num_train_epochs=9, probe_rollouts=1, save_steps=50
)


def events(folder):
    return [line["event"] for line in metrics(folder, ("probe", "sft", "step"))]


@pytest.mark.parametrize("decay", [False, True])
def test_as_many_demonstrations_as_groups_are_imitated_beside_rl(tmp_path, decay):
    """Groups added by retries count too. Only demonstration rows are imitated, each once per pass."""
    rows = [replace(row, id=f"shown-{row.id}") for row in builtin.train_rows(40, 5, ("easy",))[:10]]
    settings = SFT | dict(sft_coef=0.5, sft_decay=decay, max_steps=4, prompts_per_step=3, retry_learns="shown")
    trainer = scripted_trainer(
        tmp_path / "run",
        lambda row, help, index: help != "raw" or index % 2 == 0 and PLACES[row.id] % 2 == 0,
        more=rows,
        demonstrate_training_rows=False,
        **settings | dict(hard_sampling="retry"),
    )
    given = spied_improve(trainer)
    trainer.train()
    assert [len(imitated) for _, imitated, _ in given] == [len(groups) for groups, _, _ in given]
    assert max(len(groups) for groups, _, _ in given) > 3
    expected = [0.5 * (0.5 * (1 + math.cos(math.pi * step / 4)) if decay else 1) for step in range(4)]
    assert [coefficient for *_, coefficient in given] == pytest.approx(expected)
    prompts = trainer.task.prompts
    wanted = {tuple(prompts.ids(row)): prompts.chat.completion_ids(row.answer) for row in rows}
    order = [group for _, imitated, _ in given for group in imitated]
    assert all(wanted[tuple(group.prompt)] == group.completions[0] for group in order)
    assert len({tuple(group.prompt) for group in order[:10]}) == 10


@pytest.mark.parametrize("budget", ["max_steps", "max_tokens", "max_fe", "num_train_epochs"])
def test_supervised_steps_take_their_share_of_the_budget(tmp_path, budget):
    trainer = scripted_trainer(tmp_path / "whole", mixed, **SFT | dict(sft_fraction=1.0, max_steps=2))
    trainer.train()
    step = metrics(tmp_path / "whole", ["sft"])[-1]
    assert events(tmp_path / "whole") == ["probe", *["sft"] * 2, "probe"]
    limit = {
        "max_steps": 10,
        "num_train_epochs": 2,
        "max_tokens": 5 * step["spent_tokens"],
        "max_fe": 5 * step["spent_fe"],
    }
    settings = SFT | {"sft_fraction": 0.3, "max_steps": -1, budget: limit[budget]}
    trainer = scripted_trainer(tmp_path / "part", mixed, **settings)
    progress, finish = [], trainer.rounds.finish_step
    trainer.rounds.finish_step = lambda *a, **k: (finish(*a, **k), progress.append(trainer.rounds.progress))
    trainer.train()
    kinds = events(tmp_path / "part")[1:-1]
    supervised = kinds.index("step")
    assert kinds[:supervised] == ["sft"] * supervised and set(kinds[supervised:]) == {"step"}
    assert progress[supervised - 2] < 0.3 <= progress[supervised - 1] and progress[-2] < 1 <= progress[-1]
    if budget == "max_steps":
        assert (supervised, len(kinds)) == (3, 10)
    elif budget == "num_train_epochs":  # twelve batches; supervised steps draw none of them
        assert (supervised, len(kinds)) == (4, 12)
    else:
        last = metrics(tmp_path / "part", ["step"])[-1]
        spent = "spent_tokens" if budget == "max_tokens" else "spent_fe"
        assert progress[-1] == last[spent] / limit[budget]


@pytest.mark.parametrize("fraction", [0.9, 1.0])
def test_supervised_steps_end_when_what_is_held_out_is_predicted_no_better(tmp_path, fraction):
    losses = iter([3.0, 2.0, 2.5, 1.9, 1.9, 2.0, 1.0])
    trainer = scripted_trainer(
        tmp_path / "run",
        mixed,
        **SFT | dict(sft_fraction=fraction, sft_patience=2, max_steps=13, prompts_per_step=6, num_train_epochs=30),
    )
    held_out, imitated = trainer.imitation.held_out, spied_improve(trainer)
    trainer.learner.supervised_loss = lambda groups: next(losses)
    assert len(held_out) == 1 and len(trainer.imitation.rows) == 11
    trainer.train()
    looked = [line["held_out_loss"] for line in metrics(tmp_path / "run", ["sft"]) if "held_out_loss" in line]
    assert looked == [3.0, 2.0, 2.5, 1.9, 1.9, 2.0], "twice in a row no better than the best"
    steps = math.ceil(6 * 11 / 6)
    kinds = events(tmp_path / "run")[1:-1]
    assert kinds == ["sft"] * steps + ["step"] * (0 if fraction == 1.0 else 13 - steps)
    never = tuple(trainer.task.prompts.ids(held_out[0]))
    assert all(tuple(group.prompt) != never for _, groups, _ in imitated[:steps] for group in groups)
