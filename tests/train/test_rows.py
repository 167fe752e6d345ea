"""Rows of a run: datasets by name, their split, and their prompts."""

import json
from dataclasses import replace

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.toolcall import DemonstrationIndex
from toolx_kernels.toolcall.chat import Chat, render_prompt
from toolx_kernels.toolcall.datasets import builtin, builtin_facts
from toolx_kernels.train.cold_start import cold_start_examples
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.rows import load_demonstrations, load_eval_rows, load_rows, split_rows


@pytest.fixture(scope="module")
def rows():
    return builtin.train_rows(60, 0)


def test_the_split_depends_on_content_alone(rows):
    renamed = [replace(row, id=f"elsewhere:{n}") for n, row in enumerate(rows)]
    assert [row.prompt for row in split_rows(renamed, 0.3)[1]] == [row.prompt for row in split_rows(rows, 0.3)[1]]
    twice = split_rows([*rows, *renamed], 0.3)
    assert not {row.user_text for row in twice[0]} & {row.user_text for row in twice[1]}
    train, held_out = split_rows(rows, 0.3)
    assert {row.id for row in train} | {row.id for row in held_out} == {row.id for row in rows}
    assert not {row.id for row in train} & {row.id for row in held_out}
    assert 5 < len(held_out) < 31
    fewer_train, fewer_held_out = split_rows(rows[::2], 0.3)
    assert {row.id for row in fewer_held_out} <= {row.id for row in held_out}
    assert {row.id for row in split_rows(rows, 0.5)[1]} > {row.id for row in held_out}
    with pytest.raises(InputError, match="A dataset of 1 rows leaves"):
        split_rows(rows[:1], 0.2)


def test_builtin_rows_follow_the_config():
    train, held_out = load_rows(ToolExpanderConfig(dataset="builtin", train_rows=24, eval_rows=12, seed=3))
    assert (len(train), len(held_out)) == (24, 12)
    assert [row.prompt for row in train] == [row.prompt for row in builtin.train_rows(24, 3)]
    other_train, same_held_out = load_rows(ToolExpanderConfig(dataset="builtin", train_rows=24, eval_rows=12, seed=4))
    assert [row.prompt for row in other_train] != [row.prompt for row in train]
    assert same_held_out == held_out, "runs with different seeds are scored on the same rows"


def test_rows_of_one_id_in_two_datasets_keep_their_own_prompts(rows):
    tokenizer = tiny_tokenizer()
    prompts = Prompts(Chat(tokenizer), 1024)
    other = replace(rows[1], id=rows[0].id)
    for row in (rows[0], other, rows[0]):
        assert prompts.ids(row) == render_prompt(tokenizer, row)
    shown = prompts.ids(rows[0], rows[2:3])
    assert shown == render_prompt(tokenizer, rows[0], rows[2:3]) != prompts.ids(rows[0])


def test_completions_end_with_the_end_of_turn(rows):
    tokenizer = tiny_tokenizer()
    ids = Prompts(Chat(tokenizer), 1024).chat.completion_ids(rows[0].answer)
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in ids[:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("<tool_call>")


def test_the_cold_start_of_other_datasets_shows_answers_and_some_demonstrations(rows):
    config = ToolExpanderConfig(dataset="mine.jsonl", cold_start_demonstrations=0.5)
    stream = cold_start_examples(config, rows, DemonstrationIndex(rows))
    epoch = [next(stream) for _ in rows]
    assert sorted(e.row.id for e in epoch) == sorted(row.id for row in rows)
    assert all(e.target == e.row.answer and e.row not in e.demonstrations for e in epoch)
    assert 0 < sum(bool(e.demonstrations) for e in epoch) < len(epoch)
    config = ToolExpanderConfig(dataset="mine.jsonl", cold_start_demonstrations=0.0)
    never = cold_start_examples(config, rows, DemonstrationIndex(rows))
    assert not any(next(never).demonstrations for _ in rows)


def test_demonstrations_and_answers_stay_within_the_context(rows):
    chat = Chat(tiny_tokenizer())
    row, demos = rows[0], rows[2:5]
    raw, with_one = (len(chat.prompt_ids(row, shown)) for shown in ((), demos[:1]))
    assert Prompts(chat, 1024).fitting(row, demos) == demos
    assert Prompts(chat, with_one + 1).fitting(row, demos) == demos[:1]
    room = with_one - raw
    assert Prompts(chat, with_one + room).fitting(row, demos, room=room) == demos[:1]
    assert Prompts(chat, with_one + room - 1).fitting(row, demos[:1], room=room) == []
    long = replace(demos[0], id="long", prompt="find the hotel " * 200)
    assert Prompts(chat, with_one + 1).fitting(row, [long, demos[0]]) == demos[:1], "what is too long is skipped"
    assert Prompts(chat, with_one + 1).fitting(row, demos[:1], room=1000) == [], "capped by the raw prompt's"


def test_overlong_rows_are_counted_or_left_out(rows):
    chat = Chat(tiny_tokenizer())
    longest = max(rows, key=lambda row: len(chat.prompt_ids(row)))
    length = len(chat.prompt_ids(longest))
    assert Prompts(chat, length + 1).fitting_rows(rows, "error") == rows
    prompts = Prompts(chat, length)
    too_long = [row for row in rows if len(chat.prompt_ids(row)) == length]
    message = f"{len(too_long)} of {len(rows)} rows do not fit .* {length} tokens; the longest is {longest.id}, .* drop"
    with pytest.raises(InputError, match=message):
        prompts.fitting_rows(rows, "error")
    assert prompts.fitting_rows(rows, "drop") == [row for row in rows if row not in too_long]
    shortest = min(rows, key=lambda row: len(chat.prompt_ids(row))).id
    message = (
        f"None of {len(rows)} rows is left, .* context of 10 tokens; the shortest is {shortest}, .*: shorten its t"
    )
    with pytest.raises(InputError, match=message):
        Prompts(chat, 10).fitting_rows(rows, "drop")
    ends = {row.id: len(chat.prompt_ids(row)) + len(chat.completion_ids(row.answer)) for row in rows}
    least = min(ends, key=ends.get)
    with pytest.raises(InputError, match="whose prompt and answer have .* without a cold start"):
        Prompts(chat, ends[least]).fitting_rows(rows, "error", answers=True)
    kept = Prompts(chat, ends[least]).fitting_rows(rows, "drop", answers=True)
    assert [row.id for row in kept] == [row for row in ends if ends[row] == ends[least]]


@pytest.mark.parametrize("dataset", ["builtin,x.jsonl", "x.jsonl, builtin-turns"])
def test_built_in_tasks_stand_alone(dataset):
    with pytest.raises(InputError, match="builtin.* is generated for each run: name it alone"):
        load_eval_rows(dataset)
    with pytest.raises(InputError, match="demonstration_dataset=builtin holds the evaluation rows of builtin"):
        load_demonstrations(ToolExpanderConfig(demonstration_dataset="builtin"))


def test_the_task_with_facts_brings_its_demonstrations_unless_others_are_named(tmp_path):
    assert load_demonstrations(ToolExpanderConfig(dataset="builtin-facts")) == builtin_facts.documentation()
    assert load_demonstrations(ToolExpanderConfig(dataset="builtin")) == []
    file = tmp_path / "rows.jsonl"
    row = builtin.train_rows(1, 0)[0]
    file.write_text(json.dumps({"id": "mine", "prompt": row.prompt, "tools": row.tools, "answer": row.answer}))
    (other,) = load_demonstrations(ToolExpanderConfig(dataset="builtin-facts", demonstration_dataset=str(file)))
    assert other.id == "mine"
