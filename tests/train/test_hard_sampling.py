"""Hard sampling: probes in waves, the table of hard rows, the choice of demonstrations, and the groups sampled."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import DemonstrationIndex
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.train.groups import RAW, GroupPlan, Help
from toolx_kernels.train.hard_sampling import HardSamples, Probe, probe, waves
from toolx_kernels.train.policies.demonstrators import RandomDemonstrations, VerifiedDemonstrations
from toolx_kernels.train.policies.hard_samples import FewShot, PlainGRPO


def raw(rows):
    return [(row, ()) for row in rows]


@given(st.integers(1, 40))
def test_waves_add_up(rollouts):
    assert sum(waves(rollouts)) == rollouts and all(size > 0 for size in waves(rollouts))


def test_a_prompt_leaves_at_its_first_correct_wave():
    first_correct = {0: 0, 1: 2, 2: 3, 3: 4, 4: 9, 5: None}  # index of the first correct rollout of each row
    asked = []

    def attempt(rows, n, first):
        rows = [row for row, _ in rows]
        asked.append((tuple(rows), n, first))
        return [first_correct[row] is not None and first_correct[row] < first + n for row in rows]

    found = probe(raw(range(6)), 10, attempt)
    assert asked == [((0, 1, 2, 3, 4, 5), 1, 0), ((1, 2, 3, 4, 5), 3, 1), ((3, 4, 5), 6, 4)]
    assert found.hard == [5]
    assert found.tried == {0: 1, 1: 4, 2: 4, 3: 10, 4: 10, 5: 10}
    assert found.rollouts == 6 + 15 + 18 < 60


@given(st.lists(st.lists(st.booleans(), min_size=10, max_size=10), min_size=1, max_size=12))
def test_the_classification_is_that_of_all_rollouts(outcomes):
    def attempt(rows, n, first):
        return [any(outcomes[row][first : first + n]) for row, _ in rows]

    found = probe(raw(range(len(outcomes))), 10, attempt)
    assert found.hard == [row for row, of_row in enumerate(outcomes) if not any(of_row)]
    assert found.rollouts <= 10 * len(outcomes)


@pytest.fixture(scope="module")
def rows():
    return builtin.train_rows(400, 0, ("easy",))


def chooser(rows, fitting=lambda row, shown: shown, **settings):
    return RandomDemonstrations(
        DemonstrationIndex(rows), **({"seed": 0, "per_tool": 1, "limit": 3} | settings), fitting=fitting
    )


def table_of(rows, hard, round_index=0):
    table = HardSamples(rows)
    table.record(Probe({row: 10 for row in hard}, list(hard), 0.0), round_index)
    return table


def test_hard_rows_show_other_rows_of_their_tools_and_no_others_do(rows):
    hard = [3, 50, 51, 52]
    table = table_of(rows, hard)
    chooser(rows).choose(table, hard, 0)
    shown = [row for row in range(len(rows)) if table.demonstrations(row)]
    assert shown and set(shown) <= set(hard)
    for row in shown:
        for demo in table.demonstrations(row):
            assert demo.id != rows[row].id and demo.answer != rows[row].answer
            assert {call["name"] for call in demo.answer} <= set(rows[row].tool_names)


def test_random_demonstrations_are_drawn_anew_each_round_and_repeat(rows):
    hard = list(range(0, 400, 7))
    tables = [table_of(rows, hard) for _ in range(2)]
    seen = []
    for table in tables:
        for round_index in (0, 1):
            chooser(rows).choose(table, hard, round_index)
            seen.append([table.demonstrations(row) for row in hard])
    assert seen[:2] == seen[2:] and seen[0] != seen[1]


def test_a_row_whose_tool_occurs_nowhere_else_stays_raw_and_is_counted(rows):
    lonely = replace(rows[0], id="lonely", answer=[{"name": "unheard_of", "arguments": {}}], tools=[])
    table = table_of([*rows, lonely], [3, len(rows)])
    chooser(rows).choose(table, [3, len(rows)], 0)
    assert not table.demonstrations(len(rows))
    counters = table.counters(0)
    assert (counters["hard"], counters["replaced"], counters["without_demonstrations"]) == (2, 1, 1)


def test_demonstrations_are_dropped_until_the_prompt_fits(rows):
    everything = range(400)
    shown = []
    for fitting in (lambda _, shown: shown, lambda _, shown: shown[:1], lambda *_: []):
        table = table_of(rows, everything)
        chooser(rows, fitting).choose(table, everything, 0)
        shown.append([table.demonstrations(row) for row in everything])
        assert table.counters(0)["demonstrations_cut"] == sum(map(len, shown[0])) - sum(map(len, shown[-1]))
    free, tight, none = shown
    assert max(map(len, free)) > 1
    assert [of_row[:1] for of_row in free] == tight
    assert not any(none)


# ---- better demonstrations


def verified(rows, attempt, tries=4, rollouts=4):
    return VerifiedDemonstrations(chooser(rows), tries, rollouts, lambda number: attempt)


def test_better_demonstrations_are_drawn_until_they_help(rows):
    hard = [row for row in range(40) if len(chooser(rows).draw(rows[row], 0, 0)[0])]
    draws = {row: [chooser(rows).draw(rows[row], 0, number)[0] for number in range(4)] for row in hard}
    helps = {row: draws[row][row % 4] for row in hard if row % 5}  # nothing helps every fifth row
    asked = []

    def attempt(asked_now, n, first):
        asked.append((len(asked_now), n, first))
        return [shown == helps.get(row) for row, shown in asked_now]

    table = table_of(rows, hard)
    verified(rows, attempt).choose(table, hard, 0)
    for row in hard:
        state = table.states[row]
        if row in helps:
            first = draws[row].index(helps[row])
            assert table.demonstrations(row) == helps[row] and state.verified and state.tries == first + 1
        else:
            assert table.demonstrations(row) == () and state.verified is False and state.tries == 4
    assert max(n + first for _, n, first in asked) == 4, "at most verify_rollouts for a draw"


def test_verified_demonstrations_stay_while_the_row_is_hard_and_go_when_it_is_solved(rows):
    hard = [row for row in range(40) if len(chooser(rows).draw(rows[row], 0, 0)[0])][:6]
    calls = []

    def attempt(asked, n, first):
        calls.append([row for row, _ in asked])
        return [True] * len(asked)

    better, table = verified(rows, attempt), table_of(rows, hard)
    better.choose(table, hard, 0)
    before = [table.demonstrations(row) for row in hard]
    solved, still = hard[:2], hard[2:]
    table.record(Probe({row: 1 if row in solved else 10 for row in hard}, still, 0.0), 1)
    better.choose(table, still, 1)
    assert [table.demonstrations(row) for row in still] == before[2:] and len(calls) == 1
    assert not any(table.demonstrations(row) for row in solved)
    table.record(Probe({row: 10 for row in hard}, hard, 0.0), 2)  # hard again, so they may get demonstrations again
    better.choose(table, hard, 2)
    assert calls[1] == solved and all(table.demonstrations(row) for row in hard)
    assert table.counters(2) | {} == {
        "rows": 6, "hard": 6, "replaced": 6, "without_demonstrations": 0, "demonstrations_cut": 0,
        "recovered": 0, "relapsed": 2, "only_shown": 0,
    }  # fmt: skip


# ---- the table


def test_the_table_tells_the_story_of_every_row(rows):
    table = HardSamples(rows[:4])
    table.record(Probe({0: 10, 1: 4, 2: 10}, [0, 2], 0.0), 0)
    table.show(0, (rows[3],), 1, True, 2)
    assert table.counters(0)["demonstrations_cut"] == 1
    table.record(Probe({0: 1, 1: 10, 2: 10}, [1, 2], 0.0), 1)
    assert table.counters(1) == {
        "rows": 3, "hard": 2, "replaced": 0, "without_demonstrations": 2, "demonstrations_cut": 0,
        "recovered": 1, "relapsed": 1, "only_shown": 0,
    }  # fmt: skip
    lines = table.lines()
    assert [line["id"] for line in lines] == [row.id for row in rows[:3]], "a row that was never probed has no line"
    assert lines[0] == {
        "id": rows[0].id, "hard": False, "probes": [[0, 0, 10], [1, 1, 1]], "demonstrations": [], "cut": 0,
        "verified": None, "tries": 0, "retired": [1], "relapsed": [], "draws": [0, 0], "only_shown": [],
    }  # fmt: skip
    assert lines[1]["relapsed"] == [1] and lines[1]["hard"]


def test_the_table_survives_a_checkpoint(rows):
    table = table_of(rows, [1, 2, 3])
    chooser(rows).choose(table, [1, 2, 3], 0)
    again = HardSamples(rows)
    again.load(json.loads(json.dumps(table.lines())))
    assert again.states == table.states and again.demonstrations(2) == table.demonstrations(2)


def test_demonstrations_may_come_from_other_rows_than_the_training_rows(rows):
    train, others = rows[:40], rows[40:]
    table = HardSamples(train, others)
    table.record(Probe({row: 10 for row in range(40)}, list(range(40)), 0.0), 0)
    chooser([*train, *others]).choose(table, list(range(40)), 0)
    ids = {name for state in table.states for name in state.demonstrations}
    assert ids & {row.id for row in others}
    for row in range(40):
        assert [d.id for d in table.demonstrations(row)] == table.states[row].demonstrations


def test_demonstrations_with_the_id_of_another_row_are_refused(rows):
    HardSamples(rows[:4], rows[2:8])
    with pytest.raises(InputError, match=f"another row with the id '{rows[1].id}'"):
        HardSamples(rows[:4], [replace(rows[9], id=rows[1].id)])


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6))
def test_counters_add_up_over_any_history(solved):
    """``solved[round][row]``: recoveries and relapses are changes from one round to the next."""
    table = HardSamples(builtin.train_rows(5, 0))
    for round_index, of_round in enumerate(solved):
        hard = [row for row, done in enumerate(of_round) if not done]
        table.record(Probe({row: 1 if done else 10 for row, done in enumerate(of_round)}, hard, 0.0), round_index)
        counters = table.counters(round_index)
        before = solved[round_index - 1] if round_index else of_round
        assert counters["hard"] == table.hard == len(hard)
        assert counters["recovered"] == sum(now and not then for now, then in zip(of_round, before, strict=True))
        assert counters["relapsed"] == sum(then and not now for now, then in zip(of_round, before, strict=True))


# ---- groups sampled


def test_what_each_form_rolls_out(rows):
    hard = [row for row in range(40) if len(chooser(rows).draw(rows[row], 0, 0)[0])][:1]
    row, easy = hard[0], 399

    def groups(policy, of):
        table = table_of(rows, hard)
        policy.start_round(table, hard, 0)
        return policy.groups(table, of)

    shown, _ = chooser(rows).draw(rows[row], 0, 0)
    forms = {form: FewShot(form, chooser(rows)) for form in ("replace", "add", "distill")}
    assert groups(forms["replace"], row) == [GroupPlan(row, (Help(shown),), Help(shown))]
    assert groups(forms["add"], row) == [GroupPlan(row), GroupPlan(row, (Help(shown),), Help(shown))]
    assert groups(forms["distill"], row) == [GroupPlan(row, (RAW, Help(shown)))]
    assert groups(PlainGRPO(), row) == [GroupPlan(row)]
    for form in forms.values():
        assert groups(form, easy) == [GroupPlan(easy)], "a row that is not hard is raw"


def test_a_draw_that_the_context_cuts_to_nothing_is_one_try_of_several(rows):
    """The row is tried again, because another draw may be shorter."""
    hard = [row for row in range(40) if len(chooser(rows).draw(rows[row], 0, 0)[0])][:4]
    draws = []

    def fitting(row, shown):
        draws.append(row.id)
        return [] if draws.count(row.id) < 3 else shown

    better = VerifiedDemonstrations(
        chooser(rows, fitting), 4, 1, lambda number: lambda asked, n, first: [True] * len(asked)
    )
    table = table_of(rows, hard)
    better.choose(table, hard, 0)
    assert all(table.states[row].tries == 3 and table.states[row].verified for row in hard)


@pytest.mark.parametrize("solved", [True, False])
def test_ten_thousand_rows_of_which_all_or_none_are_hard(solved):
    """Work per row is constant, counted in rollouts and demonstrations requested."""
    rows = builtin.train_rows(10_000, 0)
    table, asked, fitted = HardSamples(rows), [], []

    def attempt(of_wave, n, first):
        asked.append(len(of_wave))
        return [solved] * len(of_wave)

    def fitting(row, shown):
        fitted.append(row.id)
        return shown

    found = probe(raw(range(10_000)), 10, attempt)
    table.record(found, 0)
    policy = FewShot("replace", chooser(rows, fitting))
    policy.start_round(table, found.hard, 0)
    groups = [policy.groups(table, row) for row in range(10_000)]
    assert asked == ([10_000] if solved else [10_000] * 3)
    counters = table.counters(0)
    assert counters["hard"] == (0 if solved else 10_000) == len(fitted)
    assert counters["replaced"] + counters["without_demonstrations"] == counters["hard"]
    assert sum(bool(of_row[0].scored_with.demonstrations) for of_row in groups) == counters["replaced"]
    assert len(table.lines()) == 10_000
