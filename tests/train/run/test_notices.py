"""What a run tells once while it runs and again in its summary."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.train.scripted import scripted_trainer, smaller_model, smaller_tokenizer
from tests.train.test_trainer import SMALL, even_is_good, metrics, training_rows
from toolx_kernels.cli.train import config_from
from toolx_kernels.errors import InputError
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.datasets.builtin import Example
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.groups import RAW, GroupPlan, ScoredGroup
from toolx_kernels.train.notices import Notices
from toolx_kernels.train.policies.advantages import chosen_advantage_shaper, give_advantages
from toolx_kernels.train.step_lines import step_values
from toolx_kernels.train.trainer import ToolExpanderTrainer

# ---- steps made by hand


def group(rewards, parts=None, finish="stop", text="", prompt=5, solved=False):
    """A group with these rewards, and its ``parts`` by function."""
    n = len(rewards)
    rollout = Rollout([7, 8], [-1.0] * 2, [0.5] * 2, None, text, [{"role": "assistant", "content": text}], finish)
    return ScoredGroup(
        GroupPlan(0),
        [3] * prompt,
        [rollout] * n,
        shown=[RAW] * n,
        retried=[False] * n,
        rewards=rewards,
        parts={name: [value] * n for name, value in (parts or {"f": 0.0}).items()},
        correct=[solved] * n,
        solved=[solved] * n,
    )


class Steps:
    """Steps of a run with the settings ``args``; ``told`` holds what its notices told."""

    def __init__(self, own_rewards=True, **settings):
        self.args = ToolExpanderConfig(hard_sampling="none", max_completion_length=64, **settings).settled(own_rewards)
        self.told = []
        self.notices = Notices(self.args, 100, own_rewards, lambda *one: self.told.append(one))
        self.number = 0

    def take(self, *groups, rate=1e-6):
        self.number, self.groups = self.number + 1, groups
        give_advantages(groups, chosen_advantage_shaper(self.args))
        record = {"step": self.number, "learning_rate": rate} | step_values(groups, 0)
        self.notices.step(record, groups, groups)
        return self


LIVE = dict(rewards=[0.0, 1.0, 0.5, 0.25], solved=True)
ALWAYS = {
    "unrewarded": (
        dict(rewards=[0.0] * 4, parts={"f": None, "g": None}, solved=True),
        "All 12 completions at steps 1 to 3 got None from every reward function, which counts as 0: return numbers",
    ),
    "never_applied": (
        dict(LIVE, parts={"f": 1.0, "g": None}),
        "Reward function 'g' returned None for all 12 completions at steps 1 to 3: let it return numbers",
    ),
    "truncated": (
        dict(LIVE, finish="length"),
        "12 of 12 completions at steps 1 to 3 were cut off at max_completion_length=64: raise it",
    ),
    "truncated ": (
        dict(LIVE, finish="length", prompt=50),
        "12 of 12 completions at steps 1 to 3 were cut off where the model's context ends: shorten the prompts",
    ),
    "unclosed_thoughts": (
        dict(LIVE, finish="length", text="<think>on and on"),
        "12 of 12 completions at steps 1 to 3 never closed their thought, so nothing in them counts: raise max_comp",
    ),
    "unsolved": (
        dict(LIVE, solved=False),
        "None of 12 completions at steps 1 to 3 was solved, as their best reward 1 is below solved_reward=7",
    ),
    "no_gradient": (
        dict(rewards=[0.0] * 4),
        "No group at steps 1 to 3 had a gradient from its rewards, as all rewards were 0: begin with cold_start_steps",
    ),
    "no_gradient ": (dict(rewards=[1.0] * 4, solved=True), "as the rewards of each group were equal: take rows of"),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_a_condition_that_always_holds_is_told_once_with_its_figures(name):
    settings, expected = ALWAYS[name]
    steps = Steps(solved_reward=7.0)
    for _ in range(3):
        steps.take(group(**settings))
    early = len(steps.told)
    sentences = steps.notices.end(3)
    assert any(expected in sentence for sentence in sentences), sentences
    kinds = [kind.partition(":")[0] for _, kind, _ in steps.told]
    assert name.strip() in kinds and len(kinds) == len(set(kinds)) == len(sentences)
    assert {*kinds} <= {name.strip(), "no_gradient"}
    at_once = name.strip() in ("unrewarded", "truncated", "unclosed_thoughts")
    assert early == at_once and [step for step, *_ in steps.told][0] == (1 if at_once else 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(rewards=[0.0] * 4, finish="length"), "as all completions were cut off: raise max_completion_length=64"),
        (dict(rewards=[1.0] * 4, finish="length"), "as the rewards of each group were equal: take rows of another"),
        (dict(rewards=[0.0] * 4, parts={"f": None}, finish="length"), "as no reward function applied to a completion"),
        (dict(rewards=[0.0] * 4, parts={"f": 1.0, "g": -1.0}), "as the rewards of each group were equal: take rows"),
        (dict(rewards=[0.0] * 4, parts={"f": None}), "as no reward function applied to a completion: return numbers"),
        (dict(rewards=[0.0, 1.0] * 2), "although rewards differed: advantage_shaping=difficulty leaves them no advan"),
    ],
)
def test_the_cause_of_no_gradient_is_named(settings, words):
    steps = Steps(advantage_shaping="difficulty").take(group(**settings))
    assert any(words in sentence for sentence in steps.notices.end(1))


def test_functions_that_cancel_are_the_cause_of_no_gradient():
    dead = group([0.0] * 4, finish="length")
    dead.parts = {"f": [0.0, 1.0] * 2, "g": [None, -1.0] * 2}
    steps = Steps(reward_weights=[1.0, 1.0]).take(dead)
    words = "although single functions' rewards differed, as their weighted sums are equal in each group: give other "
    assert any(f"{words}weights than reward_weights=[1.0, 1.0]." in sentence for sentence in steps.notices.end(1))


def test_a_good_run_is_told_nothing():
    steps = Steps()
    for number in range(30):  # a third of the steps is dead
        steps.take(group([0.0] * 4, finish="length" if number % 3 else "stop"), group(**LIVE)) if number % 3 else (
            steps.take(group([0.0] * 4), group([1.0] * 4, solved=True))
        )
    assert steps.told == steps.notices.end(30) == []


def test_what_a_good_run_may_have_is_told_after_ten_steps_in_a_row():
    steps = Steps()
    for number in range(1, 14):
        steps.take(group(**LIVE) if number == 2 else group([0.0] * 4))
    ((step, name, sentence),) = steps.told
    assert (step, name) == (12, "no_gradient") and sentence.startswith("No group at 11 of the steps 1 to 12 had a")
    (sentence,) = steps.notices.end(13)
    assert sentence.startswith("No group at 12 of the steps 1 to 13 had a gradient from its rewards, as all rewards")


def test_a_least_std_is_told_with_its_factor():
    """By the definition: advantages of .90 and .91 have 17 times the size without it."""
    dense = [0.9, 0.91, 0.9, 0.91]
    own, floored, equal = Steps(), Steps(min_reward_std=0.1), Steps(own_rewards=False)
    for steps in (own, floored, equal):
        steps.take(group(dense, solved=True), group([0.0] * 4))
    of_own, of_floored = (max(steps.groups[0].advantages) for steps in (own, floored))
    assert own.told == [] and of_own / of_floored == pytest.approx(17, abs=0.1)
    for steps in (floored, equal):
        ((_, _, sentence),) = steps.told
        assert "1 of 2 groups at step 1 are up to 17 times smaller" in sentence and "min_reward_std=0.1" in sentence


def test_a_learning_rate_that_has_decayed_is_told():
    steps = Steps().take(group(**LIVE), rate=1e-9).take(group(**LIVE), rate=9e-10).take(group(**LIVE), rate=8e-10)
    ((step, name, _),) = steps.told
    assert (step, name) == (2, "decayed")
    (sentence,) = steps.notices.end(3)
    assert sentence.startswith("The learning rate at steps 2 to 3 was at most 9e-10, less than a thousandth of learn")


# ---- runs


def told(folder):
    return {line["name"].partition(":")[0]: line["sentence"] for line in metrics(folder, ["notice"])}


def dense(completions, **columns):
    return [0.9 + 0.01 * (place % 2) for place in range(len(completions))]


def trainer_of(folder, **settings):
    """A scripted trainer whose completions are all cut off."""
    never = {"reward_funcs": dense, "hard_sampling": "none", "solved_reward": 0.0, "min_reward_std": 0.1}
    trainer = scripted_trainer(folder, lambda row, help, index: False, **never | settings)
    written = trainer.rollouter._rollout
    trainer.rollouter._rollout = lambda *arguments: replace(written(*arguments), finish_reason="length")
    return trainer


def test_a_resumed_run_tells_as_an_undisturbed_one(tmp_path, capsys):
    whole = trainer_of(tmp_path / "whole", max_steps=4).train()
    lines, printed = metrics(tmp_path / "whole", ["notice"]), capsys.readouterr().out
    expected = ["truncated_evaluation", "truncated", "floored"]
    assert [line["name"].partition(":")[0] for line in lines] == [*expected]
    assert [line["step"] for line in lines] == [0, 1, 1]
    assert all(f"notice: {line['sentence']}\n" in printed for line in lines)
    assert whole["notices"] == json.loads((tmp_path / "whole" / "summary.json").read_text())["notices"]
    assert any(
        sentence.startswith("64 of 64 completions at steps 1 to 4 were cut off") for sentence in whole["notices"]
    )
    assert [step["floored"] for step in metrics(tmp_path / "whole", ["step"])] == [4] * 4
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    resumed = trainer_of(tmp_path / "cut", max_steps=4, resume=True).train()
    assert resumed["notices"] == whole["notices"] and metrics(tmp_path / "cut", ["notice"]) == lines
    assert "notice" not in capsys.readouterr().out


def test_the_default_rewards_have_a_least_std_and_a_run_keeps_its_own(tmp_path):
    assert trainer_of(tmp_path / "own", min_reward_std=None).args.min_reward_std == 0
    named = ToolExpanderConfig(reward_funcs=["module.function"])
    assert (named.settled().min_reward_std, ToolExpanderConfig().settled().min_reward_std) == (0, 0.1)
    trainer = trainer_of(tmp_path / "run")
    trainer.run.start(trainer.args)
    assert config_from({"config": [], "resume": True, "output_dir": str(tmp_path / "run")}).min_reward_std == 0.1
    with pytest.raises(InputError, match=r"min_reward_std=0\.1, not 0\.0"):
        trainer_of(tmp_path / "run", min_reward_std=None, resume=True)


def test_a_probe_of_a_part_of_the_rows_is_told(tmp_path):
    """And hard rows none of which has a demonstration."""
    rows = dict(hard_sampling="replace", demonstrate_training_rows=False, solved_reward=1.0, max_steps=4)
    more = [replace(training_rows()[0], id="other", tools=[], answer=[])]
    trainer = scripted_trainer(tmp_path / "run", lambda row, help, index: False, even_is_good, more=more, **rows)
    summary = trainer.train()
    probes = metrics(tmp_path / "run", ["probe"])
    assert [(probe["rows"], probe["round_rows"]) for probe in probes] == [(12, 12), (4, 12), (12, 12)]
    assert told(tmp_path / "run")["partial_probe"] == (
        "Probing at step 3 covered 4 of 12 rows, as max_steps=4 ends the run within a round: compare its hard rows "
        "with no other probe's, or end after whole rounds, of 3 steps each."
    )
    assert any(
        sentence.startswith("None of 4 hard rows probed at 2 of the steps 0 to 3 has a demonstration, so hard_sampl")
        for sentence in summary["notices"]
    )


def test_rows_without_room_are_told_again_in_the_summary(tmp_path):
    """One prompt does not fit, and two others do but for their answers."""
    rows, tokenizer, model = training_rows(), smaller_tokenizer(), smaller_model()
    rows[9:] = [replace(row, prompt="so " * tokens) for row, tokens in zip(rows[9:], (299, 299, 330), strict=True)]
    settings = dict(max_steps=1, cold_start_steps=1, hard_sampling="none", overlong="drop", eval_on_start=False)
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL | settings)
    prompts = ToolExpanderTrainer(model, even_is_good, args, rows, processing_class=tokenizer).task.prompts
    model.config.max_position_embeddings = max(len(prompts.ids(row)) for row in rows[9:11]) + 2
    trainer = ToolExpanderTrainer(model, even_is_good, args, rows, processing_class=tokenizer)
    trainer.reporter.plan, trainer.reporter._gemm_speed = (lambda workload: None), 1.0
    first, second = trainer.train()["notices"][:2]
    assert first.startswith("1 of 12 rows were left out, as they do not fit the model's context: shorten their tools")
    assert second.startswith("2 of 11 training rows are no examples of the cold start, as prompt and answer do not fit")


def test_a_cold_start_that_ends_is_named(tmp_path):
    row = training_rows()[0]
    trainer = trainer_of(tmp_path / "run", cold_start_steps=3, cold_start_batch_size=2)
    trainer.cold_start = iter([Example(row, (), row.answer)] * 3)
    with pytest.raises(InputError, match="cold_start ended before step 3 of cold_start_steps=3: give one that does"):
        trainer.train()
