"""The built-in task in two turns: splits, values from requests and from lookups, and the cold start."""

import json
from collections import Counter
from itertools import islice

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.rollout.tool_loop import supervised_episode
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets import builtin, builtin_turns
from toolx_kernels.toolcall.datasets.builtin_turns import KEYS, Registry, turns_of
from toolx_kernels.toolcall.parse import parse_calls
from toolx_kernels.toolcall.rewards import is_correct, no_think_reward
from toolx_kernels.toolcall.rows import check_row
from toolx_kernels.toolcall.tool_format import render_completion
from toolx_kernels.toolcall.tools import Toolbox

TRAIN = builtin_turns.train_rows(400, seed=0)
HELD_OUT = builtin_turns.heldout_rows(200, seed=0)
COLD = list(islice(builtin_turns.cold_start_episodes(0), 600))


def values(row):
    return {v for call in row.answer for v in call["arguments"].values()}


def looked_up(row):
    return {kind: next(iter(records.values())) for kind, records in row.columns["records"].items() if records}


def text_of(episode):
    return render_completion([call for turn in episode.turns for call in turn.get("calls", ())])


def test_rows_depend_on_the_seed_alone_and_pass_the_check_of_users_rows():
    assert TRAIN[:20] == builtin_turns.train_rows(20, seed=0) != builtin_turns.train_rows(20, seed=1)
    assert list(islice(builtin_turns.cold_start_episodes(0), 20)) == COLD[:20]
    for row in TRAIN[:50] + HELD_OUT[:50]:
        raw = {"id": row.id, "prompt": row.prompt, "tools": row.tools, "answer": row.answer, **row.columns}
        assert check_row(raw, "builtin", 0) == row
    assert Counter(row.columns["tier"] for row in HELD_OUT) == dict.fromkeys(builtin_turns.TIERS, 100)
    with pytest.raises(InputError, match="'hard'"):
        builtin_turns.train_rows(2, 0, tiers=("hard",))


def test_held_out_rows_share_no_tool_and_no_value_with_training():
    seen_values = {v for row in [*TRAIN, *(e.row for e in COLD)] for v in values(row)}
    seen_tools = {name for row in [*TRAIN, *(e.row for e in COLD)] for name in row.tool_names}
    for row in HELD_OUT:
        assert not values(row) & seen_values
        assert set(row.tool_names) & seen_tools == {f"find_{kind}" for kind in KEYS}


def test_what_the_last_call_needs_is_shown_by_a_lookup_only():
    for row in TRAIN + HELD_OUT:
        *lookups, last = row.answer
        found = looked_up(row)
        assert len(lookups) == len(found) == 1 + builtin_turns.TIERS.index(row.columns["tier"])
        for call in lookups:
            kind = call["name"].removeprefix("find_")
            ((key, value),) = call["arguments"].items()
            assert key == KEYS[kind] and value in row.prompt and row.columns["records"][kind] == {value: found[kind]}
        schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
        assert set(last["arguments"]) == set(schemas[last["name"]]["required"])
        for name, value in last["arguments"].items():
            assert type(value) is {"string": str, "integer": int}[schemas[last["name"]]["properties"][name]["type"]]
            if name in found:
                assert value == found[name] and str(value) not in row.prompt
            else:
                assert str(value) in row.prompt
    assert 0.3 < sum(len(row.answer[-1]["arguments"]) > len(looked_up(row)) for row in TRAIN) / len(TRAIN) < 0.7


def test_a_tool_has_the_same_parameters_in_every_row():
    shown = {}
    for row in TRAIN + HELD_OUT:
        for tool in row.tools:
            assert shown.setdefault(tool["function"]["name"], tool) == tool
    of_cold = {}
    for episode in COLD:
        for tool in episode.row.tools:
            name = tool["function"]["name"]
            of_cold.setdefault(name, set()).add(json.dumps(tool["function"]["parameters"]))
    changing = [len(kinds) for name, kinds in of_cold.items() if not name.startswith(("find_number", "find_label"))]
    assert sum(changing) / len(changing) > 2, "in the cold start they have to be read"


def test_the_environment_answers_the_lookups_and_a_solved_row_is_correct():
    toolbox = Toolbox(environment_factory=Registry, timeout=10)
    rows = TRAIN[:40] + [episode.row for episode in COLD[:40]]
    assert toolbox.offer(rows) == rows, "rows offer the lookups themselves"
    results = toolbox.answer([(s, row.answer[:-1]) for s, row in zip(toolbox.open(rows), rows, strict=True)])
    for row, texts in zip(rows, results, strict=True):
        turns = turns_of(row, row.answer[-1])
        assert [m["content"] for m in turns if m["role"] == "tool"] == texts
        first, last = (render_completion(turn["calls"]) for turn in (turns[0], turns[-1]))
        text = f"{first}\n{last}"
        assert is_correct(text, row) and parse_calls(text) == row.answer
        assert no_think_reward([row.prompt], [text], [[]], answer=[row.answer], tools=[row.tools]) == [1.0]
        assert not is_correct(first, row) and not is_correct(last, row)
    (session,) = toolbox.open(rows[:1])
    error = toolbox.answer([(session, [{"name": "find_number", "arguments": {"guest": "Nobody"}}])])[0][0]
    assert json.loads(error) == {"error": "LookupError: no guest Nobody"}


def test_episodes_of_the_cold_start_are_right_but_for_quoted_integers():
    quoted = 0
    with_integers = 0
    for episode in COLD:
        first, *results, last = episode.turns
        assert first["calls"] == episode.row.answer[:-1]
        assert len(results) == len(episode.row.answer) - 1
        (call,), right = last["calls"], episode.row.answer[-1]
        assert {p: str(v) for p, v in call["arguments"].items()} == {p: str(v) for p, v in right["arguments"].items()}
        if any(isinstance(v, int) for v in right["arguments"].values()):
            with_integers += 1
            quoted += call != right
            assert is_correct(text_of(episode), episode.row) == (call == right)
    assert quoted / with_integers == pytest.approx(builtin.NOISE["quoted_integers"], abs=0.07)


def test_the_tiny_model_has_pieces_for_all_of_it_but_a_comma():
    chat = Chat(tokenizer := tiny_tokenizer())
    for row, turns in [(e.row, e.turns) for e in COLD[:200]] + [(r, turns_of(r, r.answer[-1])) for r in HELD_OUT]:
        prompt = chat.prompt_ids(row)
        completion, mask = supervised_episode(chat, row, prompt, turns)
        odd = {t for t in tokenizer.convert_ids_to_tokens(prompt + completion) if t.startswith("<0x")}
        assert odd <= {"<0x2C>"} and len(prompt) <= 90 and len(completion) <= 64 and not all(mask)
