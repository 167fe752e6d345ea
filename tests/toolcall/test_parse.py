import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from toolx_kernels.toolcall import FORMATS, only_calls, parse_calls, render_completion, split_thought
from toolx_kernels.toolcall.parse import THOUGHTS, Reading, read
from toolx_kernels.toolcall.strict_json import MAX_DEPTH

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
calls = st.lists(
    st.fixed_dictionaries({"name": st.text(), "arguments": st.dictionaries(st.text(), values, max_size=4)}), max_size=4
)


def block(text):
    return f"<tool_call>\n{text}\n</tool_call>"


def call(arguments="{}"):
    return block(f'{{"name": "f", "arguments": {arguments}}}')


@given(calls, st.text(alphabet=" \n\tab", max_size=5))
@example([{"name": "</tool_call>", "arguments": {"<tool_call>": "\ud800</tool_call>\x00"}}], "a")
def test_what_is_rendered_is_parsed_again(calls, around):
    text = render_completion(calls)
    assert json.dumps(parse_calls(text), sort_keys=True) == json.dumps(calls, sort_keys=True)
    assert only_calls(text)
    assert parse_calls(around + text + around) == parse_calls(text)
    assert only_calls(around + text + around) == (not around.strip())


pieces = st.sampled_from(
    ["<tool_call>", "</tool_call>", "\n", "{", "}", "[", "]", '"', ",", ":", '"name": "f"', '"arguments": {}', "NaN"]
)


@given(st.text() | st.lists(pieces | st.text(max_size=3)).map("".join))
def test_any_text_is_survived(text):
    found = parse_calls(text)
    assert found is None or all(isinstance(c["name"], str) and isinstance(c["arguments"], dict) for c in found)
    assert only_calls(text) in (True, False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("no call here", []),
        ("<tool_cal>{}</tool_cal>", []),
        (call(), [{"name": "f", "arguments": {}}]),
        ("Sure! " + call('{"a": 1}') + " and " + call('{"a": 2.0}'), [1, 2.0]),
        ('<tool_call>{"arguments":{"a":true},"name":"f"}</tool_call>', [True]),
        (call('{"a": "\\ud800"}'), ["\ud800"]),
        (call('{"a": "</tool_call>"}'), ["</tool_call>"]),
        (call(f'{{"a": {10**4000}}}'), [10**4000]),
    ],
)
def test_well_formed(text, expected):
    found = parse_calls(text)
    assert [c["arguments"].get("a", c) for c in found] == expected
    assert [type(c["arguments"].get("a", c)) for c in found] == [type(value) for value in expected]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "</tool_call>",
        call()[: -len("</tool_call>")],
        call() + "</tool_call>",
        call() + "<tool_call>",
        f"<tool_call>{call()}</tool_call>",
        block(""),
        block("f()"),
        block("{'name': 'f', 'arguments': {}}"),
        block('{"name": "f", "arguments": {}'),
        block('{"name": "f", "arguments": {}} {"name": "f", "arguments": {}}'),
        block('{"name": "f", "arguments": {}} x'),
        block('[{"name": "f", "arguments": {}}]'),
        block('"f"'),
        block("1"),
        block("null"),
        block('{"name": "f"}'),
        block('{"arguments": {}}'),
        block('{"name": 1, "arguments": {}}'),
        block('{"name": "f", "arguments": {}, "id": 1}'),
        call("[]"),
        call("null"),
        call('"{}"'),
        call('{"a": NaN}'),
        call('{"a": -Infinity}'),
        call('{"a": 1e999}'),
        call('{"a": -1e999}'),
        call(f'{{"a": 1{"0" * 10**5}}}'),
        call('{"a": 1, "a": 1}'),
        call('{"a": {"b": 1, "b": 2}}'),
        block('{"name": "f", "name": "f", "arguments": {}}'),
        call('{"a": "\x00"}'),
        call('{"a": "\n"}'),
        call('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}"),
        call('{"a":' * 10**5 + "1" + "}" * 10**5),
        call('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}"),
        call("{" + '"a": [' * 200),
        call() + block("{"),
    ],
    ids=lambda text: text[:40],
)
def test_malformed(text):
    assert parse_calls(text) is None
    assert not only_calls(text)


def test_nesting_up_to_the_limit():
    deep = MAX_DEPTH - 2
    found = parse_calls(call('{"a": ' + "[" * deep + "]" * deep + "}"))
    assert found is not None and found[0]["arguments"]["a"] is not None
    assert parse_calls(call('{"a": ' + "[" * (deep + 1) + "]" * (deep + 1) + "}")) is None


def test_linear_time():
    """In quadratic time these would not finish."""
    for piece in ("<tool_call>", "<tool_call>{", "<tool_call>\n" * 2, " \n", "</tool_call", '<tool_call>{"a":"', "<"):
        parse_calls(piece * 50_000)
        parse_calls("<tool_call>" + piece * 50_000)
    assert len(parse_calls(call() * 20_000)) == 20_000


def test_only_calls():
    assert only_calls("") and only_calls(" \n") and only_calls(f"\n{call()}\n{call()} ")
    assert not only_calls("x") and not only_calls(f"Sure: {call()}") and not only_calls(f"{call()} and {call()}")
    assert not only_calls(f"Sure: {call()}{call()}") and not only_calls(call() + "<|im_end|>")


@pytest.mark.parametrize(("opening", "closing"), THOUGHTS.items())
@pytest.mark.parametrize("name", FORMATS)
def test_a_leading_thought_is_left_out(opening, closing, name):
    form, calls = FORMATS[name], [{"name": "f", "arguments": {"a": f"{closing}x{opening}"}}]
    right = render_completion(calls, form)
    for inside in (
        "",
        "\nHm.\n",
        right,
        right[:-2],
        f"{opening} [TOOL_CALLS] <|tool_call_end|></tool_call>",
        '{"name": ',
    ):
        if closing in inside:
            continue
        text = f" \n{opening}{inside}{closing}\n\n{right}\n"
        assert read(text, form) == Reading(inside, calls, True) and not only_calls(text, form)
        assert read(f"{opening}{inside}{closing} No.", form) == Reading(inside, [], False)
        assert read(f"{opening}{inside}{closing}", form) == Reading(inside, [], True)
        assert read(f"{opening}{inside}", form) == Reading(inside, None, False), "never closed"
    assert read(f"{opening}a{closing}Well: {right}", form) == Reading("a", calls, False)
    assert read(f"Well. {opening}a{closing}{right}", form) == Reading(None, calls, False), "not leading"
    assert read(f"a{closing}{right}", form) == Reading(None, calls, False)
    assert read(f"{opening}a{closing}{opening}b{closing}{right}", form) == Reading("a", calls, False), "one thought"


def test_splitting_a_thought_off():
    assert split_thought("<think>a</think>b</think>") == ("a", "b</think>")
    assert split_thought("\n[THINK]a</think>[/THINK]") == ("a</think>", "")
    assert split_thought("<think>a[/THINK]b") == ("a[/THINK]b", None)
    for text in ("", " a", "a <think>b</think>", "<thinking>b</thinking>", "</think>a"):
        assert split_thought(text) == (None, text)
    assert split_thought("<think>" * 50_000) == ("<think>" * 49_999, None)
