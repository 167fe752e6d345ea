"""Whole small runs of the forms of ToolExpander: what they sample, learn on, count, keep and resume."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tests.train.test_trainer import SMALL, even_is_good, make_trainer, metrics, training_rows, weights
from toolx_kernels.cli import commands
from toolx_kernels.cli.recipes import read_recipe
from toolx_kernels.cli.train import parse_train
from toolx_kernels.errors import InputError
from toolx_kernels.evaluate import evaluate as cli_evaluate
from toolx_kernels.toolcall import distinct_examples, is_answer_correct, parse_sections, render_self_exemplified
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS
from toolx_kernels.train.cold_start import supervised
from toolx_kernels.train.collect import Collector
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW
from toolx_kernels.train.hard_sampling import probe
from toolx_kernels.train.policies.advantages import GroupRelative
from toolx_kernels.train.policies.loss import ClippedLoss
from toolx_kernels.train.policies.prompt_order import EpochOrder
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.update.learner import Learner


def table(folder):
    return [json.loads(line) for line in (folder / "hard_samples.jsonl").read_text().splitlines()]


def spied(monkeypatch):
    """Records the groups that the learner gets in each step."""
    steps, improve = [], Learner.improve

    def spy(self, groups, *others):
        steps.append(groups)
        return improve(self, groups, *others)

    monkeypatch.setattr(Learner, "improve", spy)
    return steps


@pytest.mark.parametrize("form", ["replace", "add", "distill"])
def test_every_form_learns_on_the_prompts_it_says(tmp_path, monkeypatch, form):
    steps = spied(monkeypatch)
    trainer = make_trainer(tmp_path / form, hard_sampling=form, max_steps=2)
    trainer.train()
    hard = {line["id"]: line for line in table(tmp_path / form) if line["demonstrations"]}
    assert hard, "a random model finds every row hard"
    for groups in steps[:2]:
        raw, shown = {}, {}
        for group in groups:
            row, plan = trainer.task.rows[group.plan.row], group.plan
            (raw if plan.scored_with == RAW else shown).setdefault(row.id, []).append(group)
            assert group.prompt == trainer.task.prompts.ids(row, *plan.scored_with)
            assert len(group.rollouts) == len(group.advantages) == len(group.rewards) == 4 * len(plan.shown)
            torch.testing.assert_close(torch.tensor(group.advantages), GroupRelative()([group]))
        for row_id in hard:
            n_raw, n_shown = len(raw.get(row_id, ())), len(shown.get(row_id, ()))
            if n_raw + n_shown:
                assert (n_raw, n_shown) == {"replace": (0, 1), "add": (1, 1), "distill": (1, 0)}[form]
            for group in raw.get(row_id, ()) if form == "distill" else ():
                assert len(group.plan.shown) == 2 and group.on_policy_prompt == [True] * 4 + [False] * 4
    logged = metrics(tmp_path / form, ["step"])
    assert all(step["replaced"] > 0 and step["logp_difference"] < 1e-4 for step in logged)
    assert all(("distilled_gap" in step) == (form == "distill") for step in logged)


def test_the_two_prompts_of_a_row_draw_different_random_numbers(tmp_path, monkeypatch):
    steps = spied(monkeypatch)
    trainer = make_trainer(tmp_path / "add", hard_sampling="add", max_steps=1, few_shots_per_tool=1)
    monkeypatch.setattr(trainer.task.prompts, "fitting", lambda row, shown, room=1: ())
    trainer.task.prompts.ids_of = trainer.task.prompts.ids
    monkeypatch.setattr(trainer.task.prompts, "ids", lambda row, shown=(), hint="": trainer.task.prompts.ids_of(row))
    trainer.rounds.policy.demonstrator.fitting = lambda row, shown: shown
    trainer.train()
    by_row = {}
    for group in steps[0]:
        by_row.setdefault(group.plan.row, []).append([rollout.ids for rollout in group.rollouts])
    pairs = [groups for groups in by_row.values() if len(groups) == 2]
    assert pairs and all(one != two for one, two in pairs), "the prompts were made equal, so only the stream differs"


def test_probes_leave_a_table_that_a_person_can_read(finished):
    folder, _ = finished
    probes, rows = metrics(folder, ["probe"]), table(folder)
    assert len(rows) == 12 and all(line["id"].startswith("easy-") for line in rows)
    for place, of_round in enumerate(probes):
        here = [line["probes"][place] for line in rows]
        assert all(entry[0] == of_round["round"] for entry in here)
        assert of_round["hard"] == sum(not correct for _, correct, _ in here)
        assert of_round["rollouts"] == sum(rollouts for _, _, rollouts in here)
        assert of_round["rows"] == 12
    assert probes[0]["replaced"] + probes[0]["without_demonstrations"] == probes[0]["hard"]


def test_tokens_are_counted_by_purpose_and_a_budget_ends_the_run(finished, tmp_path):
    folder, whole = finished
    lines = metrics(folder)
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["spent_tokens"] for line in lines if "spent_tokens" in line] == sorted(
        line["spent_tokens"] for line in lines if "spent_tokens" in line
    )
    tokens = whole["tokens"]
    assert whole["trained_tokens"] == sum(step["trained_tokens"] for step in steps)
    assert tokens["step"] == sum(round(step["completion_length"] * 16) for step in steps)
    assert tokens["measure"] > 0 and whole["sampled_tokens"] == sum(tokens.values())
    assert (
        whole["spent_tokens"] == steps[-1]["spent_tokens"] == whole["trained_tokens"] + tokens["step"] + tokens["probe"]
    )
    budget = steps[3]["spent_tokens"]
    short = make_trainer(tmp_path / "short", max_tokens=budget).train()
    assert short["steps"] == 4, "the step that reaches the budget is the last one"
    shorter = make_trainer(tmp_path / "shorter", max_tokens=budget + 1).train()
    assert shorter["steps"] == 5
    plain = make_trainer(tmp_path / "plain", hard_sampling="none").train()
    assert plain["spent_tokens"] == plain["tokens"]["step"] + plain["trained_tokens"], "its probes only measure"


def test_better_demonstrations_are_verified_by_the_model_before_rl_or_by_the_present_one(tmp_path, monkeypatch):
    asked, attempt = [], Collector.attempt

    def spy(self, stream, purpose, rollouter=None):
        asked.append((purpose, (rollouter or self.rollouter).engine.model))
        return attempt(self, stream, purpose, rollouter)

    monkeypatch.setattr(Collector, "attempt", spy)
    for verification in ("cautious", "bold"):
        asked.clear()
        run = tmp_path / verification
        trainer = make_trainer(run, demonstrations="better", verification=verification, demonstration_tries=2)
        trainer.train()
        models = [model for purpose, model in asked if purpose == "verify"]
        assert len(models) == 2 * 2, "two tries in each of two rounds"
        cautious = verification == "cautious"
        frozen = trainer.learner.reference
        assert all((frozen is not None and model is frozen.model) == cautious for model in models)
        assert (run / "checkpoint-0").exists() == cautious
        assert all(not line["demonstrations"] for line in table(run)), "nothing helps a random model, so all stay raw"
        assert all(line["tries"] == 2 and line["verified"] is False for line in table(run) if line["tries"])
        first = metrics(run, ["probe"])[0]
        assert (first["hard"], first["replaced"], first["without_demonstrations"]) == (12, 0, 12)
        make_trainer(
            tmp_path / f"{verification}-halves",
            demonstrations="better",
            verification=verification,
            demonstration_tries=2,
            max_steps=3,
        ).train()
        make_trainer(
            tmp_path / f"{verification}-halves",
            demonstrations="better",
            verification=verification,
            demonstration_tries=2,
            resume=True,
        ).train()
        again = metrics(tmp_path / f"{verification}-halves", ["step", "eval"])
        assert again == metrics(run, ["step", "eval"])


def test_the_learning_rate_decays_per_round_epoch_or_step_down_to_the_floor(tmp_path):
    def rates(**settings):
        name = "-".join(map(str, settings.values()))
        make_trainer(tmp_path / name, hard_sampling="none", probe_rollouts=1, **settings).train()
        return [step["learning_rate"] / 3e-3 for step in metrics(tmp_path / name, ["step"])]

    per_epoch = rates(lr_decay_per="epoch", epochs_per_round=2)
    assert per_epoch == pytest.approx([1, 1, 1, 0.8, 0.8, 0.8])
    assert rates(lr_decay_per="round", epochs_per_round=2) == pytest.approx([1] * 6)
    assert rates(lr_decay_per="step", min_lr_rate=0.6) == pytest.approx([1, 0.8, 0.64, 0.6, 0.6, 0.6])


def test_dynamic_sampling_fills_a_step_up_with_the_next_prompts(tmp_path, monkeypatch):
    """Only even rows earn unequal rewards, so DAPO learns from these alone, at most three per step."""
    steps = spied(monkeypatch)

    def reward(prompts, completions, completion_ids, id, **columns):
        number = [int(name.rsplit("-", 1)[1]) for name in id]
        return [ids[0] % 7 if n % 2 == 0 else 1.0 for ids, n in zip(completion_ids, number, strict=True)]

    trainer = make_trainer(
        tmp_path / "dapo", reward, prompt_sampling="dynamic", hard_sampling="none", prompts_per_step=3, seed=2
    )
    trainer.train()
    even = {place for place, row in enumerate(trainer.task.rows) if int(row.id.rsplit("-", 1)[1]) % 2 == 0}
    logged = metrics(tmp_path / "dapo", ["step"])
    assert 0 < len(even) < 12
    for groups, line in zip(steps, logged, strict=True):
        assert len(groups) <= 3 and {group.plan.row for group in groups} <= even
        assert all(not group.equal_rewards for group in groups)
        assert line["groups_with_gradient"] == 1.0 and line["dropped"] >= 0
    assert len(steps) < 8, "fewer steps than the eight batches of two epochs"
    again = make_trainer(
        tmp_path / "again",
        reward,
        prompt_sampling="dynamic",
        hard_sampling="none",
        prompts_per_step=3,
        seed=2,
        max_steps=2,
    )
    again.train()
    make_trainer(
        tmp_path / "again",
        reward,
        prompt_sampling="dynamic",
        hard_sampling="none",
        prompts_per_step=3,
        seed=2,
        resume=True,
    ).train()
    assert metrics(tmp_path / "again", ["step", "eval"]) == metrics(tmp_path / "dapo", ["step", "eval"])


def test_a_step_whose_groups_are_all_dropped_changes_nothing_and_is_logged(tmp_path):
    trainer = make_trainer(
        tmp_path / "run",
        lambda completions, **_: [1.0] * len(completions),
        prompt_sampling="dynamic",
        hard_sampling="none",
        cold_start_steps=0,
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    logged = metrics(tmp_path / "run", ["step"])
    assert [line["dropped"] for line in logged] == [12, 12], "an epoch is used up by each"


@pytest.mark.parametrize("where", ["first wave", "second wave", "of the second round"])
def test_a_probe_interrupted_halfway_is_repeated_when_resumed(finished, tmp_path, monkeypatch, where):
    whole, _ = finished
    waves, attempt = [], Collector.attempt

    def interrupted(self, stream, purpose, rollouter=None):
        inner = attempt(self, stream, purpose, rollouter)

        def wave(asked, n, first):
            waves.append(n)
            if len(waves) == {"first wave": 1, "second wave": 2, "of the second round": 4}[where]:
                raise KeyboardInterrupt
            return inner(asked, n, first)

        return wave

    with monkeypatch.context() as patched:
        patched.setattr(Collector, "attempt", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "run").train()
    make_trainer(tmp_path / "run", resume=True).train()
    assert metrics(tmp_path / "run") == metrics(whole)
    assert table(tmp_path / "run") == table(whole)
    step = max(int(path.name.rsplit("-", 1)[1]) for path in (tmp_path / "run").glob("checkpoint-*"))
    again = weights(tmp_path / "run", step)
    assert all(torch.equal(tensor, again[name]) for name, tensor in weights(whole, step).items())


def test_only_a_cold_start(tmp_path):
    summary = make_trainer(tmp_path / "cold", num_train_epochs=0).train()
    assert summary["steps"] == 0 and summary["eval_after"] == summary["eval_before"]
    assert [line["event"] for line in metrics(tmp_path / "cold")] == ["cold_start"] * 2 + ["eval", "probe"]


def test_without_an_evaluation_before(tmp_path):
    summary = make_trainer(tmp_path / "run", eval_on_start=False, max_steps=1).train()
    assert summary["eval_before"] is None and math.isfinite(summary["eval_after"])


def test_a_policy_of_ones_own(tmp_path):
    class Loss:
        def denominator(self, lengths):
            return sum(lengths)

        def __call__(self, hidden, **batch):
            seen.append(batch["denominator"])
            return inner(hidden, **batch)

    class Shaper:
        def __call__(self, groups):
            return torch.tensor([reward - 0.5 for group in groups for reward in group.rewards])

    class Backwards(EpochOrder):
        def _rows(self, batch):
            return [11 - 4 * batch - k for k in range(4)] if batch < 3 else super()._rows(batch)

    seen, inner = [], ClippedLoss(ToolExpanderConfig(**SMALL).loss)
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), max_steps=1, log_completions=16, **SMALL)
    trainer = ToolExpanderTrainer(
        "tiny",
        even_is_good,
        args,
        training_rows(),
        builtin.heldout_rows(6, 0, ("easy",)),
        policy_loss=Loss(),
        advantage_shaper=Shaper(),
        prompt_order=Backwards(12, 4, 0),
    )
    trainer.train()
    logged = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {line["row"] for line in logged} == {trainer.task.rows[place].id for place in (8, 9, 10, 11)}
    assert all(line["advantage"] == pytest.approx(line["reward"] - 0.5) for line in logged)
    assert seen and len(set(seen)) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_tokens": 0}, "max_tokens=0 must be -1"),
        ({"demonstration_tries": 0}, "demonstration_tries=0 must be at least 1"),
        ({"min_lr_rate": 2}, "min_lr_rate=2.0 must lie in"),
        ({"min_reward_std": -1}, "min_reward_std=-1.0 must lie in"),
        ({"hard_sampling": "drop"}, "hard_sampling='drop' is unknown"),
        ({"reward_weights": []}, "reward_weights=\\[\\] must be a list"),
        ({"chat_template_kwargs": {True: 1}}, "chat_template_kwargs={True: 1} must be a JSON object"),
        ({"chat_template_kwargs": {"x": float("nan")}}, "chat_template_kwargs={'x': nan} must be a JSON object"),
        ({"chat_template_kwargs": {"x": object}}, "chat_template_kwargs={'x': .* must be a JSON object"),
        ({"chat_template_kwargs": "[1]"}, "chat_template_kwargs=.\\[1\\]. must be a JSON object"),
        ({"reward_weights": ["much"]}, "reward_weights='much' must be a number"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        ToolExpanderConfig(**settings)


def test_a_self_exemplifying_run_shows_its_instructions_and_judges_the_answer_alone(tmp_path, monkeypatch):
    """A scripted sampler replaces the model: the right answer follows examples, or is only among them."""
    args = ToolExpanderConfig(
        output_dir=str(tmp_path / "run"), self_exemplify=True, **SMALL | {"cold_start_steps": 0, "max_steps": 1}
    )
    trainer = ToolExpanderTrainer("tiny", None, args, training_rows(), builtin.heldout_rows(6, 0, ("easy",)))
    assert all(INSTRUCTIONS in trainer.tokenizer.decode(trainer.task.prompts.ids(row)) for row in trainer.task.rows)
    rows = {row.id: row for row in trainer.task.rows}
    others = [
        {"tools": row.tool_names, "question": row.user_text, "answer": row.answer} for row in list(rows.values())[:5]
    ]

    def text_of(row, place):
        examples = [other for other in others if other["question"] != row.user_text][:4]
        if place % 2:  # the right calls among the examples, a wrong answer after them
            examples[0] = {"tools": row.tool_names, "question": "another one", "answer": row.answer}
            return render_self_exemplified(examples, "", [{"name": row.answer[0]["name"], "arguments": {}}])
        return render_self_exemplified(examples if place else examples[:2], "", row.answer)

    sample = trainer.rollouter.roll_out

    def scripted(rows, prompts, n, params, **keywords):
        groups = sample(rows, prompts, n, params, **keywords)
        for row, rollouts in zip(rows, groups, strict=True):
            for place, rollout in enumerate(rollouts):
                rollout.text = text_of(row, place)
        return groups

    monkeypatch.setattr(
        type(trainer.rollouter), "roll_out", lambda self, *args, **keywords: scripted(*args, **keywords)
    )
    steps = spied(monkeypatch)
    trainer.train()
    for group in steps[0]:
        assert group.rewards == [1.0, 0.0, 1.01, 0.0]
        assert group.correct == [True, False, True, False]
        assert abs(group.advantages[2] - group.advantages[0]) < 0.03, "the bonus stays small"


def test_the_cold_start_can_teach_the_self_exemplifying_form(tmp_path):
    trainer = make_trainer(tmp_path / "run", dataset=None, cold_start_self_exemplify=0.5)
    groups = [(example, supervised(trainer.task.prompts, example)[0]) for example in islice(trainer.cold_start, 24)]
    written = [group for example, group in groups if example.examples]
    assert 4 < len(written) < 20
    for example, group in groups:
        prompt, text = (trainer.tokenizer.decode(ids) for ids in (group.prompt, group.completions[0]))
        assert (INSTRUCTIONS in prompt) == bool(example.examples)
        text = text.removesuffix(trainer.tokenizer.eos_token)
        assert is_answer_correct(text, example.row)
        if example.examples:
            assert distinct_examples(parse_sections(text).examples, example.row.user_text) == 4
            assert example.row not in example.examples


def test_a_resume_on_other_rows_is_refused(tmp_path):
    make_trainer(tmp_path / "run", max_steps=2).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), resume=True, max_steps=4, **SMALL)
    rows = training_rows()
    rows[3] = replace(rows[3], prompt="Please do something else.")
    held_out, more = builtin.heldout_rows(6, 0, ("easy",)), builtin.train_rows(3, 5, ("hard",))
    more = [replace(row, id=f"more-{row.id}") for row in more]
    for which, others, demonstrations in (
        ("training rows", (rows, held_out), ()),
        ("rows to evaluate on", (training_rows(), held_out[:4]), ()),
        ("demonstrations", (training_rows(), held_out), more),
    ):
        with pytest.raises(InputError, match=f"was run with other {which}"):
            ToolExpanderTrainer("tiny", even_is_good, args, *others, demonstrations=demonstrations).train()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_large_probe_is_sampled_in_parts_with_the_same_result(tmp_path, monkeypatch):
    make_trainer(tmp_path / "whole", max_steps=3).train()
    monkeypatch.setattr("toolx_kernels.train.collect.MAX_ROLLOUTS", 5)
    make_trainer(tmp_path / "parts", max_steps=3).train()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert table(tmp_path / "parts") == table(tmp_path / "whole")


# first the paper's rows (arXiv 2510.07737), then ours
RECIPES = {
    "grpo": ("none", False, 1e-3, 0.2, 0.2, 1.0),
    "replace": ("replace", False, 1e-3, 0.2, 0.2, 0.8),
    "add": ("add", False, 1e-3, 0.2, 0.2, 0.8),
    "self-exemplify": ("none", True, 0.0, 0.2, 0.26, 0.8),
    "self-exemplify-replace": ("replace", True, 0.0, 0.2, 0.26, 0.8),
    "distill": ("distill", False, 1e-3, 0.2, 0.2, 0.8),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_the_papers_rows(name):
    args = parse_train(["--config", name])
    assert (
        args.hard_sampling, args.self_exemplify, args.beta, args.epsilon, args.epsilon_high, args.lr_decay
    ) == RECIPES[name]  # fmt: skip
    own = {"hard_sampling", "self_exemplify", "beta", "epsilon", "epsilon_high", "lr_decay", "num_iterations"}
    own |= {"max_completion_length", "cold_start_self_exemplify"} if args.self_exemplify else set()
    assert set(read_recipe(name).settings) == own, "all other settings are equal"


@pytest.mark.parametrize("name", ["grpo", "self-exemplify-replace"])
def test_a_recipe_trains_and_its_model_is_scored(name, tmp_path):
    flags = [
        "--cold_start_steps", "2", "--max_steps", "1", "--train_rows", "8", "--eval_rows", "4", "--probe_rollouts", "1",
        "--prompts_per_step", "4", "--num_generations", "2", "--max_completion_length", "16",
    ]  # fmt: skip
    assert commands.main(["train", "--config", name, "--output_dir", str(tmp_path / "run"), *flags]) == 0
    assert commands.main(["eval", "--model", str(tmp_path / "run"), "--eval_rows", "4"]) == 0


def test_eval_shows_a_self_exemplifying_run_its_own_prompts(tmp_path, monkeypatch):
    make_trainer(tmp_path / "run", self_exemplify=True, max_steps=1).train()
    seen, evaluate = [], cli_evaluate.evaluate

    def spy(rollouter, prompts, *args, judge, **keywords):
        seen.append((prompts.instructions, judge.func))
        return evaluate(rollouter, prompts, *args, judge=judge, **keywords)

    monkeypatch.setattr(cli_evaluate, "evaluate", spy)
    for model in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        assert commands.main(["eval", "--model", str(model), "--eval_rows", "2"]) == 0
    assert seen == [(INSTRUCTIONS, is_answer_correct)] * 2


def test_self_exemplifying_has_no_tools(tmp_path):
    def find(city: str) -> str:
        """Finds.

        Args:
            city: where.
        """
        return city

    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), self_exemplify=True, **SMALL)
    with pytest.raises(InputError, match="self_exemplify=True has one turn"):
        ToolExpanderTrainer("tiny", even_is_good, args, training_rows(), training_rows(), tools=[find])


def test_any_character_that_a_line_may_hold_survives_a_resume(tmp_path):
    """U+2028 and similar characters end a line for ``str.splitlines``, but not in JSON."""

    def of(folder, **settings):
        rows = [replace(row, prompt=f"Please\u2028{row.prompt}\u0085") for row in training_rows()]
        args = ToolExpanderConfig(output_dir=str(folder), **SMALL, **settings)
        ToolExpanderTrainer("tiny", even_is_good, args, rows, builtin.heldout_rows(6, 0, ("easy",))).train()
        return (folder / "rollouts.jsonl").read_bytes()

    whole = of(tmp_path / "whole", max_steps=4)
    of(tmp_path / "parts", max_steps=2)
    assert of(tmp_path / "parts", max_steps=4, resume=True) == whole
    assert "\u2028" in json.loads(whole.split(b"\n")[0])["prompt"]


def test_rows_that_are_trained_on_and_evaluated_on_are_counted(tmp_path, capsys):
    rows = training_rows()
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL, max_steps=1)
    summary = ToolExpanderTrainer("tiny", even_is_good, args, rows[:8], rows[6:], demonstrations=rows[10:]).train()
    assert summary["eval_rows_seen"] == 4 and summary["eval_rows"] == 6
    assert metrics(tmp_path / "run", ["data"])[0]["eval_rows_seen"] == 4


def test_a_probe_that_takes_the_last_tokens_ends_the_run(finished, tmp_path):
    """The budget is checked again before a step, because the round's probe may have used it up."""
    folder, _ = finished
    probes, steps = metrics(folder, ["probe"]), metrics(folder, ["step"])
    second = next(i for i, step in enumerate(steps) if step["round"] == 1)
    budget = (steps[second - 1]["spent_tokens"] + probes[1]["spent_tokens"]) // 2
    assert steps[second - 1]["spent_tokens"] < budget < probes[1]["spent_tokens"]
    summary = make_trainer(tmp_path / "run", max_tokens=budget).train()
    assert summary["steps"] == second
    assert [probe["step"] for probe in metrics(tmp_path / "run", ["probe"])] == [0, second, second]


def test_probes_tell_what_leaving_early_saved(tmp_path):
    make_trainer(tmp_path / "run", max_steps=1).train()
    for found in metrics(tmp_path / "run", ["probe"]):
        assert found["saved_rollouts"] == found["rows"] * SMALL["probe_rollouts"] - found["rollouts"] >= 0


def test_waves_cost_little_more_than_one_rollout_at_a_time():
    """At the solve rates of weak models: most rows hard, the others anywhere between; all rollouts equally long."""
    rng = random.Random(0)
    rates = [0.0] * 600 + [rng.random() for _ in range(400)]
    outcomes = {row: [rng.random() < rate for _ in range(10)] for row, rate in enumerate(rates)}
    written = Counter()

    def attempt(asked, n, first):
        for row, _ in asked:
            assert not any(outcomes[row][:first]), "it has left"
            written["waves"] += n
        return [any(outcomes[row][first : first + n]) for row, _ in asked]

    found = probe([(row, ()) for row in outcomes], 10, attempt)
    written["sequential"] = sum((wins.index(True) + 1) if any(wins) else 10 for wins in outcomes.values())
    assert found.hard == [row for row, wins in outcomes.items() if not any(wins)]
    assert written["waves"] == found.rollouts <= 1.15 * written["sequential"]
