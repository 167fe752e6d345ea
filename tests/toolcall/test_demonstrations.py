import os
import random
from collections import Counter

import pytest

from toolx_kernels.models.tiny import tiny_tokenizer
from toolx_kernels.toolcall import (
    CATEGORIES,
    Chat,
    DemonstrationIndex,
    Row,
    bfcl_match,
    parse_calls,
    read_bfcl,
    read_dataset,
    render_completion,
)
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.match import call_key
from toolx_kernels.toolcall.rows import check_rows

VALUE_TOOL = {"type": "object", "properties": {"value": {"type": "string"}}}


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


@pytest.mark.parametrize("words", ["Book a  Hotel\n", "BOOK A HOTEL", "\tbook\u00a0a hotel", "\uff22ook a hotel"])
def test_the_own_words_in_another_spelling_never_appear(words):
    index = DemonstrationIndex([row("other", words, "a", ("a", 2))])
    self = row("self", "Book a hotel", "a", ("a", 1))
    assert index.choose(self, random.Random(0)) == [] and not index.possible(self)
    assert index.possible(row("self", "Book a hostel", "a", ("a", 1)))


def test_no_call_that_possible_answers_accept_appears():
    tools = [{"type": "function", "function": {"name": "a", "parameters": VALUE_TOOL}}]
    columns = {
        "category": "parallel",
        "possible_answers": [{"a": {"value": ["x"]}}, {"a": {"value": ["York, NY", ""]}}],
    }
    answer = [{"name": "a", "arguments": {"value": value}} for value in ("x", "York, NY")]
    index = DemonstrationIndex(
        [
            row("accepted in another spelling", "v", "a", ("a", "york ny")),
            row("accepted beside another", "w", "a", ("a", "z"), ("a", "X")),
            row("good", "x", "a", ("a", "Leeds")),
        ]
    )
    hard = Row("self", "u", tools, answer, columns)
    for seed in range(20):
        assert [shown.id for shown in index.choose(hard, random.Random(seed), per_tool=3)] == ["good"]
    plain = Row("self", "u", tools, answer)
    assert len(index.choose(plain, random.Random(0), per_tool=3)) == 3


def test_possible_says_what_choose_finds():
    rng = random.Random(0)
    for _ in range(300):
        rows = [
            row(
                str(n), f"text {rng.randrange(3)}", "abc", *((rng.choice("abc"), rng.randrange(2)) for _ in range(size))
            )
            for n, size in enumerate(rng.choices(range(4), k=rng.randrange(1, 6)))
        ]
        index = DemonstrationIndex(rows)
        for _ in range(2):  # what earlier calls left behind changes no answer
            for each in rows:
                assert index.possible(each) == (index.choose(each, random.Random(0)) != [])
                shown = {other.id for other in index.choose(each, rng, per_tool=9, limit=99)}
                assert shown == {other.id for other in rows if may_show(other, each)}


def may_show(other, row):
    calls = [call for call in other.answer if call in row.answer]
    return bool(other.answer) and not calls and other.user_text != row.user_text


class CountingRandom(random.Random):
    """Counts the draws from it."""

    drawn = 0

    def getrandbits(self, bits):
        self.drawn += 1
        return super().getrandbits(bits)


def test_a_choice_among_ten_thousand_rows_draws_a_handful():
    rows = [row(str(n), f"text {n}", "ab", ("a", n)) for n in range(10_000)]
    index, rng = DemonstrationIndex(rows), CountingRandom(0)
    for each in rows[:100]:
        assert len(index.choose(each, rng, per_tool=3)) == 3
    assert rng.drawn < 100 * 12

    alike = [row(str(n), f"text {n}", "ab", ("a", 0)) for n in range(10_000)]
    index, rng = DemonstrationIndex(alike), CountingRandom(0)
    assert all(index.choose(each, rng) == [] for each in alike[:100])
    assert rng.drawn < 100 * 12


def test_every_row_is_drawn_equally_often():
    rows = [row(str(n), f"text {n}", "a", ("a", n)) for n in range(6)]
    index = DemonstrationIndex(rows)
    pairs = Counter(
        tuple(shown.id for shown in index.choose(rows[0], random.Random(seed), per_tool=2)) for seed in range(8_000)
    )
    assert len(pairs) == 20 and "0" not in {name for pair in pairs for name in pair}
    assert all(abs(count - 400) < 5 * 400**0.5 for count in pairs.values())


def datasets():
    yield "builtin", lambda: builtin.train_rows(640, seed=0)
    for category in CATEGORIES:
        if "irrelevance" not in category:
            yield f"bfcl:{category}", lambda category=category: bfcl(category)
    yield "bfcl: all", lambda: [each for category in CATEGORIES for each in bfcl(category)]
    yield "seal-tools", seal_tools


def bfcl(category):
    pytest.importorskip("bfcl_eval")
    return read_bfcl(category)


def seal_tools():
    path = os.environ.get("TOOLX_SEAL_TOOLS")
    if not path:
        pytest.skip("TOOLX_SEAL_TOOLS does not name a copy of seal-tools-train.jsonl")
    return read_dataset(path)


@pytest.mark.parametrize(("name", "read"), [pytest.param(*dataset, id=dataset[0]) for dataset in datasets()])
def test_no_prompt_of_a_dataset_tells_its_answer(name, read):
    """Checks the prompt that the model reads, not only the demonstrations chosen for it."""
    rows, chat = read(), Chat(tiny_tokenizer())
    index, shown = DemonstrationIndex(rows), 0
    for row in rows:
        demonstrations = index.choose(row, random.Random(row.id), per_tool=2)
        assert bool(demonstrations) == index.possible(row)
        if not demonstrations:
            continue
        text = chat.prompt_text(row, demonstrations)
        assert text.endswith(chat.prompt_text(row).partition("<|user|>")[2])
        head = text.partition("<|user|>")[0]
        examples = head.partition("Example:\n")[2].split("\nExample:\n")
        calls = parse_calls(head)
        assert len(calls) == sum(len(each.answer) for each in demonstrations) > 0
        told = {call_key(call) for call in calls}
        assert told.isdisjoint(map(call_key, row.answer)), row.id
        assert all(render_completion([call]) not in head for call in row.answer), row.id
        for expected in row.columns.get("possible_answers", ()):
            category = row.columns["category"]
            named = [call for call in calls if call["name"] in expected]
            assert not any(bfcl_match([call], row.tools, [expected], category) for call in named), row.id
        words = row.user_text.lower().split()
        assert all(words != example.partition("\n<tool_call>")[0].lower().split() for example in examples), row.id
        shown += 1
    assert shown == sum(map(index.possible, rows))
    assert shown > 0 or name in ("bfcl:simple_java", "bfcl:simple_javascript")


def test_another_spelling_of_a_number_reveals_the_answer_too():
    answers = [{"x": 1, "y": [2.5]}, {"x": 1.0, "y": [2.5]}, {"x": 2, "y": [2.5]}]
    tools = [{"name": "f", "parameters": {}}]
    raws = [
        {"prompt": f"p{n}", "tools": tools, "answer": [{"name": "f", "arguments": a}]} for n, a in enumerate(answers)
    ]
    rows = check_rows(raws, "d")
    index = DemonstrationIndex(rows)
    assert [row.id for row in index.choose(rows[0], random.Random(0), per_tool=3)] == ["d:2"]
    assert not DemonstrationIndex(rows[:2]).possible(rows[0])
