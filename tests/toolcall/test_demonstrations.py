import random

from toolx_kernels.toolcall import DemonstrationIndex, Row


def row(row_id, user, offered, *used):
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in offered]
    return Row(row_id, user, tools, [{"name": name, "arguments": {"value": value}} for name, value in used])


ROWS = [row(f"{name}{n}", f"{name} {n}", name, (name, n)) for name in "abcd" for n in range(5)]
INDEX = DemonstrationIndex(ROWS)


def tools_of(rows):
    return [row.answer[0]["name"] for row in rows]


def test_one_per_offered_tool_and_no_more_than_the_limit():
    hard = row("x", "x", "abz", ("a", 99))
    for seed in range(20):
        assert sorted(tools_of(INDEX.choose(hard, random.Random(seed)))) == ["a", "b"]
        assert sorted(tools_of(INDEX.choose(hard, random.Random(seed), per_tool=2))) in (
            ["a", "a", "b"], ["a", "b", "b"]
        )  # fmt: skip
        assert len(INDEX.choose(row("x", "x", "abcd", ("a", 99)), random.Random(seed))) == 3
        assert INDEX.choose(hard, random.Random(seed), limit=0) == []


def test_the_right_tool_is_not_given_away():
    hard = row("x", "x", "abcd", ("a", 99))
    chosen = [INDEX.choose(hard, random.Random(seed), limit=1) for seed in range(400)]
    share = sum(tools_of(rows) == ["a"] for rows in chosen) / 400
    assert 0.17 < share < 0.33
    assert len({rows[0].id for rows in chosen}) == 20


def test_own_answer_and_own_words_never_appear():
    index = DemonstrationIndex(
        [
            row("self", "u", "a", ("a", 1)),
            row("same answer", "v", "a", ("a", 1)),
            row("same words", "u", "a", ("a", 2)),
            row("good", "w", "a", ("a", 3)),
        ]
    )
    for seed in range(20):
        chosen = index.choose(row("self", "u", "a", ("a", 1)), random.Random(seed), per_tool=3)
        assert [demonstration.id for demonstration in chosen] == ["good"]


def test_same_answer_in_another_order_of_calls_never_appears():
    index = DemonstrationIndex([row("other", "v", "ab", ("b", 2), ("a", 1))])
    assert index.choose(row("self", "u", "ab", ("a", 1), ("b", 2)), random.Random(0)) == []


def test_no_call_of_the_own_answer_appears():
    index = DemonstrationIndex(
        [
            row("more calls", "v", "ab", ("a", 1), ("b", 7)),
            row("fewer calls", "w", "b", ("b", 2)),
            row("same tools", "x", "ab", ("a", 2), ("b", 1)),
        ]
    )
    for seed in range(20):
        chosen = index.choose(row("self", "u", "ab", ("a", 1), ("b", 2)), random.Random(seed), per_tool=3)
        assert [demonstration.id for demonstration in chosen] == ["same tools"]


def test_a_row_that_uses_two_offered_tools_is_shown_once():
    index = DemonstrationIndex([row("both", "v", "ab", ("a", 1), ("b", 2), ("a", 3))])
    assert [r.id for r in index.choose(row("self", "u", "ab", ("a", 9)), random.Random(0))] == ["both"]


def test_a_row_already_chosen_leaves_room_for_another():
    both = row("both", "v", "ab", ("a", 1), ("b", 2))
    index = DemonstrationIndex([both, row("a", "w", "a", ("a", 3)), row("b", "x", "b", ("b", 4))])
    chosen = [index.choose(row("self", "u", "ab", ("a", 9)), random.Random(seed)) for seed in range(20)]
    assert [len({r.id for r in rows}) for rows in chosen] == [2] * 20


def test_none_exist():
    assert INDEX.choose(row("x", "x", "z", ("z", 1)), random.Random(0)) == []
    assert DemonstrationIndex([]).choose(ROWS[0], random.Random(0)) == []


def test_the_same_state_gives_the_same_choice():
    hard = row("x", "x", "abcd", ("a", 99))
    choices = [INDEX.choose(hard, random.Random(seed)) for seed in (1, 1, 2, 3, 4)]
    assert choices[0] == choices[1] and any(choice != choices[0] for choice in choices[2:])
