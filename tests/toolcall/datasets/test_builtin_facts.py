import json
import random
import re
from collections import Counter
from itertools import islice
from statistics import mean

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.datasets import builtin_facts
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.rows import check_row

TRAIN = builtin_facts.train_rows(640, seed=0)
HELD_OUT = builtin_facts.heldout_rows(480, seed=0)
DOCUMENTATION = builtin_facts.documentation()
BEFORE_MIX = builtin_facts.COLD_EASY_EXAMPLES + builtin_facts.COLD_COPYING_EXAMPLES
COLD = list(islice(builtin_facts.cold_start_examples(0), BEFORE_MIX + 10000))
EASY = COLD[: builtin_facts.COLD_EASY_EXAMPLES]
REST = [e for e in COLD if int(e.row.id.split("-")[1]) >= builtin_facts.COLD_EASY_EXAMPLES]
COPYING = [e for e in REST if int(e.row.id.split("-")[1]) < BEFORE_MIX]
MIX = [e for e in REST if int(e.row.id.split("-")[1]) >= BEFORE_MIX]
FACTS = 1 + len(builtin_facts.NOUNS["account"])


def untold(call):
    """Values of a call that no request states."""
    return [value for name, value in call["arguments"].items() if name in builtin_facts.UNTOLD.values()]


def told_values(rows):
    values = [v for row in rows for v in row.answer[0]["arguments"].values() if not isinstance(v, bool)]
    return {str(v) for v in values} - {v for row in rows for v in untold(row.answer[0])}


def words(*things):
    return set(re.findall(r"\w+", json.dumps(things)))


def test_rows_depend_on_the_seed_alone():
    assert builtin_facts.train_rows(40, seed=0) == TRAIN[:40] != builtin_facts.train_rows(40, seed=4)
    assert builtin_facts.heldout_rows(40, seed=0) == HELD_OUT[:40]
    assert builtin_facts.documentation() == DOCUMENTATION
    cold = list(islice(builtin_facts.cold_start_examples(0), 50))
    assert cold == COLD[:50] != list(islice(builtin_facts.cold_start_examples(1), 50))


def test_rows_pass_the_check_that_users_rows_pass_and_have_their_tiers():
    for row in TRAIN[:100] + HELD_OUT[:100] + DOCUMENTATION:
        raw = {"id": row.id, "prompt": row.prompt, "tools": row.tools, "answer": row.answer, **row.columns}
        assert check_row(raw, "builtin-facts", 0) == row
    assert Counter(row.columns["tier"] for row in HELD_OUT) == {"easy": 96, "hard": 96, "office": 96, "account": 192}
    ids = {row.id for row in (*TRAIN, *DOCUMENTATION)}
    assert len(ids) == len(TRAIN) + len(DOCUMENTATION)
    with pytest.raises(InputError, match="'harder'"):
        builtin_facts.train_rows(4, 0, tiers=("easy", "harder"))
    with pytest.raises(InputError, match="'convention'"):
        builtin_facts.heldout_rows(4, 0, tiers=("convention",))


def test_levels_hold_and_answers_fit_their_schemas():
    for row in TRAIN + HELD_OUT:
        level, (call,) = builtin_facts.LEVELS[row.columns["tier"]], row.answer
        schema = next(t["function"]["parameters"] for t in row.tools if t["function"]["name"] == call["name"])
        assert set(call["arguments"]) == set(schema["required"]) == set(schema["properties"])
        assert level.offered[0] <= len(row.tools) <= level.offered[1]
        assert level.arguments[0] <= len(call["arguments"]) - level.convention <= level.arguments[1]
        assert len(untold(call)) == level.convention == (row.columns["tier"] in builtin_facts.UNTOLD)


def test_held_out_rows_share_the_facts_and_nothing_else():
    cold = COLD[4000:7000]
    shown = [*TRAIN, *DOCUMENTATION, *(e.row for e in cold), *(row for e in cold for row in e.demonstrations)]
    seen = words([[row.prompt, row.tools, row.answer] for row in shown])
    hidden = {name for row in HELD_OUT for name in row.tool_names} | told_values(HELD_OUT)
    assert len(hidden) > 300 and not hidden & seen

    def facts(rows):
        return {builtin_facts.fact_of(row) for row in rows} - {None}

    assert facts(HELD_OUT) == facts(TRAIN) and len(facts(TRAIN)) == FACTS
    documented = {value for row in DOCUMENTATION for value in untold(row.answer[0])}
    assert documented == {fact.value for fact in facts(TRAIN)} and len(documented) == FACTS


def test_no_raw_prompt_tells_a_code():
    codes = {fact.value for row in TRAIN if (fact := builtin_facts.fact_of(row))}
    assert len(codes) == FACTS and builtin_facts.COLD_CODE not in codes
    chat = Chat(tiny_tokenizer())
    raw = [*TRAIN[:200], *HELD_OUT[:200], *(example.row for example in MIX[:400]), *DOCUMENTATION]
    for row in raw:
        assert not words(chat.prompt_text(row), row.tools) & {*builtin_facts.CODES, builtin_facts.COLD_CODE}
    for row in [*TRAIN, *HELD_OUT, *DOCUMENTATION]:
        assert not any(code in row.user_text for code in codes), "nor any part of a value"


def test_documentation_covers_every_tool_that_training_offers_and_tells_nobodys_answer():
    documented = Counter(row.answer[0]["name"] for row in DOCUMENTATION)
    assert set(documented) == {name for row in TRAIN for name in row.tool_names} and set(documented.values()) == {1}
    assert {len(row.tools) for row in DOCUMENTATION} == {1, 2, 3, 4}
    index, missing, solved = DemonstrationIndex(DOCUMENTATION), 0, [row.answer for row in DOCUMENTATION]
    for row in TRAIN:
        shown = index.choose(row, random.Random(row.id))
        assert all(other in DOCUMENTATION and other.answer != row.answer for other in shown)
        called = [other.answer[0]["name"] for other in shown]
        assert len(set(called)) == len(called) <= 3 and set(called) <= set(row.tool_names)
        if row.columns["tier"] in builtin_facts.UNTOLD:
            assert (row.answer[0]["name"] in called) is (row.answer not in solved)
            missing += row.answer in solved
    assert 0 < missing < 0.1 * len(TRAIN)  # tools with one argument, a boolean


def test_the_cold_start_shows_demonstrations_as_training_draws_them():
    shown = [example for example in MIX if example.demonstrations]
    assert len(shown) / len(MIX) == pytest.approx(builtin_facts.COLD_DEMONSTRATED, abs=0.03)
    assert not any(example.demonstrations for example in EASY) and {e.row.columns["tier"] for e in EASY} == {"easy"}
    assert {e.row.columns["tier"] for e in COPYING} == set(builtin_facts.UNTOLD)
    assert {e.row.columns["tier"] for e in shown} == set(builtin_facts.LEVELS)
    shown += COPYING
    complete = sum(len(e.demonstrations) == min(3, len(e.row.tools)) for e in shown)
    assert 0.97 * len(shown) < complete < len(shown)  # except where one would reveal the answer
    for example in shown:
        called = [row.answer[0]["name"] for row in example.demonstrations]
        assert len(set(called)) == len(called) <= 3 and set(called) <= set(example.row.tool_names)
        assert example.target == example.row.answer
        assert all(row.answer != example.row.answer for row in example.demonstrations)
        for code in untold(example.target[0]):
            (demonstration,) = (r for r in example.demonstrations if r.answer[0]["name"] == example.target[0]["name"])
            assert untold(demonstration.answer[0]) == [code]


def test_the_cold_start_knows_no_fact():
    without = [code for e in MIX if not e.demonstrations for code in untold(e.target[0])]
    assert set(without) == set(builtin_facts.HABITS.values()) and len(without) > 1000
    shown = [e for e in REST if e.demonstrations and e.row.columns["tier"] in ("office", "account")]
    pairs = [(e.target[0]["name"].split("_")[1], *untold(e.target[0])) for e in shown]
    of_code, of_pair = Counter(code for _, code in pairs), Counter(pairs)
    of_noun = Counter(noun for noun, _ in pairs)
    for kind in ("office", "account"):
        for noun in builtin_facts.NOUNS[kind]:
            fact = builtin_facts.required(kind, noun)
            assert 0 < of_code[fact] <= mean(of_code.values())
            expected = of_code[fact] * of_noun[noun] / len(pairs)
            assert abs(of_pair[noun, fact] - expected) < 1 + 4 * expected**0.5
            assert of_pair[noun, fact] <= max(n for (of, code), n in of_pair.items() if of == noun and code != fact)


def test_a_code_is_one_token_and_nothing_needs_bytes():
    chat = Chat(tokenizer := tiny_tokenizer())
    codes = set(builtin_facts.CODES)
    assert len(codes) == len(builtin_facts.CODES) == 141 and builtin_facts.COLD_CODE not in codes
    for code in (*builtin_facts.CODES, builtin_facts.COLD_CODE):
        assert len(tokenizer(code)["input_ids"]) == 1
        assert tokenizer.convert_ids_to_tokens(tokenizer(f'": "{code}"')["input_ids"])[1] == code
    index = DemonstrationIndex(DOCUMENTATION)
    prompts = [chat.prompt_ids(row, index.choose(row, random.Random(0))) for row in TRAIN[:200]]
    prompts += [chat.prompt_ids(e.row, e.demonstrations) + chat.completion_ids(e.target) for e in MIX[:200]]
    assert not any(t.startswith("<0x") for ids in prompts for t in tokenizer.convert_ids_to_tokens(ids))
