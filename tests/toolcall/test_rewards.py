import copy
import math

import numpy as np
import pytest

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, call_reward, is_correct, no_think_reward, render_completion

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALLS = [{"name": "f", "arguments": {"a": 1, "s": "New York"}}]
EXACT = Row("exact", "p", TOOLS, CALLS, {"level": 1})
LOOSE = Row(
    "loose", [{"role": "user", "content": "p"}], TOOLS, CALLS,
    {"possible_answers": [{"f": {"a": [1], "s": ["New York", ""]}}], "category": "simple_python"},
)  # fmt: skip
NO_CALL = Row("none", "p", TOOLS, [], {"possible_answers": [], "category": "irrelevance"})
RIGHT = render_completion(CALLS)
FOLDED = RIGHT.replace("New York", "new-york")
PROSE = "I cannot do that."


def test_is_correct_judges_the_result_alone():
    assert is_correct(RIGHT, EXACT) and is_correct(f"Sure! {RIGHT}", EXACT)
    assert (
        not is_correct(FOLDED, EXACT) and not is_correct(PROSE, EXACT) and not is_correct(RIGHT + "<tool_call>", EXACT)
    )
    assert is_correct(FOLDED, LOOSE) and is_correct(
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', LOOSE
    )
    assert not is_correct(RIGHT.replace("1", "2"), LOOSE)
    assert is_correct(PROSE, NO_CALL) and not is_correct(RIGHT, NO_CALL) and not is_correct("<tool_call>", NO_CALL)


def test_no_think_reward_over_mixed_rows():
    cases = [
        (RIGHT, EXACT, 1.0),
        (f"\n{RIGHT}\n", EXACT, 1.0),
        (f"Sure! {RIGHT}", EXACT, 0.0),
        (FOLDED, EXACT, 0.0),
        (RIGHT + RIGHT, EXACT, 0.0),
        ("", EXACT, 0.0),
        (PROSE, EXACT, 0.0),
        (FOLDED, LOOSE, 1.0),
        (f"{FOLDED} done", LOOSE, 0.0),
        (PROSE, NO_CALL, 1.0),
        ("", NO_CALL, 1.0),
        (RIGHT, NO_CALL, 0.0),
        ("<tool_call>{}</tool_call>", NO_CALL, 0.0),
    ]
    texts, rows, expected = zip(*cases, strict=True)
    assert call_reward(no_think_reward, rows, texts, [[1]] * len(rows)) == list(expected)


def test_no_think_reward_without_optional_columns():
    rewards = no_think_reward(["p"] * 2, [RIGHT, PROSE], [[1], [2]], answer=[CALLS] * 2, tools=[TOOLS] * 2)
    assert rewards == [1.0, 0.0]


def test_a_reward_function_gets_trl_s_arguments():
    seen = {}

    def func(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [np.float32(0.5), None]

    assert call_reward(func, [EXACT, LOOSE], ["x", "y"], [(1, 2), (3,)]) == [0.5, None]
    assert seen == {
        "prompts": ["p", LOOSE.prompt],
        "completions": ["x", [{"role": "assistant", "content": "y"}]],
        "completion_ids": [[1, 2], [3]],
        "id": ["exact", "loose"],
        "tools": [TOOLS, TOOLS],
        "answer": [CALLS, CALLS],
        "level": [1, None],
        "possible_answers": [None, LOOSE.columns["possible_answers"]],
        "category": [None, "simple_python"],
    }


def give(rewards):
    def my_reward(prompts, completions, completion_ids, **columns):
        return rewards

    return my_reward


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        ([1.0], ["1 rewards for 2 completions"]),
        ([1.0] * 3, ["3 rewards for 2 completions"]),
        (None, ["returned None"]),
        (1.0, ["returned 1.0"]),
        ([1.0, "good"], ["'good'", "'loose'"]),
        ([math.nan, 1.0], ["nan", "'exact'"]),
        ([1.0, math.inf], ["inf", "'loose'"]),
        ([1.0, [1.0]], ["[1.0]", "'loose'"]),
        ([1e300, 1.0], ["1e+300", "'exact'"]),
        ([1.0, -3.5e38], ["-3.5e+38", "'loose'"]),
        ([np.zeros((3, 2)), 1.0], ["array", "'exact'"]),
        (np.array(1.0), ["returned array(1.)"]),
    ],
)
def test_bad_rewards_are_named(rewards, words):
    with pytest.raises(InputError) as error:
        call_reward(give(rewards), [EXACT, LOOSE], ["x", "y"], [[1], [2]])
    message = str(error.value)
    assert "'my_reward'" in message and "\n" not in message
    assert [word for word in words if word not in message] == []


def test_the_largest_rewards_are_those_of_float32():
    largest = float(np.finfo(np.float32).max)
    assert call_reward(give([largest, -largest]), [EXACT, LOOSE], ["x", "y"], [[1], [2]]) == [largest, -largest]


def test_a_raising_generator_is_named_with_its_row():
    def lazy(prompts, completions, completion_ids, level, **columns):
        for value in level:
            if value == 0:
                raise TypeError("no zero\nsecond line")
            yield 1.0

    rows = [Row(f"row {level}", "p", TOOLS, CALLS, {"level": level}) for level in (1, 0, 2)]
    with pytest.raises(InputError) as error:
        call_reward(lazy, rows, ["x"] * 3, [[1]] * 3)
    assert "'lazy' raised TypeError: no zero on row 'row 0'; mend" in str(error.value)
    assert call_reward(lazy, rows[::2], ["x"] * 2, [[1]] * 2) == [1.0, 1.0]


def test_a_message_of_no_words_and_one_of_many_lines():
    for message, shown in (("", "raised KeyError; mend"), ("one\ntwo", "raised ValueError: one; mend")):

        def failing(message=message, **columns):
            raise ValueError(message) if message else KeyError

        with pytest.raises(InputError) as error:
            call_reward(failing, [EXACT, LOOSE], ["x"] * 2, [[1]] * 2)
        assert shown in str(error.value)


def test_a_function_can_change_neither_the_dataset_nor_its_other_completions():
    def vandal(prompts, completions, completion_ids, answer, tools, possible_answers, extra, **columns):
        seen = []
        for n in range(len(prompts)):
            seen.append(len(answer[n]) + len(tools[n]) + len(possible_answers[n]) + len(extra[n][0]))
            answer[n][0]["arguments"].clear()
            prompts[n][0]["content"] = ""
            tools[n][0]["function"].clear()
            for column in (answer[n], tools[n], possible_answers[n], extra[n][0]):
                column.clear()
        return seen

    row = Row("r", [{"role": "user", "content": "p"}], copy.deepcopy(TOOLS), copy.deepcopy(CALLS),
              {"possible_answers": [{"f": {"a": [1]}}], "category": "multiple", "extra": ({"k": 1},)})  # fmt: skip
    before = copy.deepcopy(row)
    assert call_reward(vandal, [row, row], ["x", "y"], [[1], [2]]) == [4.0, 4.0]
    assert row == before


def test_a_raising_function_is_named_with_its_row():
    def picky(prompts, completions, completion_ids, level, **columns):
        return [1 / value for value in level]

    rows = [Row(f"row {level}", "p", TOOLS, CALLS, {"level": level}) for level in (1, 0, 2)]
    with pytest.raises(InputError, match="'picky' raised ZeroDivisionError: division by zero on row 'row 0'") as error:
        call_reward(picky, rows, ["x"] * 3, [[1]] * 3)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(InputError, match="'picky' raised TypeError") as error:
        call_reward(picky, [EXACT, LOOSE, NO_CALL][1:], ["x"] * 2, [[1]] * 2)
    assert "on row" not in str(error.value)
