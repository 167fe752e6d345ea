import json
import random
import re
from collections import Counter
from itertools import islice
from statistics import fmean

import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.demonstrations import DemonstrationIndex
from toolx_kernels.toolcall.match import exact_match
from toolx_kernels.toolcall.rows import check_row

TRAIN = builtin.train_rows(1200, seed=0)
HELD_OUT = builtin.heldout_rows(480, seed=0)
COLD = list(islice(builtin.cold_start_examples(0), builtin.COLD_EASY_EXAMPLES + 3000))
MIX = COLD[builtin.COLD_EASY_EXAMPLES :]


def values(row, kind):
    return {v for call in row.answer for v in call["arguments"].values() if type(v) is kind}


def test_rows_depend_on_the_seed_alone():
    assert builtin.train_rows(40, seed=3) == builtin.train_rows(40, seed=3) != builtin.train_rows(40, seed=4)
    assert builtin.heldout_rows(40, seed=3) == builtin.heldout_rows(40, seed=3)
    assert list(islice(builtin.cold_start_examples(5), 50)) == list(islice(builtin.cold_start_examples(5), 50))


def test_rows_pass_the_check_that_users_rows_pass():
    for row in TRAIN[:100] + HELD_OUT[:100]:
        raw = {"id": row.id, "prompt": row.prompt, "tools": row.tools, "answer": row.answer, **row.columns}
        assert check_row(raw, "builtin", 0) == row


def test_tiers_have_equal_parts_and_unique_ids():
    assert Counter(row.columns["tier"] for row in HELD_OUT) == dict.fromkeys(builtin.TIERS, 120)
    assert len({row.id for row in HELD_OUT}) == 480
    assert {row.columns["tier"] for row in builtin.train_rows(9, 0, tiers=("hard",))} == {"hard"}


def test_an_unknown_tier_is_refused():
    with pytest.raises(InputError, match="'harder'"):
        builtin.heldout_rows(4, 0, tiers=("easy", "harder"))


def test_levels_hold():
    for row in TRAIN + HELD_OUT:
        level = builtin.LEVELS[row.columns["tier"]]
        assert len(row.answer) == level.calls
        # a row with calls of two tools offers both, regardless of the lower bound
        assert max(level.offered[0], len({c["name"] for c in row.answer})) <= len(row.tools) <= level.offered[1]
        for call in row.answer:
            own = [name for name in call["arguments"] if name != "currency"]
            assert level.arguments[0] <= len(own) <= level.arguments[1]
            assert ("currency" in call["arguments"]) == level.convention


def test_an_answer_fits_the_schema_and_the_request_tells_all_but_the_currency():
    kinds = {"string": str, "integer": int, "boolean": bool}
    for row in TRAIN + HELD_OUT:
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools}
        for call in row.answer:
            schema = tools[call["name"]]
            assert set(call["arguments"]) == set(schema["required"]) == set(schema["properties"])
            for name, value in call["arguments"].items():
                assert type(value) is kinds[schema["properties"][name]["type"]]
                if name == "currency":
                    assert value == builtin.WANTED_CURRENCY and value not in row.prompt
                else:
                    spoken = builtin.BOOLEAN_WORDS[value] if isinstance(value, bool) else str(value)
                    assert re.search(rf"\b{name}\b\W*(set to )?\b{spoken}\b", row.prompt), (row.prompt, name, value)


def test_a_name_has_one_schema_in_all_rows():
    schemas = {}
    for row in TRAIN + HELD_OUT:
        for tool in row.tools:
            assert schemas.setdefault(tool["function"]["name"], tool) == tool


def test_held_out_names_and_values_occur_in_no_training_text():
    shown = [example.row for example in COLD] + [row for example in COLD for row in example.demonstrations]
    shown += TRAIN
    texts = {json.dumps([row.prompt, row.tools, row.answer]) for row in shown}
    texts |= {json.dumps(example.target) for example in COLD}
    seen = set(re.findall(r"\w+", " ".join(texts)))
    for row in HELD_OUT:
        hidden = set(row.tool_names) | {str(v) for v in values(row, str) | values(row, int)} - {"euro"}
        assert hidden and not hidden & seen
    assert {part for row in HELD_OUT for name in row.tool_names for part in name.split("_")} <= {
        part for row in TRAIN for name in row.tool_names for part in name.split("_")
    }


def test_distractors_of_the_hard_tier_look_alike():
    def alike(row):
        verb, noun = row.answer[0]["name"].split("_")
        others = [n.split("_") for n in row.tool_names if n != row.answer[0]["name"]]
        return sum(v == verb or n == noun for v, n in others) / len(others)

    hard = [row for row in TRAIN if row.columns["tier"] == "hard"]
    assert sum(map(alike, hard)) / len(hard) > 0.9


def test_most_training_rows_can_get_a_demonstration_of_what_they_answer():
    rows = builtin.train_rows(640, seed=1)
    index = DemonstrationIndex(rows)
    found = [bool(index.choose(row, random.Random(0))) for row in rows]
    assert sum(found) > 0.95 * len(rows)


def test_the_cold_start_is_easy_first_and_then_mixes_everything():
    easy = COLD[: builtin.COLD_EASY_EXAMPLES]
    assert {e.row.columns["tier"] for e in easy} == {"easy"} and not any(e.demonstrations for e in easy)
    plain = [e for e in MIX if not e.demonstrations]
    assert {e.row.columns["tier"] for e in plain} == set(builtin.TIERS)
    assert len(plain) / len(MIX) == pytest.approx(1 - builtin.COLD_DEMONSTRATED, abs=0.03)


def test_the_cold_start_shows_its_own_convention_unless_a_demonstration_says_otherwise():
    plain = {c["arguments"].get("currency") for e in MIX if not e.demonstrations for c in e.target}
    assert plain == {None, builtin.COLD_CURRENCY}
    shown = [e for e in MIX if e.demonstrations and e.row.columns["tier"] == "convention"]
    assert {e.target[0]["arguments"]["currency"] for e in shown} == set(builtin.CURRENCIES)
    for example in shown:
        name, told = example.row.answer[0]["name"], example.target[0]["arguments"]["currency"]
        calls = [call for row in example.demonstrations for call in row.answer]
        assert {call["arguments"]["currency"] for call in calls if call["name"] == name} == {told}


def test_the_cold_start_shows_demonstrations_as_training_draws_them():
    def kinds(shown):
        """Per tier: demonstrations per prompt, share of prompts with one of two calls, and with a tool not offered."""
        result = {}
        for tier in builtin.TIERS:
            prompts = [(row, those) for row, those in shown if row.columns["tier"] == tier and those]
            two_calls = [any(len(other.answer) == 2 for other in those) for _, those in prompts]
            foreign = [any(c["name"] not in row.tool_names for d in those for c in d.answer) for row, those in prompts]
            result[tier] = [fmean(len(those) for _, those in prompts), fmean(two_calls), fmean(foreign)]
        return result

    index = DemonstrationIndex(TRAIN)
    drawn = kinds([(row, index.choose(row, random.Random(row.id))) for row in TRAIN])
    shown = [(example.row, example.demonstrations) for example in MIX if example.demonstrations]
    for tier, numbers in kinds(shown).items():
        assert numbers == pytest.approx(drawn[tier], abs=0.2), tier
    for row, those in shown:
        assert all(set(row.tool_names) & {call["name"] for call in other.answer} for other in those)
        assert all(call not in other.answer for other in those for call in row.answer)


def test_bad_habits_are_as_frequent_as_stated_and_vanish_with_demonstrations():
    def share(flags):
        flags = list(flags)
        return sum(flags) / len(flags)

    for example in MIX:
        if example.demonstrations:
            assert example.target == example.row.answer
    plain = [e for e in MIX if not e.demonstrations]
    with_integers = [e for e in plain if values(e.row, int) and len(e.target) == len(e.row.answer)]
    with_booleans = [e for e in plain if values(e.row, bool) and len(e.target) == len(e.row.answer)]
    kept = [{type(v) for c in e.target for v in c["arguments"].values()} for e in with_integers]
    assert share(int not in k for k in kept) == pytest.approx(builtin.NOISE["quoted_integers"], abs=0.06)
    kept = [{type(v) for c in e.target for v in c["arguments"].values()} for e in with_booleans]
    assert share(bool not in k for k in kept) == pytest.approx(builtin.NOISE["boolean_words"], abs=0.06)
    pairs = [e for e in plain if len(e.row.answer) == 2]
    missing = share(len(e.target) == 1 for e in pairs)
    assert missing == pytest.approx(builtin.NOISE["second_call_missing"], abs=0.08)
    assert not any(exact_match(e.target, e.row.answer) for e in pairs if len(e.target) == 1)
