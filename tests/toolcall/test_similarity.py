"""Similarity reward, for calls that are similar to the right ones."""

import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolx_kernels.toolcall import (
    FORMATS,
    CallReward,
    RewardFunctions,
    SimilarityReward,
    exact_match,
    render_completion,
)

PROPERTIES = {name: {} for name in ("city", "days", "units", "note")}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": PROPERTIES}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "open", "parameters": {"properties": {}, "additionalProperties": True}}},
]


def call(name="weather", /, **arguments):
    return {"name": name, "arguments": arguments}


def earned(text, answer, reward=None, **columns):
    (one,) = (reward or SimilarityReward())(
        ["p"], [text], [[1]], answer=[answer], tools=[TOOLS], **{name: [value] for name, value in columns.items()}
    )
    return one


def similar(calls, answer):
    return earned(render_completion(calls), answer)


RIGHT = call(city="New York", days=3)
NEAR, NEARNESS = call(city="York", days=3), (2 / 3 + 1) / 2


@pytest.mark.parametrize(
    ("calls", "answer", "expected"),
    [
        ([call(city="New York", days=4)], [RIGHT], 1 / 2),
        ([call(city="New York")], [RIGHT], 1 / 2),
        ([call(city="New York", days=3, units="C")], [RIGHT], 2 / 3),
        ([NEAR], [RIGHT], NEARNESS),  # LCS 1 of 1 and 2 words
        ([call(city="the big new york city", days=3)], [RIGHT], (2 * 2 / (5 + 2) + 1) / 2),
        ([call(city="York, new!", days=3)], [RIGHT], (2 * 1 / (2 + 2) + 1) / 2),  # in another order
        ([call(city="Paris", days=4)], [RIGHT], 0.0),
        ([call(city="", days=3)], [RIGHT], 1 / 2),
        ([call(city="...", days=3)], [call(city="!", days=3)], 1 / 2),  # texts without words are similar only if equal
        ([call(city="new-york", days=3)], [RIGHT], 0.99),  # the same words, but not right
        ([call(city="ÉVRY", days=3)], [call(city="Évry sud", days=3)], (2 / 3 + 1) / 2),
        ([call(days=True)], [call(days=1)], 0.0),
        ([call(days=1.0)], [call(days=1)], 0.0),
        ([call(days="1")], [call(days=1)], 0.0),
        ([call(days=[1, {"a": 2, "b": 3}], city="x")], [call(days=[1, {"b": 3, "a": 2}], city="y")], 1 / 2),
        ([call(days=[2, 1], city="x")], [call(days=[1, 2], city="x")], 1 / 2),
        ([call("now")], [RIGHT], 0.0),
        ([call("now"), RIGHT], [RIGHT], 1 / 2),
        ([RIGHT, RIGHT], [RIGHT], 1 / 2),
        ([RIGHT], [RIGHT, call("now")], 1 / 2),
        ([RIGHT, call("now")], [RIGHT, call("free", x=1)], 1 / 3),
        ([call("now"), NEAR], [RIGHT, call("now")], (1 + NEARNESS) / 2),
        ([], [RIGHT], 0.0),
        ([RIGHT], [], 0.0),
        ([RIGHT, call("later")], [RIGHT], 0.0),  # a tool that is not offered
        ([call(city="New York", days=3, hours=1)], [RIGHT], 0.0),  # an argument that the schema does not have
        ([call("now", zone=1)], [call("now")], 0.0),
        ([call("free", x=1, y=2)], [call("free", x=1)], 1 / 2),  # a schema that names no arguments allows any
        ([call("open", x=1, y=2)], [call("open", x=1)], 1 / 2),
    ],
)
def test_similarity_computed_by_hand(calls, answer, expected):
    assert similar(calls, answer) == pytest.approx(expected, rel=1e-15, abs=0)


def test_the_most_similar_calls_are_paired_first():
    first, second = call(city="a", days=1, units="C"), call(city="b", days=1, units="F")
    # pairing in written order would give 1/3 for the first and leave 0 or 1/3 for the other
    assert similar([call(city="b", days=1, units="C"), call(city="b", days=1, units="F")], [first, second]) == (
        pytest.approx((1 + 2 / 3) / 2)
    )
    # 2/3 with the second exceeds 1/3 with the first, though the call before it also has 1/3 with the second
    assert similar([call(city="x", days=1, units="F"), call(city="b", days=1, units="F")], [second]) == 1 / 2
    assert similar([call(city="b", days=2, units="C"), call(city="x", days=1, units="F")], [first, second]) == (
        pytest.approx((2 / 3 + 1 / 3) / 2)
    )


def test_what_is_right_is_judged_as_by_call_reward():
    possible = {"possible_answers": [{"weather": {"city": ["New York"], "note": ["", "x"]}}], "category": "simple"}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {
        "properties": {"city": {"type": "string"}, "note": {"type": "string"}}, "required": ["city"],
    }}}]  # fmt: skip

    def both(arguments, answer):
        text = render_completion([call(**arguments)])
        columns = {name: [value] for name, value in possible.items()}
        return [
            reward(["p"], [text], [[1]], answer=[[call(**answer)]], tools=[tools], **columns)[0]
            for reward in (CallReward(), SimilarityReward())
        ]

    assert both({"city": "new-york"}, {"city": "New York"}) == [1.0, 1.0]
    assert both({"city": "York"}, {"city": "New York"}) == [0.0, pytest.approx(2 / 3)]
    assert both({"city": "Rome"}, {"city": "Rome"}) == [0.0, 0.99], "equal to an answer that its own rules refuse"


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_bare_call_earns_as_by_call_reward(name):
    form = FORMATS[name]
    text, right = render_completion([NEAR], form), render_completion([RIGHT], form)
    plain, thinking = SimilarityReward(form), SimilarityReward(form, allow_thoughts=True)
    assert earned(text, [RIGHT], plain) == earned(f"<think>Hm.</think>{text}", [RIGHT], thinking) == NEARNESS
    assert earned(right, [RIGHT], plain) == 1.0
    for wrong in (f"Sure! {text}", text[:-1], f"<think>Hm.</think>{text}", f"<think>{text}", "I cannot.", ""):
        assert earned(wrong, [RIGHT], plain) == 0.0
    assert earned("I cannot.", [], plain) == earned("", [], plain) == 1.0
    assert earned("<think>I cannot.", [], thinking) == earned("<think>Hm.</think>", [], plain) == 0.0
    turns = [{"role": "assistant", "content": one} for one in (text, "")]
    assert earned(turns, [RIGHT], plain) == NEARNESS
    assert earned([*turns, {"role": "assistant", "content": right}], [RIGHT], plain) == 1 / 2, "one too many"


def test_long_texts_are_compared_by_their_first_words():
    """Otherwise the cost would be quadratic in what a model writes."""
    words = [f"w{n}" for n in range(1000)]
    longer = similar([call(note=" ".join([*words, "end"]))], [call(note=" ".join(words))])
    assert longer == pytest.approx(2 * 200 / (1000 + 1001))
    assert similar([call(note=" ".join(words[:199]))], [call(note=" ".join(words[:200]))]) == pytest.approx(0.99)
    assert similar([call(note=" ".join(words[:150]))], [call(note=" ".join(words[:200]))]) == pytest.approx(300 / 350)
    assert similar([call(note=" ".join(["end", *words]))], [call(note=" ".join(words))]) == pytest.approx(398 / 2001)


VALUES = st.one_of(
    st.integers(0, 2), st.booleans(), st.sampled_from(["", "a", "b a", "a b c", "A b", "a, b", "c c a b"]), st.just([1])
)
CALLS = st.lists(
    st.builds(
        lambda name, arguments: {"name": name, "arguments": arguments},
        st.sampled_from(["weather", "free"]),
        st.dictionaries(st.sampled_from(["city", "days", "units"]), VALUES),
    ),
    max_size=4,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(CALLS, CALLS)
def test_similarity_is_symmetric_and_1_for_right_calls_alone(calls, answer):
    reward = similar(calls, answer)
    assert 0 <= reward <= 1 and reward == similar(answer, calls)
    assert (reward == 1) == exact_match(calls, answer) == (earned(render_completion(calls), answer, CallReward()) == 1)
    assert similar(calls, calls[::-1]) == 1


@settings(deadline=None, derandomize=True, max_examples=50)
@given(*[st.lists(st.sampled_from("abcd"), min_size=1, max_size=12)] * 2)
def test_similar_texts_share_a_subsequence(one, other):
    """Compared with the recurrence of the longest common subsequence."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for n, left in enumerate(one):
        for m, right in enumerate(other):
            table[n + 1][m + 1] = table[n][m] + 1 if left == right else max(table[n][m + 1], table[n + 1][m])
    if one != other:
        expected = min(2 * table[-1][-1] / (len(one) + len(other)), 0.99)
        assert math.isclose(similar([call(note=" ".join(one))], [call(note=" ".join(other))]), expected)


def test_it_travels_and_has_a_name():
    reward = pickle.loads(pickle.dumps(SimilarityReward(FORMATS["json"])))
    assert RewardFunctions(reward).names == ["similarity_reward"]
    assert earned(render_completion([NEAR], FORMATS["json"]), [RIGHT], reward) == NEARNESS
