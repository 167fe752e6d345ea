import asyncio
import copy
import itertools
import math
import subprocess
import sys
import threading
import time
from collections import Counter, UserDict, deque
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import RewardFunctions, Row

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALLS = [{"name": "f", "arguments": {"a": 1}}]
EXACT = Row("exact", "p", TOOLS, CALLS, {"level": 1})
LOOSE = Row(
    "loose",
    [{"role": "user", "content": "p"}],
    TOOLS,
    CALLS,
    {"possible_answers": [{"f": {"a": [1]}}], "category": "simple_python"},
)


@dataclass
class Written:
    text: str = "x"
    ids: tuple = (1,)
    messages: list = field(default_factory=list)


def rewards_of(func, rows, **options):
    """Rewards of one function for one completion of each row."""
    result = RewardFunctions(func, **options)(rows, [Written() for _ in rows])
    ((_, part),) = result.parts.items()
    return part


def of_levels(*levels):
    return [Row(f"row {level}", "p", TOOLS, CALLS, {"level": level}) for level in levels]


def test_a_reward_function_gets_trl_s_arguments():
    seen = {}

    def func(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [np.float32(0.5), None]

    turns = [
        {"role": "assistant", "content": "y"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "z"},
    ]
    completions = [Written("x", (1, 2), [{"role": "assistant", "content": "x"}]), Written("y\nz", (3,), turns)]
    rewards = RewardFunctions(func)([EXACT, LOOSE], completions)
    assert rewards.total == [0.5, 0.0] and rewards.parts == {"func": [0.5, None]} and rewards.unrewarded == 1
    assert seen == {
        "prompts": ["p", LOOSE.prompt],
        "completions": ["x", turns],
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


def give_later(rewards):
    async def my_reward(prompts, completions, completion_ids, **columns):
        await asyncio.sleep(0)
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
        ([b"1", 1.0], ["b'1'", "'exact'"]),
        ([math.nan, 1.0], ["nan", "'exact'"]),
        ([1.0, math.inf], ["inf", "'loose'"]),
        ([1.0, [1.0]], ["[1.0]", "'loose'"]),
        ([1e300, 1.0], ["1e+300", "'exact'"]),
        ([1.0, -3.5e38], ["-3.5e+38", "'loose'"]),
        ([np.zeros((3, 2)), 1.0], ["array", "'exact'"]),
        (np.array(1.0), ["returned array(1.)"]),
    ],
)
@pytest.mark.parametrize("giver", [give, give_later])
def test_bad_rewards_are_named(giver, rewards, words):
    with pytest.raises(InputError) as error:
        rewards_of(giver(rewards), [EXACT, LOOSE])
    message = str(error.value)
    assert "'my_reward'" in message and "\n" not in message
    assert [word for word in words if word not in message] == []


def test_rewards_are_so_large_at_most_that_advantages_are_exact():
    """The squares of larger ones are infinite in float32, which made all advantages 0."""
    assert rewards_of(give([1e15, -1e15]), [EXACT, LOOSE]) == [1e15, -1e15]
    with pytest.raises(
        InputError, match="weighted rewards of row 'exact' add up to 2e.15, and advantages need sums of"
    ):
        rewards_of(give([1e15, 1.0]), [EXACT, LOOSE], weights=[2.0])
    for large in (1e20, -1e20, Decimal("1e16"), torch.tensor(-1e20)):
        with pytest.raises(
            InputError, match="'my_reward' gave .* for row 'loose': a reward must be a number of at most"
        ):
            rewards_of(give([0.0, large]), [EXACT, LOOSE])


class LikeADict:
    def keys(self):
        return ["1", "0"]

    def __iter__(self):
        return iter([1.0, 0.0])


@pytest.mark.parametrize("giver", [give, give_later])
@pytest.mark.parametrize(
    "rewards",
    [
        {"exact": 1.0, "loose": 0.0},
        {1.0: "exact", 0.0: "loose"},
        Counter({1: 2, 0: 3}),
        UserDict({1: 2, 0: 3}),
        {1: 2, 0: 3}.keys(),
        LikeADict(),
        {0.0, 1.0},
        frozenset({0.0, 1.0}),
        "10",
        b"10",
        bytearray(b"10"),
        pandas.DataFrame({0: [1.0, 0.0], 1: [1.0, 0.0]}),
    ],
    ids=lambda rewards: type(rewards).__name__,
)
def test_what_has_no_order_of_its_own_is_no_list_of_rewards(giver, rewards):
    """Iterating them gives keys, characters or numbers in any order."""
    with pytest.raises(
        InputError, match="'my_reward' returned .*: it must return a list with one reward per completion"
    ):
        rewards_of(giver(rewards), [EXACT, LOOSE])


@pytest.mark.parametrize(
    "rewards",
    [
        (1.0, 0.0),
        np.array([1.0, 0.0], dtype=np.float16),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        pandas.Series({"b": 1.0, "a": 0.0}),
        deque([True, Fraction(0)]),
        {"b": Decimal(1), "a": np.int64(0)}.values(),
        range(1, -1, -1),
    ],
    ids=lambda rewards: type(rewards).__name__,
)
@pytest.mark.filterwarnings("ignore:Converting a tensor")
def test_rewards_may_be_any_sequence_of_numbers(rewards):
    assert rewards_of(give(rewards), [EXACT, LOOSE]) == [1.0, 0.0]


def test_an_endless_generator_ends():
    with pytest.raises(InputError, match="returned 3 rewards for 2 completions"):
        rewards_of(give(itertools.repeat(1.0)), [EXACT, LOOSE])


def lazy(prompts, completions, completion_ids, level, **columns):
    for value in level:
        if value == 0:
            raise TypeError("no zero\nsecond line")
        yield 1.0


def picky(prompts, completions, completion_ids, level, **columns):
    return [1 / value for value in level]


async def picky_later(prompts, completions, completion_ids, level, **columns):
    await asyncio.sleep(0)
    return [1 / value for value in level]


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("func", "words"),
    [
        (lazy, "'lazy' raised TypeError: no zero for"),
        (picky, "'picky' raised ZeroDivisionError: division by zero for"),
        (picky_later, "'picky_later' raised ZeroDivisionError: division by zero for"),
    ],
)
def test_a_raising_function_is_named_with_its_call(func, words, timeout):
    with pytest.raises(InputError) as error:
        rewards_of(func, of_levels(1, 0, 2), timeout=timeout)
    assert f"{words} 3 completions, the first of row 'row 1': fix" in str(error.value)
    assert isinstance(error.value.__cause__, TypeError | ZeroDivisionError)
    assert rewards_of(func, of_levels(1, 1), timeout=timeout) == [1.0, 1.0]
    with pytest.raises(InputError) as error:
        rewards_of(func, of_levels(0), timeout=timeout)
    assert f"{words} row 'row 0': fix" in str(error.value)


@pytest.mark.parametrize("timeout", [None, 0.05])
def test_a_function_that_fails_is_not_called_again(timeout):
    calls = []

    def fails(prompts, **columns):
        calls.append(len(prompts))
        if timeout is not None:
            time.sleep(0.3)
        raise ValueError

    with pytest.raises(InputError, match="3 completions, the first of row 'row 1'"):
        rewards_of(fails, of_levels(1, 2, 3), timeout=timeout)
    assert calls == [3]


def test_a_call_without_completions_fails_in_the_same_words():
    with pytest.raises(InputError, match="raised TypeError: .* for 0 completions: fix"):
        RewardFunctions(sometimes)([], [])


def test_a_message_of_no_words_and_one_of_many_lines():
    for message, shown in (("", "raised KeyError for 2"), ("one\ntwo", "raised ValueError: one for 2")):

        def failing(message=message, **columns):
            raise ValueError(message) if message else KeyError

        with pytest.raises(InputError) as error:
            rewards_of(failing, [EXACT, LOOSE])
        assert shown in str(error.value)


def test_a_function_can_change_neither_the_dataset_nor_its_other_completions():
    def vandal(prompts, completions, completion_ids, answer, tools, possible_answers, extra, **columns):
        seen = []
        for n in range(len(prompts)):
            seen.append(len(answer[n]) + len(tools[n]) + len(possible_answers[n]) + len(extra[n][0]))
            answer[n][0]["arguments"].clear()
            prompts[n][0]["content"] = ""
            completions[n].clear()
            tools[n][0]["function"].clear()
            for column in (answer[n], tools[n], possible_answers[n], extra[n][0]):
                column.clear()
        return seen

    row = Row(
        "r",
        [{"role": "user", "content": "p"}],
        copy.deepcopy(TOOLS),
        copy.deepcopy(CALLS),
        {"possible_answers": [{"f": {"a": [1]}}], "category": "multiple", "extra": ({"k": 1},)},
    )
    before = copy.deepcopy(row)
    written = Written(messages=[{"role": "assistant", "content": "x"}])
    for _ in range(2):
        assert RewardFunctions([vandal, vandal])([row, row], [written, written]).total == [8.0, 8.0]
    assert row == before and len(written.messages) == 1


def right(prompts, completions, completion_ids, level, **columns):
    return [float(value) for value in level]


def sometimes(prompts, completions, completion_ids, level, **columns):
    return [None if value > 1 else 10.0 for value in level]


def test_weights_add_the_parts_up_and_none_adds_nothing():
    rows, written = of_levels(0, 1, 2), [Written() for _ in range(3)]
    plain = RewardFunctions([right, sometimes])(rows, written)
    assert plain.total == [10.0, 11.0, 2.0] and plain.unrewarded == 0
    weighted = RewardFunctions([sometimes, right], weights=[-0.5, 3])(rows, written)
    assert weighted.total == [-5.0, -2.0, 6.0]
    assert weighted.parts == {"sometimes": [10.0, 10.0, None], "right": [0.0, 1.0, 2.0]}
    assert list(weighted.parts) == ["sometimes", "right"]
    alone = RewardFunctions(sometimes, weights=[0.0])(rows, written)
    assert alone.total == [0.0, 0.0, 0.0] and alone.unrewarded == 1
    assert RewardFunctions(right)(rows, written).unrewarded == 0  # a reward of 0 counts as a reward


def test_functions_of_one_name_keep_parts_of_their_own():
    functions = RewardFunctions([give([1.0]), give([2.0]), sometimes, give([3.0])])
    assert functions.names == ["my_reward", "my_reward_2", "sometimes", "my_reward_3"]
    rewards = functions(of_levels(1), [Written()])
    assert rewards.parts == {"my_reward": [1.0], "my_reward_2": [2.0], "sometimes": [10.0], "my_reward_3": [3.0]}


class AsyncObject:
    async def __call__(self, prompts, **columns):
        return [4.0] * len(prompts)


def of_awaitable(prompts, **columns):
    return AsyncObject()(prompts)


def test_async_functions_and_what_returns_awaitables():
    functions = RewardFunctions([give_later([1.0]), of_awaitable, right, AsyncObject()], timeout=20.0)
    rewards = functions(of_levels(2), [Written()])
    assert rewards.total == [11.0]
    assert rewards.parts == {"my_reward": [1.0], "of_awaitable": [4.0], "right": [2.0], "AsyncObject": [4.0]}


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_async_functions_run_at_the_same_time_on_one_loop_that_stays(timeout):
    loops, here = [], []

    def partner():
        async def reward(prompts, **columns):
            loops.append(asyncio.get_running_loop())
            here.append(1)
            deadline = time.monotonic() + 10
            while len(here) % 2:  # until the other one has started too
                assert time.monotonic() < deadline, "the other one has not begun"
                await asyncio.sleep(0.001)
            return [1.0] * len(prompts)

        return reward

    functions = RewardFunctions([partner(), partner()], timeout=timeout)
    for _ in range(2):
        assert functions([EXACT], [Written()]).total == [2.0]
    assert len(loops) == 4 and len(set(map(id, loops))) == 1


def test_within_a_running_loop():
    async def notebook():
        return rewards_of(give_later([1.0, 2.0]), [EXACT, LOOSE])

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_the_loop_ends_with_its_owner():
    before = threading.enumerate()
    functions = RewardFunctions(give_later([1.0]))
    functions([EXACT], [Written()])
    (thread,) = set(threading.enumerate()) - set(before)
    assert thread.daemon
    del functions
    thread.join(5)
    assert not thread.is_alive()


released = threading.Event()


def hangs(prompts, completions, completion_ids, level, **columns):
    if 0 in level:
        released.wait(60)
    return [1.0] * len(prompts)


async def hangs_later(prompts, completions, completion_ids, level, **columns):
    if 0 in level:
        await asyncio.sleep(60)
    return [1.0] * len(prompts)


@pytest.mark.parametrize("func", [hangs, hangs_later])
def test_a_function_that_does_not_return_is_named_with_its_call(func):
    with pytest.raises(InputError) as error:
        rewards_of([func, right], of_levels(1, 2, 0, 3), timeout=0.4)
    released.set()
    words = (
        f"'{func.__name__}' did not return within 0.4 s for 4 completions, the first of row 'row 1': fix it or allow"
    )
    assert words in str(error.value)
    assert rewards_of(func, of_levels(1, 2), timeout=20.0) == [1.0, 1.0]


def test_a_timeout_of_the_function_s_own_is_an_exception():
    async def impatient(prompts, **columns):
        await asyncio.wait_for(asyncio.sleep(10), 0.01)

    async def given_up(prompts, **columns):
        raise asyncio.CancelledError

    with pytest.raises(InputError, match="'impatient' raised TimeoutError for row 'exact': fix"):
        rewards_of(impatient, [EXACT], timeout=20.0)
    with pytest.raises(InputError, match="'given_up' raised CancelledError for row 'exact': fix"):
        rewards_of(given_up, [EXACT])


def test_a_stuck_function_does_not_keep_the_process():
    code = """
import time
from toolx_kernels.toolcall import RewardFunctions, Row
class Written:
    text, ids, messages = "x", [1], []
def stuck(prompts, **columns):
    time.sleep(1000)
async def stuck_later(prompts, **columns):
    time.sleep(1000)
for func in (stuck, stuck_later):
    try:
        RewardFunctions(func, timeout=0.05)([Row("r", "p", [], [])], [Written()])
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    first, second = done.stdout.splitlines()
    assert "'stuck' did not return within 0.05 s for row 'r'" in first
    assert "'stuck_later' did not return within 0.05 s for row 'r'" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "reward_funcs is empty"),
        ((3,), "the reward function 3 cannot be called"),
        (([right, "right"],), "the reward function 'right' cannot be called"),
        (([right, sometimes], [1.0]), "1 entries for 2 reward functions"),
        (([right], [1.0, 2.0]), "2 entries for 1 reward functions"),
        (([right], [math.nan]), "weight nan of reward function 'right'"),
        (([right], [math.inf]), "weight inf of"),
        (([right], [1e39]), r"weight 1e\+39 of"),
        (([right], ["1"]), "weight '1' of"),
        (([right], [True]), "weight True of"),
        (([right], None, 0), "reward timeout 0 must be a positive number of seconds"),
        (([right], None, -1.0), "reward timeout -1.0"),
        (([right], None, math.nan), "reward timeout nan"),
        (([right], None, math.inf), "reward timeout inf"),
        (([right], None, "5"), "reward timeout '5'"),
        (([right], None, True), "reward timeout True"),
    ],
)
def test_bad_configurations_are_refused_at_once(arguments, message):
    with pytest.raises(InputError, match=message):
        RewardFunctions(*arguments)


def test_a_function_that_exits_is_named():
    def leaves(prompts, level, **columns):
        if 2 in level:
            sys.exit(3)
        return [0.0] * len(prompts)

    with pytest.raises(InputError, match="'leaves' raised SystemExit: 3 for 2 completions, the first of row 'exact'"):
        rewards_of(leaves, [EXACT, Row("two", "p", TOOLS, CALLS, {"level": 2})])


def test_an_async_function_that_exits_is_named_and_the_next_call_runs():
    async def leaves(level, **columns):
        if level == [2]:
            sys.exit(3)
        return [1.0]

    rewards = RewardFunctions(leaves)
    written = [Written([1], "", [])]
    with pytest.raises(InputError, match="'leaves' raised SystemExit: 3"):
        rewards([Row("two", "p", TOOLS, CALLS, {"level": 2})], written)
    assert rewards([Row("one", "p", TOOLS, CALLS, {"level": 1})], written).total == [1.0]


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")

    __repr__ = __str__


class Nameless:
    @property
    def __name__(self):
        raise RuntimeError("no name")

    __repr__ = Unspeakable.__str__

    def __init__(self, result):
        self.result = result

    def __call__(self, prompts, **columns):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def __deepcopy__(self, memo):
        raise TypeError("one only")


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (Unspeakable(), "'Nameless' raised Unspeakable for"),
        (ValueError("long " * 200_000), "'Nameless' raised ValueError: long long"),
        ([Nameless(0)], "gave an object of Nameless for row"),
        (Nameless(0), "returned an object of Nameless: it must"),
    ],
    ids=["raises", "says much", "in a list", "no list"],
)
def test_objects_that_raise_or_say_too_much_are_told_in_a_short_sentence(result, said):
    with pytest.raises(InputError) as error:
        rewards_of(Nameless(result), [EXACT])
    assert said in str(error.value) and len(str(error.value)) < 500


def test_a_column_that_cannot_be_copied_is_named():
    row = Row("one", "p", TOOLS, CALLS, {"level": 1, "handle": Nameless(0)})
    with pytest.raises(
        InputError, match=r"the column 'handle' cannot be copied .* \(TypeError: one only\): give it pl"
    ):
        rewards_of(sometimes, [row])
