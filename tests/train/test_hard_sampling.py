"""Probing in waves, and replacing hard rows by few-shot versions of themselves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.toolcall import builtin
from toolx_kernels.train.hard_sampling import PlainGRPO, ReplaceHard, probe, waves


@given(st.integers(1, 40))
def test_waves_add_up(rollouts):
    assert sum(waves(rollouts)) == rollouts and all(size > 0 for size in waves(rollouts))


def test_a_prompt_leaves_at_its_first_correct_wave():
    first_correct = {0: 0, 1: 2, 2: 3, 3: 4, 4: 9, 5: None}  # index of the first correct rollout of each row
    asked = []

    def correct(rows, n, first):
        asked.append((tuple(rows), n, first))
        return [first_correct[row] is not None and first_correct[row] < first + n for row in rows]

    found = probe(range(6), 10, correct)
    assert asked == [((0, 1, 2, 3, 4, 5), 1, 0), ((1, 2, 3, 4, 5), 3, 1), ((3, 4, 5), 6, 4)]
    assert found.hard == [5]
    assert found.rollouts == 6 + 15 + 18 < 60


@given(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=1, max_size=12))
def test_the_classification_is_that_of_all_rollouts(outcomes):
    found = probe(range(len(outcomes)), 10, lambda rows, n, first: [any(outcomes[r][first : first + n]) for r in rows])
    assert found.hard == [row for row, of_row in enumerate(outcomes) if not any(of_row)]
    assert found.rollouts <= 10 * len(outcomes)


@pytest.fixture(scope="module")
def rows():
    return builtin.train_rows(400, 0, ("easy",))


def policy(rows, fitting=lambda row, shown: shown, **settings):
    return ReplaceHard(rows, **({"seed": 0, "per_tool": 1, "limit": 3} | settings), fitting=fitting)


def test_hard_rows_show_other_rows_of_their_tools_and_no_others_do(rows):
    replacing = policy(rows)
    replacing.start_round(0, [3, 50, 51, 52])
    shown = [row for row in range(len(rows)) if replacing.demonstrations(row)]
    assert shown and set(shown) <= {3, 50, 51, 52}
    for row in shown:
        for demo in replacing.demonstrations(row):
            assert demo.id != rows[row].id and demo.answer != rows[row].answer
            assert {call["name"] for call in demo.answer} <= set(rows[row].tool_names)


def test_rounds_start_afresh_and_repeat(rows):
    one, two = policy(rows), policy(rows)
    hard = list(range(0, 400, 7))
    one.start_round(0, hard)
    first_round = dict(one.shown)
    one.start_round(1, hard)
    assert one.shown != first_round, "another round may show other demonstrations"
    two.start_round(1, hard)
    assert one.shown == two.shown
    one.start_round(2, [])
    assert not any(one.demonstrations(row) for row in hard), "solved rows are raw again"


def test_a_row_whose_tool_occurs_nowhere_else_stays_raw(rows):
    lonely = replace(rows[0], id="lonely", answer=[{"name": "unheard_of", "arguments": {}}], tools=[])
    replacing = policy([*rows, lonely])
    replacing.start_round(0, [len(rows)])
    assert not replacing.demonstrations(len(rows))


def test_demonstrations_are_dropped_until_the_prompt_fits(rows):
    free, tight, none = policy(rows), policy(rows, lambda _, shown: shown[:1]), policy(rows, lambda *_: [])
    for each in (free, tight, none):
        each.start_round(0, range(400))
    assert max(map(len, free.shown.values())) > 1
    assert {row: shown[:1] for row, shown in free.shown.items()} == tight.shown
    assert none.shown == {}


def test_plain_grpo_replaces_nothing(rows):
    plain = PlainGRPO()
    plain.start_round(0, [1, 2, 3])
    assert not plain.demonstrations(1)
