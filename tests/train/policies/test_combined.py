"""Remedies combined: with each other, with other settings, with custom policy objects, and over resumed runs."""

import json

import pytest
import torch

from tests.train.scripted import PLACES, scripted_trainer
from tests.train.test_trainer import even_is_good, make_trainer, metrics
from toolx_kernels.errors import InputError
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.policies.advantages import GroupRelative, give_advantages
from toolx_kernels.train.policies.hard_samples import PlainGRPO
from toolx_kernels.train.policies.prompt_order import EpochOrder
from toolx_kernels.train.policies.retry import Retry

G = 4
ONE_STEP = dict(num_generations=G, prompts_per_step=12, num_train_epochs=1)


def half(row, help, index):
    """Every other rollout is right, except that raw rollouts of every other row are all wrong."""
    return (help != "raw" or PLACES[row.id] % 2 == 1) and index % 2 == 0


def divided_by(trainer):
    """Number of rollouts that divides the loss of the next step, and the step's groups."""
    groups, _ = trainer.rounds.next_groups()
    groups = trainer.group_selector(groups)
    give_advantages(groups, trainer.advantage_shaper)
    return len(trainer.learner._lengths(groups)), groups


@pytest.mark.parametrize("denominator, expected", [("all", 12 * G), ("live", 12 * G)])
@pytest.mark.parametrize("learns", ["raw", "shown"])
def test_a_revived_group_divides_the_loss_as_one_that_was_live(tmp_path, learns, denominator, expected):
    """All groups end up live: half at once, half after a retry."""
    trainer = scripted_trainer(
        tmp_path / "run", half, hard_sampling="retry", retry_learns=learns, denominator=denominator, **ONE_STEP
    )
    n, groups = divided_by(trainer)
    assert n == expected and sum(group.has_gradient for group in groups) == 12


@pytest.mark.parametrize("learns", ["raw", "shown"])
def test_where_dead_groups_are_dropped_their_retries_divide_the_loss(tmp_path, learns):
    trainer = scripted_trainer(
        tmp_path / "run",
        half,
        hard_sampling="retry",
        retry_learns=learns,
        prompt_sampling="dynamic",
        loss_type="dapo",
        **ONE_STEP,
    )
    n, groups = divided_by(trainer)
    assert n == 12 * G and len(groups) == 12 and all(group.has_gradient for group in groups)


def test_the_kl_of_a_step_without_live_groups_is_divided_by_all(tmp_path):
    trainer = scripted_trainer(tmp_path / "run", lambda *_: False, beta=0.1, denominator="live", **ONE_STEP)
    n, groups = divided_by(trainer)
    assert n == 12 * G and len(trainer.learner.needed(groups)) == 12


def test_the_half_that_varies_most_is_half_of_what_was_drawn_also_of_retried_groups(tmp_path):
    trainer = scripted_trainer(
        tmp_path / "run", half, hard_sampling="retry", rollout_selection="max-variance", **ONE_STEP
    )
    n, groups = divided_by(trainer)
    assert n == 12 * G // 2 and all(sorted(group.rewards) == [0.0, 1.0] for group in groups)


def test_only_rollouts_that_are_learned_from_have_an_advantage(tmp_path):
    trainer = scripted_trainer(
        tmp_path / "run", half, hard_sampling="none", rollout_selection="max-variance", log_completions=99, **ONE_STEP
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 12 * G
    assert sum(line["advantage"] is not None for line in lines) == 12 * 2
    assert all((line["advantage"] or 1) * (line["reward"] - 0.5) > 0 for line in lines if line["advantage"])


# ---- supervised steps before RL


SFT = dict(num_generations=2, prompts_per_step=2, num_train_epochs=9, probe_rollouts=1, save_steps=1)


def events(folder, *kinds):
    return [line["event"] for line in metrics(folder, kinds or ("probe", "sft", "step"))]


def test_a_larger_budget_does_not_bring_supervised_steps_back(tmp_path):
    settings = SFT | dict(hard_sampling="none", sft_fraction=0.5)
    scripted_trainer(tmp_path / "run", half, **settings, max_steps=4).train()
    scripted_trainer(tmp_path / "run", half, **settings, max_steps=12, resume=True).train()
    assert events(tmp_path / "run", "sft", "step") == ["sft"] * 2 + ["step"] * 10


def test_a_remedy_that_acts_on_probes_is_probed_when_supervised_steps_have_ended(tmp_path):
    settings = SFT | dict(hard_sampling="replace", sft_fraction=0.5, max_steps=4)
    scripted_trainer(tmp_path / "run", half, **settings).train()
    assert events(tmp_path / "run")[:4] == ["sft", "sft", "probe", "step"]


def test_supervised_steps_take_one_update_and_do_not_decay_the_rate_of_rl(tmp_path):
    settings = SFT | dict(hard_sampling="none", sft_fraction=0.5, max_steps=4, num_iterations=2)
    trainer = scripted_trainer(tmp_path / "run", half, **settings, lr_decay=0.5, lr_decay_per="step")
    updates, apply = [], trainer.learner.optimizer.apply
    trainer.learner.optimizer.apply = lambda *given: updates.append(trainer.rounds.step) or apply(*given)
    trainer.train()
    assert [updates.count(step) for step in range(4)] == [1, 1, 2, 2]
    rates = [line["learning_rate"] for line in metrics(tmp_path / "run", ["step"])]
    assert rates == [trainer.args.learning_rate, trainer.args.learning_rate / 2]


# ---- custom rewards


def test_a_probe_gives_reward_functions_no_more_than_a_step_does(tmp_path):
    sizes = []

    def reward(prompts, completions, completion_ids, **columns):
        sizes.append(len(completions))
        return even_is_good(prompts, completions, completion_ids)

    make_trainer(tmp_path / "run", reward, max_steps=1, probe_rollouts=10, eval_on_start=False).train()
    assert [sizes.pop(0), sizes.pop(0)] == [4, 1], "they are tried on a group and on a row to evaluate on"
    assert max(sizes) == 4 * 4, "no more than a step"
    assert sum(sizes) == 16 + 2 * 4 * 10 + 6, "a step, two probes in which nothing is solved, an evaluation"


# ---- settings that conflict or have no effect


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(advantage_shaping="routed", hard_sampling="none"), "imitates retried rollouts on the raw prompt"),
        (dict(advantage_shaping="routed", hard_sampling="retry", retry_learns="shown"), "retry_learns=raw"),
        (dict(advantage_shaping="successes", hard_sampling="replace"), "hard_sampling=distill, or retry"),
        (dict(advantage_shaping="zero-variance", prompt_sampling="dynamic"), "dynamic drops: choose one"),
        (dict(hard_sampling="retry", demonstrations="better"), "choose hard_sampling=replace, add or distill"),
        (dict(hard_sampling="retry", retry_with="hint", self_exemplify=True), "show answers alone"),
        (dict(sft_coef=0.1, self_exemplify=True), "show answers alone"),
        (dict(reward="similarity", self_exemplify=True), "has a reward of its own"),
        (dict(sft_patience=2), "set sft_fraction"),
        (dict(sft_learning_rate=1e-3), "set sft_fraction"),
        (dict(sft_decay=True), "set sft_coef"),
        (dict(hard_sampling="retry", importance_sampling_mode="token_mask"), "learns on another prompt"),
        (dict(solved_reward=float("nan")), "must be finite"),
        (dict(sft_coef=float("inf")), "must lie in"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ToolExpanderConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [dict(sft_coef=0.1), dict(sft_fraction=0.2), dict(hard_sampling="retry", retry_with="hint")],
)
def test_answers_are_not_shown_in_one_turn_where_there_are_tools(tmp_path, settings):
    with pytest.raises(InputError, match="put all calls in one turn"):
        scripted_trainer(tmp_path / "run", half, policies={"tools": [even_is_good]}, **settings)


# ---- custom policy objects


class Always(Retry):
    def retry(self, table, groups):
        return [(group, group.plan) for group in groups if group.dead]


class Nothing(PlainGRPO):
    def groups(self, table, row):
        return []


class Beyond(EpochOrder):
    def rows(self, batch, table):
        return [0, 12]


@pytest.mark.parametrize(
    "policies, sentence",
    [
        ({"hard_sample_policy": Always(None)}, "Always.retry returns groups for more than 16 tries in one step"),
        ({"hard_sample_policy": Nothing()}, "Batch 0 has nothing to sample, .*Nothing.groups no group"),
        ({"prompt_order": Beyond(12, 2, 0)}, r"Beyond.rows returned \[0, 12\]: return indices of the 12 rows"),
        ({"advantage_shaper": lambda groups: [0.0]}, "The advantage shaper returned a list: return a tensor"),
        ({"advantage_shaper": lambda groups: torch.ones(5)}, "return one for each of the"),
        ({"group_selector": 7}, "group_selector is the number 7, which has no __call__"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_objects_of_ones_own_get_wrong_is_one_sentence(tmp_path, policies, sentence):
    with pytest.raises(InputError, match=sentence):
        trainer = scripted_trainer(
            tmp_path / "run", lambda *_: False, policies=policies, num_generations=2, prompts_per_step=2, max_steps=1
        )
        trainer.train()


def test_ratios_from_the_sampler_are_refused_where_a_policy_learns_on_another_prompt(tmp_path):
    def helper(row, visit, number):
        return trainer_help

    helper.tries = 1
    settings = dict(num_iterations=2, old_logprobs="sampler", hard_sampling="none", **ONE_STEP)
    trainer = scripted_trainer(tmp_path / "run", half, policies={"hard_sample_policy": Retry(helper)}, **settings)
    trainer_help = trainer.collector.groups.__globals__["Help"](hint="The answer begins: x")
    with pytest.raises(InputError, match="compare log-probs on one prompt"):
        trainer.train()


def test_per_token_advantages_of_ones_own_are_learned_from(tmp_path):
    class PerToken:
        def __call__(self, groups):
            lengths = torch.tensor([len(rollout.ids) for group in groups for rollout in group.rollouts])
            return GroupRelative()(groups).repeat_interleave(lengths)

    norms = []
    for name, shaper in (("number", GroupRelative()), ("token", PerToken())):
        scripted_trainer(
            tmp_path / name, half, policies={"advantage_shaper": shaper}, hard_sampling="none", **ONE_STEP
        ).train()
        norms.append(metrics(tmp_path / name, ["step"])[0]["grad_norm"])
    assert norms[0] == norms[1] > 0
