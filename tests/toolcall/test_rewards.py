import pickle

import pytest

from toolx_kernels.toolcall import (
    FORMATS,
    CallReward,
    RewardFunctions,
    Row,
    SelfExemplifyingReward,
    SimilarityReward,
    check_row,
    is_answer_correct,
    is_correct,
    no_think_reward,
    render_completion,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}, "required": ["a"]}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]
CALLS = [{"name": "f", "arguments": {"a": 1, "s": "New York"}}]
EXACT = Row("exact", "p", TOOLS, CALLS, {"level": 1})
LOOSE = Row(
    "loose",
    [{"role": "user", "content": "p"}],
    TOOLS,
    CALLS,
    {"possible_answers": [{"f": {"a": [1], "s": ["New York", ""]}}], "category": "simple_python"},
)
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
    columns = {name: [row.columns.get(name) for row in rows] for name in ("possible_answers", "category")}
    answers, tools = [row.answer for row in rows], [row.tools for row in rows]
    prompts = [row.prompt for row in rows]
    rewards = no_think_reward(prompts, texts, [[1]] * len(rows), answer=answers, tools=tools, **columns)
    assert rewards == list(expected)


def test_no_think_reward_without_optional_columns():
    rewards = no_think_reward(["p"] * 2, [RIGHT, PROSE], [[1], [2]], answer=[CALLS] * 2, tools=[TOOLS] * 2)
    assert rewards == [1.0, 0.0]


def test_of_messages_only_the_assistant_s_are_judged():
    turns = [
        {"role": "assistant", "content": RIGHT},
        {"role": "tool", "content": "<tool_call>{}</tool_call> sunny"},
        {"role": "assistant", "content": render_completion([{"name": "f", "arguments": {"a": 2}}])},
    ]
    answer = [*CALLS, {"name": "f", "arguments": {"a": 2}}]
    judged = no_think_reward(["p"] * 2, [turns, turns[:1]], [[1]] * 2, answer=[answer, CALLS], tools=[TOOLS] * 2)
    assert judged == [1.0, 1.0]
    assert no_think_reward(["p"], [turns], [[1]], answer=[CALLS], tools=[TOOLS]) == [0.0]


def test_turns_are_well_formed_each_by_itself_and_count_together():
    opened, closed = RIGHT.rsplit("\n", 1)
    assert is_correct(opened + "\n" + closed, EXACT), "one turn"
    assert not is_correct([opened, closed], EXACT)
    wrong = RIGHT.replace("1", "2")
    assert is_correct(["", RIGHT], EXACT) and not is_correct([wrong, RIGHT], EXACT)

    def reward_of(*turns):
        messages = [message for text in turns for message in (
            {"role": "assistant", "content": text}, {"role": "tool", "name": "f", "content": "3"}
        )]  # fmt: skip
        (reward,) = no_think_reward(["p"], [messages], [[1]], answer=[EXACT.answer], tools=[EXACT.tools])
        return reward

    assert reward_of(RIGHT) == reward_of(RIGHT, "") == 1.0
    assert reward_of(opened, closed) == reward_of(wrong, RIGHT) == 0.0


THINK = f"<think>Maybe {RIGHT}? <tool_call></think>\n"


def test_thoughts_are_left_out_of_what_is_right():
    assert is_correct(THINK + RIGHT, EXACT) and is_correct(f"{THINK}So: {FOLDED}", LOOSE)
    assert not is_correct(THINK, EXACT) and not is_correct(f"<think>{RIGHT}", EXACT)
    assert is_correct(THINK + PROSE, NO_CALL) and is_correct(THINK, NO_CALL)
    assert not is_correct("<think>No tool fits.", NO_CALL) and not is_correct(THINK + RIGHT, NO_CALL)
    assert is_correct([f"<think>{RIGHT}</think>", THINK + RIGHT], EXACT)
    assert not is_correct([RIGHT, "<think>"], EXACT)


def rewarded(reward, text, row):
    """Reward of a completion of one or several turns, with a tool result after each."""
    turns = [{"role": "assistant", "content": turn} for turn in ([text] if isinstance(text, str) else text)]
    messages = [message for turn in turns for message in (turn, {"role": "tool", "content": "<think>"})]
    columns = {name: [row.columns.get(name)] for name in ("possible_answers", "category")}
    (earned,) = reward([row.prompt], [messages], [[1]], answer=[row.answer], tools=[row.tools], **columns)
    return earned


def test_thoughts_earn_what_the_rest_earns_or_nothing():
    cases = [  # text, row, rewards with thoughts allowed and forbidden
        (THINK + RIGHT, EXACT, 1.0, 0.0),
        (THINK + FOLDED, LOOSE, 1.0, 0.0),
        (THINK + PROSE, NO_CALL, 1.0, 0.0),
        (THINK, NO_CALL, 1.0, 0.0),
        ([THINK + RIGHT, "<think>Done.</think>"], EXACT, 1.0, 0.0),
        ([RIGHT, "<think>Done.</think>"], EXACT, 1.0, 0.0),
        (RIGHT, EXACT, 1.0, 1.0),
        (PROSE, NO_CALL, 1.0, 1.0),
        (f"{THINK}So: {RIGHT}", EXACT, 0.0, 0.0),
        (f"So: {THINK}{RIGHT}", EXACT, 0.0, 0.0),
        (f"{THINK}{THINK}{RIGHT}", EXACT, 0.0, 0.0),
        (THINK, EXACT, 0.0, 0.0),
        (THINK + RIGHT, NO_CALL, 0.0, 0.0),
        (f"<think>{RIGHT}", EXACT, 0.0, 0.0),
        ("<think>No tool fits.", NO_CALL, 0.0, 0.0),
        ([RIGHT, "<think>Done."], EXACT, 0.0, 0.0),
    ]
    for text, row, allowed, forbidden in cases:
        assert rewarded(CallReward(allow_thoughts=True), text, row) == allowed, text
        assert rewarded(CallReward(), text, row) == rewarded(no_think_reward, text, row) == forbidden, text


@pytest.mark.parametrize("name", FORMATS)
def test_each_form_is_judged_as_itself(name):
    form = FORMATS[name]
    right = render_completion(CALLS, form)
    reward, thinking = CallReward(form), CallReward(form, allow_thoughts=True)
    assert is_correct(right, EXACT, form) and is_correct(f"Sure! {right}", EXACT, form)
    assert rewarded(reward, right, EXACT) == rewarded(thinking, f"[THINK]{right}[/THINK]{right}", EXACT) == 1.0
    for wrong in (f"Sure! {right}", right.replace("1", "2"), right[:-1], PROSE, ""):
        assert rewarded(reward, wrong, EXACT) == rewarded(thinking, f"<think></think>{wrong}", EXACT) == 0.0
    for no_answer in (right, right[:-1]):
        assert not is_correct(no_answer, NO_CALL, form) and rewarded(reward, no_answer, NO_CALL) == 0.0
    assert rewarded(reward, PROSE, NO_CALL) == 1.0
    other = FORMATS["pythonic" if name in ("hermes", "json") else "hermes"]
    assert rewarded(reward, render_completion(CALLS, other), EXACT) == 0.0


def test_rewards_of_calls_travel_and_have_names():
    for allowed, name in ((False, "no_think_reward"), (True, "call_reward")):
        reward = pickle.loads(pickle.dumps(CallReward(FORMATS["llama3"], allow_thoughts=allowed)))
        assert RewardFunctions(reward).names == [name]
        assert rewarded(reward, render_completion(CALLS, FORMATS["llama3"]), EXACT) == 1.0
    assert pickle.loads(pickle.dumps(no_think_reward)) is no_think_reward
    assert RewardFunctions(no_think_reward).names == ["no_think_reward"]


def test_a_number_may_be_written_1_or_1_0_where_the_schema_has_one():
    """Arrow turns 1 into 1.0 in a column that also has 1.5."""
    tools = [{"name": "pay", "parameters": {"properties": {"sum": {"type": "number"}, "note": {}}}}]
    row = check_row({"prompt": "p", "tools": tools, "answer": [{"name": "pay", "arguments": {"sum": 1.0}}]}, "d", 0)
    for value, right in (("1", True), ("1.0", True), ("1.5", False), ("true", False), ('"1"', False)):
        text = f'<tool_call>{{"name": "pay", "arguments": {{"sum": {value}}}}}</tool_call>'
        assert is_correct(text, row) == is_answer_correct(f"<think>So.</think>{text}", row) == right
        for reward in (CallReward(), SimilarityReward(), SelfExemplifyingReward(distinct=False)):
            (earned,) = reward(["p"], [text], [[1]], answer=[row.answer], tools=[row.tools])
            assert (earned == 1) == right
    text = '<tool_call>{"name": "pay", "arguments": {"sum": 1, "note": "x"}}</tool_call>'
    assert SimilarityReward()(["p"], [text], [[1]], answer=[row.answer], tools=[row.tools]) == [0.5]
