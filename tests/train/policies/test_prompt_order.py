"""Prompt order by solve rate."""

import json

import pytest

from toolx_kernels.toolcall import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.hard_sampling import HardSamples
from toolx_kernels.train.policies.prompt_order import SolveRateOrder, chosen_prompt_order


def table_of(draws):
    """A table of rows with these [rollouts, solved]."""
    table = HardSamples([Row(f"row {n}", "p", [], []) for n in range(len(draws))])
    for state, drawn in zip(table.states, draws, strict=True):
        state.draws = list(drawn)
    return table


NEVER, ALWAYS = [30, 0], [30, 30]
# 30 rows worth rollouts (in turn new, rarely and often solved); 10 that are not
MIXED = table_of([[[0, 0], NEVER, [40, 3], [18, 17]][n % 4] if n % 8 != 5 else ALWAYS for n in range(40)])
OUTSIDE = {row for row in range(40) if row % 4 == 1}


@pytest.mark.parametrize(
    ("drawn", "worth"),
    [
        ([0, 0], True),
        ([18, 0], True),  # a mean of .05
        ([19, 0], False),
        ([18, 18], True),  # .95
        ([19, 19], False),
        ([58, 2], True),
        ([59, 2], False),
        ([59, 57], False),
        ([58, 56], True),
    ],
)
def test_the_bounds_of_what_is_worth_rollouts(drawn, worth):
    order, table = SolveRateOrder(count=6, size=3, seed=0), table_of([drawn] * 3 + [NEVER] * 3)
    others = sum(len({3, 4, 5} & set(order.rows(batch, table))) for batch in range(10))
    assert (others == 3) == worth  # a tenth of the 30 rows drawn


def test_a_tenth_of_a_batch_comes_from_the_others():
    order = SolveRateOrder(count=40, size=20, seed=0)
    for batch in range(50):
        rows = order.rows(batch, MIXED)
        assert len(set(rows)) == len(rows) == 20 and len(OUTSIDE & set(rows)) == 2
    for size in (2, 8, 10, 19):
        others = [len(OUTSIDE & set(SolveRateOrder(40, size, seed=0).rows(batch, MIXED))) for batch in range(20)]
        assert sum(others) == 2 * size and max(others) - min(others) <= 1


def test_where_one_kind_has_too_few_the_rest_is_of_the_other():
    few = table_of([[0, 0]] * 3 + [NEVER] * 20)
    rows = SolveRateOrder(count=23, size=10, seed=0).rows(0, few)
    assert {0, 1, 2} < set(rows) and len(set(rows)) == 10
    assert len(set(SolveRateOrder(count=23, size=10, seed=0).rows(0, table_of([NEVER] * 23)))) == 10
    assert len(set(SolveRateOrder(count=23, size=20, seed=0).rows(0, table_of([[0, 0]] * 23)))) == 20
    assert sorted(SolveRateOrder(count=23, size=99, seed=0).rows(0, few)) == list(range(23))


def test_each_kind_is_drawn_uniformly():
    order, batches = SolveRateOrder(count=40, size=20, seed=0), 1000
    counts = [0] * 40
    for batch in range(batches):
        for row in order.rows(batch, MIXED):
            counts[row] += 1
    for kind, share, critical in ((set(range(40)) - OUTSIDE, 18 / 30, 58.3), (OUTSIDE, 2 / 10, 27.9)):  # p = .001
        expected, n = batches * share, len(kind)
        spread = sum((counts[row] - expected) ** 2 for row in kind) / (expected * (1 - share))
        assert spread * (n - 1) / n < critical


def test_rows_are_a_pure_function_of_seed_batch_and_table():
    order = SolveRateOrder(count=40, size=20, seed=7)
    first = [order.rows(batch, MIXED) for batch in range(5)]
    assert [SolveRateOrder(count=40, size=20, seed=7).rows(batch, MIXED) for batch in (4, 3, 2, 1, 0)] == first[::-1]
    assert len({tuple(rows) for rows in first}) == 5
    assert SolveRateOrder(count=40, size=20, seed=8).rows(0, MIXED) != first[0]

    again = table_of([[0, 0]] * 40)
    assert order.rows(0, again) != first[0]
    again.load(json.loads(json.dumps(MIXED.lines())))
    assert [order.rows(batch, again) for batch in range(5)] == first


def test_every_row_is_a_candidate_and_every_group_is_kept():
    args = ToolExpanderConfig(prompt_sampling="solve-rate", prompts_per_step=5, seed=3)
    order = chosen_prompt_order(args, 12)
    assert order == SolveRateOrder(count=12, size=5, seed=3) and order.max_batches == 1
    assert order.candidates([7]) == list(range(12)) and order.keeps(None)
