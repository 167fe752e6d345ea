"""Whole small runs in turns, with tools in rollouts: the built-in task and custom functions."""

import pytest

from tests.train.test_trainer import SMALL, even_is_good, metrics
from toolx_kernels.cli import commands
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets import builtin_turns
from toolx_kernels.train.cold_start import built_in_cold_start, supervised
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.rows import load_rows
from toolx_kernels.train.trainer import ToolExpanderTrainer
from toolx_kernels.train.update.learner import Learner

TURNS = SMALL | dict(
    dataset="builtin-turns",
    max_completion_length=96,
    max_tool_calling_iterations=1,
    cold_start_steps=120,
    cold_start_batch_size=8,
    cold_start_learning_rate=4e-3,
    train_rows=12,
    eval_rows=6,
    num_train_epochs=1,
    hard_sampling="none",
    micro_batch_tokens=4096,
)


@pytest.mark.soak
def test_the_built_in_task_in_turns_trains_on_what_the_model_wrote_alone(tmp_path, monkeypatch):
    """After a short cold start the model calls, reads what the registry returns, and continues."""
    seen, improve = [], Learner.improve

    def spy(self, groups, number):
        seen.extend(groups)
        return improve(self, groups, number)

    monkeypatch.setattr(Learner, "improve", spy)
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **TURNS)
    trainer = ToolExpanderTrainer(
        "tiny",
        even_is_good,
        args,
        *load_rows(args),
        cold_start=built_in_cold_start(args),
        environment_factory=builtin_turns.Registry,
    )
    trainer.train()
    rollouts = [rollout for group in seen for rollout in group.rollouts]
    several = [rollout for rollout in rollouts if rollout.mask is not None]
    assert several, "the cold start taught the form of a call"
    for rollout in several:
        assert {message["role"] for message in rollout.messages} == {"assistant", "tool"}
        written = [token for token, ours in zip(rollout.ids, rollout.mask, strict=True) if ours]
        shown = trainer.tokenizer.decode(written, skip_special_tokens=True)
        assert shown.replace("\n", "") == rollout.text.replace("\n", "")
        assert not any(logp for logp, ours in zip(rollout.logprobs, rollout.mask, strict=True) if not ours)
    for step in metrics(tmp_path / "run", ["step"]):
        assert step["logp_difference"] < 1e-4, "what is trained was sampled, turn by turn"
        assert step["completion_length"] * 16 == pytest.approx(round(step["completion_length"] * 16))


def test_cold_start_episodes_supervise_the_models_turns_alone(tmp_path):
    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **TURNS)
    trainer = ToolExpanderTrainer(
        "tiny",
        even_is_good,
        args,
        *load_rows(args),
        environment_factory=builtin_turns.Registry,
        cold_start=built_in_cold_start(args),
    )
    episode = next(example for example in trainer.cold_start if isinstance(example, builtin_turns.Episode))
    group, _ = supervised(trainer.task.prompts, episode)
    (ids,), (mask,) = group.completions, group.masks
    ours = trainer.tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if counts])
    theirs = trainer.tokenizer.decode([token for token, counts in zip(ids, mask, strict=True) if not counts])
    results = [turn["content"] for turn in episode.turns if turn["role"] == "tool"]
    assert all(result in theirs for result in results)
    assert ours.count("<tool_call>") == len(episode.row.answer) and "<tool_call>" not in theirs


def test_tools_that_cannot_be_offered_are_refused_before_the_run(tmp_path):
    def untyped(a):
        """Does something.

        Args:
            a: some value.
        """

    args = ToolExpanderConfig(output_dir=str(tmp_path / "run"), **TURNS)
    with pytest.raises(InputError, match="untyped"):
        ToolExpanderTrainer("tiny", even_is_good, args, *load_rows(args), tools=[untyped])
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_and_scores_the_task_in_turns(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = [
        "--dataset", "builtin-turns", "--output_dir", run, "--cold_start_steps", "2", "--max_steps", "1",
        "--train_rows", "8", "--eval_rows", "4", "--probe_rollouts", "1", "--prompts_per_step", "4",
    ]  # fmt: skip
    assert commands.main(["train", *flags]) == 0
    assert commands.main(["eval", "--model", run, "--dataset", "builtin-turns", "--eval_rows", "4"]) == 0
    assert "lookup" in capsys.readouterr().out
