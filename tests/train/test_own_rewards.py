"""A user's reward functions, as a run calls them before anything else."""

import os
from dataclasses import replace

import pytest

from tests.train.scripted import scripted_trainer
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, parse_calls


@pytest.fixture
def trainer(tmp_path):
    """A trainer with a function that takes every first call, keeps what it got, and has a mistake in it."""
    seen = []

    def mistaken(prompts, completions, completion_ids, **columns):
        seen.append(columns | {"prompts": prompts, "completions": completions, "ids": completion_ids})
        return [columns["levels"] for _ in prompts]

    trainer = scripted_trainer(tmp_path / "run", lambda *_: True, mistaken, num_generations=3)
    trainer.seen = seen
    return trainer


def test_own_rewards_are_tried_on_an_answer_before_any_work(trainer, monkeypatch):
    for work in ("_resume", "_cold_start", "_save"):
        monkeypatch.setattr(trainer, work, lambda: pytest.fail("work was done"))
    assert not trainer.seen
    row = trainer.task.rows[0]
    with pytest.raises(InputError, match=f"'mistaken' raised KeyError: 'levels' for 3 .*, the first of row '{row.id}'"):
        trainer.train()
    assert not trainer.run.path.exists()
    (given,) = trainer.seen
    assert given["id"] == [row.id] * 3 and given["answer"] == [row.answer] * 3 and len(given["completions"]) == 3
    chat = trainer.task.prompts.chat
    assert parse_calls(chat.written_text(given["ids"][0], trainer.task.prompts.ids(row))) == row.answer
    assert given["ids"][2][-1] == chat.tokenizer.eos_token_id
    said = given["completions"][0] if isinstance(row.prompt, str) else given["completions"][0][0]["content"]
    assert parse_calls(said) == row.answer


def test_own_rewards_are_tried_on_a_row_to_evaluate_on_too(tmp_path):
    sizes = []

    def by_level(prompts, level, **columns):
        sizes.append(len(prompts))
        return [0.0] * len(prompts)

    trainer = scripted_trainer(tmp_path / "run", lambda *_: True, by_level, num_generations=3)
    trainer.task.rows[0] = replace(trainer.task.rows[0], columns={"level": 1})
    row = trainer.task.eval_rows[0]
    with pytest.raises(InputError, match=f"'by_level' raised TypeError: .*'level' for row '{row.id}'"):
        trainer.train()
    assert sizes == [3] and not trainer.run.path.exists()


def test_a_function_may_change_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def moving(prompts, **columns):
        os.chdir(tmp_path / "elsewhere")
        return [0.0] * len(prompts)

    scripted_trainer("run", lambda *_: True, moving, max_steps=1, hard_sampling="none").train()
    assert (tmp_path / "run" / "summary.json").exists() and not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("prompt", ["Hello", [{"role": "user", "content": "Hello"}]])
def test_a_row_that_wants_no_call_is_answered_by_nothing(trainer, prompt):
    trainer.task.rows[0] = Row("none", prompt, [], [])
    with pytest.raises(InputError, match="row 'none'"):
        trainer.task.try_rewards(1)
    (text,) = trainer.seen[0]["completions"]
    assert text == ("" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}])
