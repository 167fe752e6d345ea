"""Whole small runs of the trainer: they learn, repeat, resume, and stop in time."""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolx_kernels.compare.arms import Difference, arms_of
from toolx_kernels.compare.figures import Change, figures
from toolx_kernels.compare.plot import comparison_figure
from toolx_kernels.compare.report import describe
from toolx_kernels.compare.runs import read_run
from toolx_kernels.engine import RolloutEngine
from toolx_kernels.errors import DivergedError, InputError
from toolx_kernels.models.load import load_model
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.update.batch import PackedGroup

SMALL = dict(
    num_generations=4,
    prompts_per_step=4,
    max_completion_length=12,
    temperature=1.0,
    learning_rate=3e-3,
    num_train_epochs=2,
    save_steps=2,
    probe_rollouts=2,
    solved_reward=2.0,  # which no rollout reaches
    hard_sampling="replace",  # has rounds with probes
    cold_start_steps=2,
    cold_start_batch_size=4,
    cold_start_learning_rate=1e-3,
    micro_batch_tokens=512,
)


def even_is_good(prompts, completions, completion_ids, **columns):
    """A reward that varies between rollouts of a random model, so that the first step has a gradient."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def training_rows(count=12):
    """Easy rows whose answers use few tools, so that most have a demonstration among the others."""
    rows = builtin.train_rows(600, 0, ("easy",))
    common = Counter(row.answer[0]["name"] for row in rows).most_common(3)
    return [row for row in rows if row.answer[0]["name"] in dict(common)][:count]


def make_trainer(folder, reward=even_is_good, **settings):
    args = ToolExpanderConfig(output_dir=str(folder), **(SMALL | settings))
    return ToolExpanderTrainer("tiny", reward, args, training_rows(), builtin.heldout_rows(6, 0, ("easy",)))


def metrics(folder, events=("cold_start", "probe", "step", "eval")):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines if line["event"] in events]


def weights(folder, step):
    return AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}").state_dict()


def assert_same_weights(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_what_it_promises(finished):
    folder, summary = finished
    assert summary == json.loads((folder / "summary.json").read_text())
    for name in ("eval_before", "eval_after", "hard_before", "hard_after", "wall_seconds", "peak_memory_bytes"):
        assert isinstance(summary[name], (int, float)), name
    assert summary["steps"] == 6 and summary["train_rows"] == 12
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "rollouts.jsonl", "hard_samples.jsonl", "summary.json", "curves.png",
        "checkpoint-4", "checkpoint-6",
    }  # fmt: skip
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert len(rollouts) == 6 * 4 and rollouts[0].keys() >= {"step", "row", "prompt", "completion", "reward"}


def test_checkpoints_open_with_from_pretrained_and_by_run_folder(finished):
    folder, _ = finished
    model, tokenizer = load_model(str(folder))
    assert_same_weights(model.state_dict(), weights(folder, 6))
    assert AutoTokenizer.from_pretrained(folder / "checkpoint-6").get_vocab() == tokenizer.get_vocab()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_metrics_hold_what_the_run_did(finished):
    folder, _ = finished
    steps = metrics(folder, ["step"])
    assert [s["step"] for s in steps] == list(range(1, 7))
    # a round is one epoch of 3 steps; the rate is multiplied by 0.8 from one to the next
    assert [s["learning_rate"] for s in steps] == pytest.approx([3e-3] * 3 + [2.4e-3] * 3)
    for s in steps:
        assert s["grad_norm"] > 0 and math.isfinite(s["loss"]) and s["logp_difference"] < 1e-4
    probes = metrics(folder, ["probe"])
    assert [p["round"] for p in probes] == [0, 1, 2] and all(0 <= p["hard"] <= 12 for p in probes)
    assert sum(s["replaced"] for s in steps) > 0, "a random model finds every row hard, so demonstrations must appear"


def test_the_reward_rises(tmp_path):
    """Even token ids are rewarded. At first about half are even; the model learns to prefer them."""
    folder = tmp_path / "run"
    make_trainer(folder, num_train_epochs=6, hard_sampling="none", cold_start_steps=0, learning_rate=1e-2).train()
    rewards = [s["reward"] for s in metrics(folder, ["step"])]
    assert sum(rewards[:4]) / 4 < 0.6 and sum(rewards[-4:]) / 4 > 0.8


def test_a_run_without_rows_to_evaluate_on_reports_no_accuracy(finished, tmp_path, capsys):
    """And can be compared with one that has some."""
    run = tmp_path / "run"
    args = ToolExpanderConfig(output_dir=str(run), **SMALL | {"max_steps": 1, "cold_start_steps": 0})
    trainer = ToolExpanderTrainer("tiny", even_is_good, args, training_rows())
    summary = trainer.train()
    assert (summary["eval_before"], summary["eval_after"], summary["eval_rows"]) == (None, None, 0)
    assert not metrics(run, ["eval"]) and len(metrics(run, ["step"])) == 1
    assert "accuracy before RL: not measured, as there is no eval_dataset" in capsys.readouterr().out
    with pytest.raises(InputError, match="no rows to evaluate on: pass at least one"):
        trainer.evaluate()
    arms = arms_of([read_run(finished[0]), read_run(run)])
    of_arms = figures(arms)
    assert of_arms["run"].accuracy == Change(None, None, Difference(0, None))
    assert of_arms["run"].hard.after and of_arms["finished"].accuracy.after
    assert re.search(r"^run +1 +– +–", describe(arms), re.MULTILINE)
    assert comparison_figure(arms).axes


def test_two_runs_are_the_same(finished, tmp_path):
    folder, _ = finished
    make_trainer(tmp_path / "again").train()
    assert metrics(tmp_path / "again") == metrics(folder)
    assert_same_weights(weights(tmp_path / "again", 6), weights(folder, 6))
    make_trainer(tmp_path / "other", seed=1).train()
    assert metrics(tmp_path / "other") != metrics(folder)


def test_a_longer_resume_probes_the_rows_that_were_left_out(tmp_path):
    run = tmp_path / "run"
    make_trainer(run, max_steps=1).train()
    make_trainer(run, max_steps=3, resume=True).train()
    probes = metrics(run, ["probe"])
    assert [(p["round"], p["rows"], p["rollouts"]) for p in probes] == [(0, 4, 8), (0, 12, 16), (1, 12, 24)]


def test_the_gradient_does_not_depend_on_micro_batches(finished, tmp_path):
    folder, _ = finished
    make_trainer(tmp_path / "cut", micro_batch_tokens=60, max_steps=2).train()
    for cut, whole in zip(metrics(tmp_path / "cut", ["step"]), metrics(folder, ["step"]), strict=False):
        assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
        assert cut["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_plain_grpo_shows_no_demonstrations(tmp_path):
    make_trainer(tmp_path / "plain", hard_sampling="none", max_steps=2).train()
    assert all(s["replaced"] == 0 for s in metrics(tmp_path / "plain", ["step"]))


def test_kl_is_measured_against_the_model_before_rl(tmp_path):
    make_trainer(tmp_path / "kl", beta=0.05).train()
    kl = [s["kl"] for s in metrics(tmp_path / "kl", ["step"])]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[-1] > 0
    assert (tmp_path / "kl" / "checkpoint-0").exists()
    make_trainer(tmp_path / "halves", beta=0.05, max_steps=3).train()
    make_trainer(tmp_path / "halves", beta=0.05, resume=True).train()
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "kl")


@pytest.mark.parametrize("loss", ["bnpo", "dr_grpo", "dapo"])
def test_every_loss_type_trains(tmp_path, loss):
    make_trainer(tmp_path / loss, loss_type=loss, max_steps=1).train()
    assert metrics(tmp_path / loss, ["step"])[0]["grad_norm"] > 0


def test_groups_without_a_gradient_change_nothing(tmp_path):
    def constant(prompts, completions, completion_ids, **columns):
        return [0.5] * len(completions)

    trainer = make_trainer(tmp_path / "dead", constant, max_steps=2, cold_start_steps=0)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    assert_same_weights(trainer.model.state_dict(), before)
    assert [s["groups_with_gradient"] for s in metrics(tmp_path / "dead", ["step"])] == [0, 0]


def test_a_nan_stops_the_run_and_names_step_and_checkpoint(tmp_path):
    run, calls = tmp_path / "nan", []

    def poison(prompts, completions, completion_ids, **columns):
        calls.append(len(completions) == 16)  # of a step, not of a probe
        if calls[-1] and sum(calls) == 4:
            with torch.no_grad():
                next(trainer.model.parameters())[9:].fill_(torch.nan)
        return even_is_good(prompts, completions, completion_ids)

    trainer = make_trainer(run, poison)
    said = (
        r"step 4: (\d+) of \1 tokens have a log-prob that is not a number; the last good checkpoint is .*checkpoint-3"
    )
    with pytest.raises(InputError, match=said):
        trainer.train()
    assert all(tensor.isfinite().all() for tensor in weights(run, 3).values())


@pytest.mark.parametrize(
    "given, lower",
    [({}, "learning_rate"), ({"beta": 1e30, "sft_coef": 0.5}, "learning_rate or beta or sft_coef")],
)
def test_a_loss_that_is_not_finite_names_the_weights_that_can_make_it_so(tmp_path, given, lower):
    trainer = make_trainer(tmp_path / "run", **given)
    with pytest.raises(DivergedError, match=rf"^step 1: the loss is inf; .* is none yet; lower {lower}\.$"):
        with trainer._naming("step 1"):
            raise DivergedError("the loss is inf")


def test_weights_that_explode_stop_the_run_though_no_group_has_a_gradient(tmp_path):
    """Broken weights make all completions equal, so no loss is computed that could be NaN."""
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"step 1|step 2|checkpoint 1") as error:
        make_trainer(run, learning_rate=1e30, save_steps=1).train()
    assert "not finite" in str(error.value) or "the loss is" in str(error.value)
    assert "NaN" not in (run / "metrics.jsonl").read_text()
    assert not (run / "summary.json").exists()


def test_streams_of_training_and_probes_never_meet(tmp_path, monkeypatch):
    calls = []
    generate = RolloutEngine.generate

    def spy(self, prompts, n, params, *, row_ids=None, step=0, first_rollout=0, on_completion=None):
        def seen(place, index, completion):
            ends_its_group = on_completion(place, index, completion)
            assert not ends_its_group or step >= 2**31, "only a probe leaves at the first correct one"
            return ends_its_group

        if params.temperature:
            calls.append((step, n, first_rollout))
            assert params.temperature == 0.7
        return generate(
            self,
            prompts,
            n,
            params,
            row_ids=row_ids,
            step=step,
            first_rollout=first_rollout,
            on_completion=seen,
        )

    monkeypatch.setattr(RolloutEngine, "generate", spy)
    make_trainer(tmp_path / "run", None, temperature=0.7, beta=1e-3, probe_rollouts=5, cold_start_steps=0).train()
    training = [call for call in calls if call[0] < 2**31]
    assert training == [(step, 4, 0) for step in range(6)]
    for round_index in range(3):  # waves of 1, 3 and 1 of the 5 rollouts
        waves = [call[1:] for call in calls if call[0] == 2**31 + round_index]
        assert waves == [(1, 0), (3, 1), (1, 4)]
    assert all(s["logp_difference"] < 1e-4 for s in metrics(tmp_path / "run", ["step"])), "sampled and trained at 0.7"


def test_gradients_are_clipped(tmp_path):
    trainer = make_trainer(tmp_path / "run", max_grad_norm=0.01)
    learner, seen = trainer.learner, []
    apply = learner.optimizer.apply
    learner.optimizer.apply = lambda norm, seed, _: seen.append((norm, seed)) or apply(norm, seed)
    prompts, row = trainer.task.prompts, trainer.task.rows[0]
    batch = [PackedGroup(prompts.ids(row), [prompts.chat.completion_ids(row.answer)])]
    assert learner.imitate(batch, 3)["grad_norm"] > 0.1
    assert seen == [(0.01, (0, 3))]


def test_the_cold_start_of_given_rows_imitates_these(tmp_path):
    trainer = make_trainer(tmp_path / "run", dataset=None)
    shown = [next(trainer.cold_start).row.id for _ in trainer.task.rows]
    assert sorted(shown) == sorted(row.id for row in trainer.task.rows)


def test_a_reference_that_is_gone_is_named_before_anything_is_lost(tmp_path):
    run = tmp_path / "run"
    make_trainer(run, beta=0.05, max_steps=3).train()
    shutil.rmtree(run / "checkpoint-0")
    with pytest.raises(InputError, match="checkpoint-0, which is missing"):
        make_trainer(run, beta=0.05, resume=True).train()


def test_resuming_a_finished_run_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    first = make_trainer(run, max_steps=2, save_total_limit=1).train()
    again = make_trainer(run, max_steps=2, save_total_limit=1, resume=True).train()
    assert again["eval_after"] == first["eval_after"]
    assert [path.name for path in run.glob("*checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda **_: [1.0], "rewards"),
        (lambda **_: 1 / 0, "division by zero"),
        (lambda completions, **_: ["good"] * len(completions), "good"),
        (lambda completions, **_: [math.nan] * len(completions), "nan"),
    ],
    ids=["too few", "raises", "text", "nan"],
)
def test_a_broken_reward_function_is_named(tmp_path, reward, message):
    reward.__name__ = "my_reward"
    with pytest.raises(InputError, match="my_reward") as error:
        make_trainer(tmp_path / "run", reward, cold_start_steps=0).train()
    assert message in str(error.value)


def test_several_rewards_add_up_and_none_adds_nothing(tmp_path):
    def not_applicable(prompts, completions, completion_ids, **columns):
        return [None] * len(completions)

    make_trainer(tmp_path / "both", [even_is_good, not_applicable], max_steps=1).train()
    make_trainer(tmp_path / "one", max_steps=1).train()
    both, one = (
        [{k: v for k, v in line.items() if k != "rewards"} for line in metrics(tmp_path / name)]
        for name in ("both", "one")
    )
    assert both == one
    (step,) = metrics(tmp_path / "both", ["step"])
    assert step["rewards"] == {"even_is_good": step["reward"], "not_applicable": None}


def test_a_folder_with_a_run_is_not_touched(finished, tmp_path):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="already holds a run: pass --resume .* or --overwrite"):
        make_trainer(folder)
    with pytest.raises(InputError, match="was run with learning_rate=0.003, not 0.1"):
        make_trainer(folder, resume=True, learning_rate=0.1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="holds no run to resume"):
        make_trainer(tmp_path / "none", resume=True)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files but no run"):
        make_trainer(tmp_path / "letters", overwrite=True)


def test_overwrite_starts_anew(tmp_path):
    make_trainer(tmp_path / "run", max_steps=2).train()
    make_trainer(tmp_path / "run", max_steps=1, overwrite=True).train()
    assert [s["step"] for s in metrics(tmp_path / "run", ["step"])] == [1]
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_prompts_beyond_the_context_are_named(tmp_path):
    rows = training_rows()
    rows[7] = replace(rows[7], prompt="find the hotel " * 600)
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(InputError, match=f"1 of {len(rows)} rows do not fit .*; the longest is {rows[7].id}, "):
        ToolExpanderTrainer("tiny", even_is_good, args, rows, rows[:2])
    assert not (tmp_path / "run").exists()
    trainer = ToolExpanderTrainer("tiny", even_is_good, replace(args, overlong="drop"), rows, rows[6:9])
    assert (trainer.task.rows, trainer.task.eval_rows) == (rows[:7] + rows[8:], [rows[6], rows[8]])
    assert trainer.task.left_out == 2
