"""Runs whose chat template has a date, names or thoughts, and what a resumed run must keep."""

import datetime
import json
from dataclasses import replace
from itertools import repeat

import pytest

from tests.train.test_trainer import SMALL, even_is_good, training_rows
from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import tiny_model, tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.datasets.builtin_turns import Episode
from toolx_kernels.train.cold_start import supervised
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.run import folder as run_folder
from toolx_kernels.train.trainer import ToolExpanderTrainer

DATED = "{{ strftime_now('%d %b %Y') }}."


def make(folder, template, reward=even_is_good, **settings):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template(tokenizer.chat_template)
    cold_start = settings.pop("cold_start", None)
    args = ToolExpanderConfig(output_dir=str(folder), **(SMALL | settings))
    rows = training_rows(), builtin.heldout_rows(6, 0, ("easy",))
    return ToolExpanderTrainer(tiny_model(tokenizer, 0), reward, args, *rows, tokenizer, cold_start)


def first_prompt(trainer):
    return trainer.tokenizer.decode(trainer.task.prompts.ids(trainer.task.rows[0]))


def test_a_run_keeps_the_day_on_which_it_began(tmp_path, monkeypatch):
    class Clock(datetime.date):
        now = datetime.date(2026, 2, 28)

        @classmethod
        def today(cls):
            return cls.now

    def dated(template):
        return {"default": DATED + template, "other": template}  # so a checkpoint holds a folder of templates

    monkeypatch.setattr(run_folder, "date", Clock)
    trainer = make(tmp_path / "run", dated, max_steps=1)
    assert "28 Feb 2026." in first_prompt(trainer)
    trainer.train()
    assert (tmp_path / "run" / "checkpoint-1" / "additional_chat_templates").is_dir()
    Clock.now = datetime.date(2026, 3, 1)
    resumed = make(tmp_path / "run", dated, max_steps=2, resume=True)
    assert first_prompt(resumed) == first_prompt(trainer)
    assert resumed.train()["steps"] == 2
    for changed in (lambda template: DATED + "Today. " + template, lambda template: template):
        with pytest.raises(InputError, match=r"was run with other prompts \(chat template, .* resume with the same"):
            make(tmp_path / "run", changed, max_steps=3, resume=True).train()
    with pytest.raises(InputError, match="was run with other prompts"):
        make(tmp_path / "run", dated, max_steps=3, resume=True, date="2026-03-01").train()
    assert "01 Mar 2026." in first_prompt(make(tmp_path / "new", dated))


def opening(template):
    return template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}")


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"thoughts": "forbidden"}, "thoughts='forbidden' leaves nothing to earn"),
        ({"self_exemplify": True}, "self_exemplify=True needs the examples before the thought"),
    ],
)
def test_what_a_template_that_opens_a_thought_cannot_earn_is_refused(settings, said, tmp_path):
    with pytest.raises(InputError, match=said):
        make(tmp_path / "run", opening, None, **settings)
    assert not (tmp_path / "run").exists()
    assert first_prompt(make(tmp_path / "run", opening, None)).endswith("<think>")


def test_self_exemplifying_examples_are_cut_to_what_the_context_holds():
    rows = training_rows(6)
    tokenizer = tiny_tokenizer()
    example = builtin.Example(rows[0], (), rows[0].answer, tuple(rows[1:5]))
    cuts = []
    group, cut = supervised(Prompts(Chat(tokenizer), 1024), example)
    assert cut == 0
    length = len(group.prompt) + len(group.completions[0])
    for context in range(length, length - 120, -20):
        group, cut = supervised(Prompts(Chat(tokenizer), context), example)
        assert len(group.prompt) + len(group.completions[0]) <= context
        cuts.append(cut)
    assert cuts == sorted(cuts) and cuts[0] == 0 < cuts[-1] < 4


def thinking(template):
    return "{# </think> #}" + template


@pytest.mark.parametrize("thoughts, reward", [("auto", 1.0), ("forbidden", 0.0)])
def test_a_thinking_model_earns_what_its_answers_earn(thoughts, reward, tmp_path):
    row = replace(training_rows()[0], columns={})
    rows = [replace(row, id=name) for name in ("a", "b", "c", "d")]
    answer = json.dumps(row.answer[0])
    turn = {"role": "assistant", "content": f"<think>x</think><tool_call>{answer}</tool_call>"}
    settings = SMALL | {
        "max_steps": 1, "cold_start_steps": 30, "cold_start_batch_size": 1, "cold_start_learning_rate": 5e-3,
        "temperature": 0.1, "learning_rate": 1e-9, "max_completion_length": 200, "thoughts": thoughts,
    }  # fmt: skip
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = thinking(tokenizer.chat_template)
    trainer = ToolExpanderTrainer(
        tiny_model(tokenizer, 0),
        None,
        ToolExpanderConfig(output_dir=str(tmp_path / "run"), **settings),
        rows,
        rows[:1],
        tokenizer,
        repeat(Episode(row, [turn])),
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["event"] == "step"]
    assert step["reward"] == reward and step["accuracy"] == step["thoughts"] == 1.0 and step["unclosed_thoughts"] == 0
