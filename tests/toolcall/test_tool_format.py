import json
import pickle
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import FORMATS, HERMES, Row, only_calls, parse_calls, render_completion
from toolx_kernels.toolcall.parse import read
from toolx_kernels.toolcall.strict_json import MAX_DEPTH

QUOTED = ("hermes", "mistral", "llama3", "json")  # forms that quote the names of functions and arguments
JSON_ANYWHERE = ("json", "llama3", "mistral", "mistral_args")
PYTHON = ("pythonic", "lfm2")
MARKERS = [marker for form in FORMATS.values() for marker in form.markers]

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
strings = st.text() | st.lists(
    st.sampled_from([*MARKERS, '"', "'", "\\", "[f(", ")]", "{", "```", "\n", "\ud83d\ude00"])
).map("".join)
values = st.recursive(
    scalars | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=6,
)
plain_names = st.lists(st.text("aé_9./-", min_size=1).map(lambda word: f"b{word}"), min_size=1, max_size=3).map(
    " ".join
)
plain_keywords = st.text("aé_9.-", min_size=1)


def calls_of(names, keywords):
    call = {"name": names, "arguments": st.dictionaries(keywords, values, max_size=3)}
    return st.lists(st.fixed_dictionaries(call), max_size=3)


def f(**arguments):
    return {"name": "f", "arguments": arguments}


def same(found, expected):
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def check_round_trip(name, calls):
    text = render_completion(calls, FORMATS[name])
    assert same(parse_calls(text, FORMATS[name]), calls) and only_calls(text, FORMATS[name])
    assert bool(text) == bool(calls)
    for around in ("Well, ", "</think>"):
        found = read(around + text + around, FORMATS[name])
        assert same(found.calls, calls) and not found.bare


@pytest.mark.parametrize("name", QUOTED)
@settings(max_examples=25, deadline=None)
@given(calls=calls_of(strings, strings))
@example(calls=[{"name": "\ud800", "arguments": {"[TOOL_CALLS]": "</tool_call>\ud800", "": {"a": [[], {}]}}}, f()])
def test_what_is_written_is_read_again(name, calls):
    check_round_trip(name, calls)


@pytest.mark.parametrize("name", ["mistral_args", *PYTHON])
@settings(max_examples=25, deadline=None)
@given(calls=calls_of(plain_names, plain_keywords))
@example(
    calls=[f(a="\ud800\ud83d\ude00 \u2028\x7f\x00"), {"name": "Get Flight Details", "arguments": {"from": -1e-7}}, f()]
)
def test_what_is_written_without_quotes_is_read_again(name, calls):
    check_round_trip(name, calls)


CALLS = [f(x=1.5, s='a"b\né'), {"name": "math.g", "arguments": {"z": [True, {"k": None}]}}]
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "f", "arguments": {"x": 1.5, "s": "a\\"b\\né"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "math.g", "arguments": {"z": [true, {"k": null}]}}\n</tool_call>',
    "mistral_args": '[TOOL_CALLS]f[ARGS]{"x": 1.5, "s": "a\\"b\\né"}[TOOL_CALLS]math.g[ARGS]{"z": [true, {"k": null}]}',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1.5, "s": "a\\"b\\né"}}, '
    '{"name": "math.g", "arguments": {"z": [true, {"k": null}]}}]',
    "lfm2": '<|tool_call_start|>[f(x=1.5, s="a\\"b\\né"), math.g(z=[True, {"k": None}])]<|tool_call_end|>',
    "pythonic": '[f(x=1.5, s="a\\"b\\né"), math.g(z=[True, {"k": None}])]',
    "llama3": '{"name": "f", "parameters": {"x": 1.5, "s": "a\\"b\\né"}}; '
    '{"name": "math.g", "parameters": {"z": [true, {"k": null}]}}',
    "json": '[{"name": "f", "arguments": {"x": 1.5, "s": "a\\"b\\né"}}, '
    '{"name": "math.g", "arguments": {"z": [true, {"k": null}]}}]',
}


def test_the_canonical_texts():
    swapped = [{"arguments": call["arguments"], "name": call["name"]} for call in CALLS]
    assert {name: form.render(swapped) for name, form in FORMATS.items()} == WRITTEN
    assert FORMATS["json"].render([f()]) == '{"name": "f", "arguments": {}}'
    assert render_completion(Row("r", "p", [], [f()]), FORMATS["pythonic"]) == "[f()]"


def test_a_form_travels_to_other_processes():
    assert [pickle.loads(pickle.dumps(form)) for form in FORMATS.values()] == list(FORMATS.values())
    assert all(form.name == name for name, form in FORMATS.items())


def test_each_form_is_asked_for_with_an_example_in_it():
    assert HERMES.request == (
        "For each function call, return a json object with function name and arguments within"
        ' <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )
    for form in FORMATS.values():
        filled = form.request.replace("<function-name>", '"f"' if form.name in QUOTED else "f")
        filled = filled.replace("<args-json-object>", '{"x": 1}').replace("<argument-name>=<value>, ...), ...", "x=1)")
        example = re.search(r"\n(<tool_call>.*</tool_call>|[\[{<].*)(\n|$)", filled, re.DOTALL if form is HERMES else 0)
        assert same(parse_calls(example[1], form), [f(x=1)]), form.name


ONE, TWO = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {}}'
LLAMA = '{"name": "f", "parameters": {"x": 1}}'
OPENAI = '{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}'
BARE = [  # forms, a text of calls alone, their number
    (("json", "llama3"), ONE, 1),
    (("json", "llama3"), LLAMA, 1),
    (("json", "llama3"), f"\n{ONE}\n\n{TWO} ", 2),
    (("json", "llama3"), f"{LLAMA}; {TWO}", 2),
    (("json", "llama3"), f"{ONE},\n{TWO}", 2),
    (("json", "llama3"), f"[{ONE}, {TWO}]", 2),
    (("json", "llama3"), f"[ {ONE} ]\n[{TWO}]", 2),
    (("json", "llama3"), '{"arguments": {"x": 1}, "name": "f"}', 1),
    (("json", "llama3"), '{"parameters": {"x": 1}, "name": "f", "type": "function"}', 1),
    (("json", "llama3"), '{ "type" : "function", "name": "f", "parameters": {"x": 1}}', 1),
    (("json", "llama3"), OPENAI, 1),
    (("json", "llama3"), f"[{OPENAI}, {TWO}]", 2),
    (("json", "llama3"), '{"function": {"arguments": {"x": 1}, "name": "f"}, "type": "function"}', 1),
    (("json",), f"```json\n{ONE}\n```", 1),
    (("json",), f"```\n[{ONE},\n {TWO}]\n```\n", 2),
    (("json",), f"```JSON\n{ONE}\n{TWO}\n```", 2),
    (("json",), f"```tool_call\n{ONE}\n```\n```tool_call\n{TWO}```", 2),
    (("llama3",), f"<|python_tag|>{LLAMA}", 1),
    (("llama3",), f"<|python_tag|> {LLAMA}; {TWO}\n<|python_tag|>{TWO}", 3),
    (("mistral", "mistral_args"), f"[TOOL_CALLS] [{ONE}, {TWO}]", 2),
    (("mistral", "mistral_args"), f"[TOOL_CALLS]{ONE}\n[TOOL_CALLS] {TWO}", 2),
    (("mistral", "mistral_args"), '[TOOL_CALLS][{"id": "123456789", "name": "f", "arguments": {"x": 1}}]', 1),
    (("mistral", "mistral_args"), '[TOOL_CALLS]f[ARGS]{"x": 1}', 1),
    (("mistral", "mistral_args"), '[TOOL_CALLS] f [ARGS] {"x": 1}[TOOL_CALLS]g[ARGS]{}', 2),
    (("mistral", "mistral_args"), '[TOOL_CALLS]f[CALL_ID]aB3[ARGS]{"x": 1}\n[TOOL_CALLS]g[CALL_ID]x[ARGS]{}', 2),
    (("mistral", "mistral_args"), '[TOOL_CALLS]f{"x": 1}', 1),
    (PYTHON, "[f(x=1)]", 1),
    (PYTHON, "[ f( x = 1 , ) , g(), ]\n[g()]", 3),
    (PYTHON, "<|tool_call_start|>[f(x=1), g()]<|tool_call_end|>", 2),
    (PYTHON, "<|tool_call_start|>\n[f(x=1)]\n<|tool_call_end|>\n<|tool_call_start|>[g()]<|tool_call_end|>", 2),
    (PYTHON, f"<|tool_call_start|>[{ONE}]<|tool_call_end|>", 1),
    (PYTHON, f"<|tool_call_start|>{ONE}<|tool_call_end|>", 1),
]  # fmt: skip


@pytest.mark.parametrize(("names", "text", "count"), BARE)
def test_calls_alone(names, text, count):
    for name in names:
        found = read(text, FORMATS[name])
        assert same(found.calls, ([f(x=1), *[{"name": "g", "arguments": {}}] * 2])[:count]) and found.bare


NOT_BARE = [  # forms, a text of one call and other content
    (JSON_ANYWHERE, f"Sure! {ONE}"),
    (JSON_ANYWHERE, f"Sure: [{ONE}]."),
    (JSON_ANYWHERE, f"{ONE} Done {{sic}}."),
    (JSON_ANYWHERE, f'{ONE} {{"name": "Bob", "age": 3}}'),
    (JSON_ANYWHERE, f'{{"name": "Bob", "age": 3}}, {ONE}'),
    (JSON_ANYWHERE, f"Here:\n```json\n{ONE}\n```"),
    (JSON_ANYWHERE, f"```json\n{ONE}"),
    (JSON_ANYWHERE, f"```json\n{ONE} and so on\n```"),
    (JSON_ANYWHERE, f'{{"tool_calls": [{ONE}]}}'),
    (JSON_ANYWHERE, f'{{"id": "7", "tool_calls": [{ONE}]}}'),
    (JSON_ANYWHERE, f'[{{"id": 7, "tool": {ONE}}}]'),
    (JSON_ANYWHERE, f"[1, {ONE}]"),
    (JSON_ANYWHERE, f"<tool_call>{ONE}</tool_call>"),
    (JSON_ANYWHERE, f"{ONE};"),
    (("json",), f"<|python_tag|>{ONE}"),
    (("json",), f"[TOOL_CALLS] [{ONE}]"),
    (("llama3",), f"```json\n{ONE}\n```"),
    (("mistral", "mistral_args"), f"[{ONE}]"),
    (("mistral", "mistral_args"), f"Sure. [TOOL_CALLS][{ONE}]"),
    (("mistral", "mistral_args"), '[TOOL_CALLS]f[ARGS]{"x": 1}</s>'),
    (PYTHON, "Sure: [f(x=1)]"),
    (PYTHON, "```python\n[f(x=1)]\n```"),
    (PYTHON, "<|tool_call_start|>[f(x=1)]<|tool_call_end|>Checking that."),
    (PYTHON, "[[f(x=1)]]"),
    (PYTHON, "See [1](b) and (2): [f(x=1)]"),
]


@pytest.mark.parametrize(("names", "text"), NOT_BARE)
def test_a_call_and_more(names, text):
    for name in names:
        found = read(text, FORMATS[name])
        assert same(found.calls, [f(x=1)]) and not found.bare


TEXTS = [
    (FORMATS, ""),
    (FORMATS, "I cannot do that: no function fits."),
    (FORMATS, '{"city": "Oslo", "degrees": [3, 4]}'),
    (FORMATS, '{"name": "Bob", "age": 3}'),
    (FORMATS, '[{"name": "Bob", "age": 3}, {"name": {"first": "Ann"}}]'),
    (FORMATS, '{"type": "object", "properties": {}}'),
    (FORMATS, "Use {braces} and [brackets] (2), ```code```, `[x]` or {} and []."),
    (FORMATS, "[see section (2)] of [the guide](https://example.org/f(x)=1) for [your item (s)]"),
    (FORMATS, "[the name(s) of the city] please, [1] [2, 3] [a, b] [ ]"),
    (("hermes",), f"{ONE} [f(x=1)] [TOOL_CALLS]"),
    ((*PYTHON, "json", "llama3"), "[TOOL_CALLS]"),
    (PYTHON, ONE),
    (JSON_ANYWHERE, "[f(x=1)]"),
]


@pytest.mark.parametrize(("names", "text"), TEXTS)
def test_text_without_a_call(names, text):
    for name in names:
        assert read(text, FORMATS[name]) == (None, [], not text)


def deep(opening, closing, levels):
    return opening * levels + closing * levels


NO_CALL_IN_JSON = [
    '{"name": "f"}',
    '{"name": "f", "arguments": [1]}',
    '{"name": "f", "arguments": "{}"}',
    '{"name": "f", "arguments": null}',
    '{"name": 1, "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "f", "arguments": {}, "parameters": {}}',
    '{"name": "f", "arguments": {}, "why": "so"}',
    '{"name": "f", "arguments": {}, "id": 1}',
    '{"name": "f", "arguments": {}, "type": "tool"}',
    '{"type": "function", "function": "f", "parameters": {}}',
    '{"type": "function", "function": {"name": "f"}}',
    '{"type": "function", "function": {"name": "f", "arguments": "{\\"a\\": NaN}"}}',
    '{"type": "function", "function": {"name": "f", "arguments": {}}, "name": "f"}',
    '{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}',
    '{"type": "function", "name": "f"}',
    '{"function": {"name": "f", "arguments": {"x": 1}}, "why": "so"}',
    '{"function": {"name": "f", "arguments": "' + deep('{\\"a\\": ', "}", MAX_DEPTH).replace(": }", ": 1}", 1) + '"}}',
    '{"function": "f", "parameters": {"x": 1}}',
    '{"tool": "f", "arguments": {"x": 1}}',
    '{"thought": "Hm.", "name": "f", "arguments": {"x": 1}}',
    '"name": "f", "arguments": {"x": 1}',
    "{'name': 'f', 'arguments': {}}",
    '{name: "f", arguments: {}}',
    '{"name": "f", "arguments": {}',
    '[{"name": "f", "arguments": {}}',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": 1e999}}',
    '{"name": "f", "arguments": {"a": 1, "a": 1}}',
    f'{{"name": "f", "arguments": {{"a": 1{"0" * 10**5}}}}}',
    f'{{"name": "f", "arguments": {{"a": {deep("[", "]", MAX_DEPTH - 1)}}}}}',
    f'{{"name": "f", "arguments": {{"a": {deep("[", "]", 10**5)}}}}}',
    '{"name": "f", "arguments": {"a": "\n"}}',
    '{"name": "f", "arguments": {"a": True}}',
    '{"name": "f" "arguments": {}}',
    '{"name": "f", "arguments": {}} {"name": "f", "arguments": [}',
]
NO_CALL_IN_PYTHON = [
    "[f(1)]",
    '[f("a")]',
    "[f(x)]",
    "[f(1, x=2)]",
    "[f(x=1, 2)]",
    "[f(x=1, x=1)]",
    "[f(**{'x': 1})]",
    "[f(x=1)",
    "[f(x=1",
    "[f(x=1)]"[:-1] + "}",
    "[f(x=1) g()]",
    "[f(x=1), 2]",
    "[f(x=1), g]",
    "[f(,)]",
    "[f(x=)]",
    "[f(x==1)]",
    "[f(x=y)]",
    "[f(x=g())]",
    "[f(x=1+1)]",
    "[f(x=-y)]",
    "[f(x=nan)]",
    "[f(x=float('inf'))]",
    "[f(x=Infinity)]",
    "[f(x=1e999)]",
    f"[f(x={'9' * 10**5})]",
    "[f(x=1j)]",
    "[f(x=0x1)]",
    "[f(x=007)]",
    "[f(x=f'a')]",
    "[f(x=b'a')]",
    "[f(x='a)]",
    "[f(x='it's')]",
    "[f(x='\\x1')]",
    "[f(x='\\ud80')]",
    "[f(x='\\U00110000')]",
    "[f(x='\\Uffffffff')]",
    "[f(x='\\N{no such sign}')]",
    "[f(x=[i for i in y])]",
    "[f(x={1, 2})]",
    "[f(x={1: 2})]",
    "[f(x={'a': 1, 'a': 1})]",
    "[f(x={'a'})]",
    "[f(x=[1)])]",
    "[f(x=Trueish)]",
    f"[f(x={deep('[', ']', MAX_DEPTH - 1)})]",
    f"[f(x={deep('(', ')', 10**5)})]",
    f"[f(x={deep('[', ']', 10**5)})]",
    "[" + "f(x=" * 10**5,
]
MALFORMED = [
    *((JSON_ANYWHERE, text) for text in NO_CALL_IN_JSON),
    *((("llama3",), f"<|python_tag|>{text}") for text in (*NO_CALL_IN_JSON, "", "print(1)", 'brave.call(q="a")')),
    (("json", "llama3"), '{"name": "f", "arguments": {}, "id": "c1"}'),
    (("llama3",), f'<|python_tag|>{ONE}; {{"name": "Bob", "age": 3}}'),
    (("llama3",), f'Hm <|python_tag|> {{"tool_calls": [{ONE}]}}'),
    (("llama3",), f"{ONE}<|python_tag|>"),
    *(
        (("mistral", "mistral_args"), text)
        for text in (
            "[TOOL_CALLS]",
            "[TOOL_CALLS][]",
            "[TOOL_CALLS] Sure!",
            f"[TOOL_CALLS] [{ONE}, 1]",
            f"[TOOL_CALLS] [{ONE}",
            f"{ONE} [TOOL_CALLS]",
            f"[TOOL_CALLS][TOOL_CALLS] [{ONE}]",
            "[TOOL_CALLS]f",
            "[TOOL_CALLS]f[ARGS]",
            "[TOOL_CALLS]f[ARGS][1]",
            '[TOOL_CALLS]f[ARGS]"{}"',
            '[TOOL_CALLS]f[ARGS]{"x": 1',
            "[TOOL_CALLS]f[ARGS]{'x': 1}",
            '[TOOL_CALLS]f[ARGS]{"x": NaN}',
            f'[TOOL_CALLS]f[ARGS]{{"a": {deep("[", "]", MAX_DEPTH - 1)}}}',
            '[TOOL_CALLS][ARGS]{"x": 1}',
            'f[ARGS]{"x": 1}',
            '[TOOL_CALLS]f[ARGS]{"x": 1}g[ARGS]{}',
            '[TOOL_CALLS]f[CALL_ID]a b[ARGS]{"x": 1}',
            '[TOOL_CALLS]"f"{"x": 1}',
            '[CALL_ID]abc',
        )
    ),
    *((PYTHON, text) for text in NO_CALL_IN_PYTHON),
    *((PYTHON, f"<|tool_call_start|>{text}<|tool_call_end|>") for text in (*NO_CALL_IN_JSON, *NO_CALL_IN_PYTHON)),
    *(
        (PYTHON, text)
        for text in (
            "<|tool_call_start|>",
            "<|tool_call_end|>",
            "<|tool_call_start|><|tool_call_end|>",
            "<|tool_call_start|>[]<|tool_call_end|>",
            "<|tool_call_start|>f(x=1)<|tool_call_end|>",
            "<|tool_call_start|>[f(x=1)]",
            "<|tool_call_start|>[f(x=1)] so<|tool_call_end|>",
            "<|tool_call_start|><|tool_call_start|>[f(x=1)]<|tool_call_end|>",
            "[f(x=1)]<|tool_call_end|>",
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("names", "text"), MALFORMED, ids=lambda part: str(part)[:50])
def test_malformed(names, text):
    for name in names:
        for around in ("", "Well. "):
            assert read(around + text, FORMATS[name]) == (None, None, False), name


LITERALS = [
    ("'it\\'s'", "it's"),
    ('"a\'b"', "a'b"),
    ("'a\"b'", 'a"b'),
    ("'a\nb'", "a\nb"),
    (r"'\n\t\\\x41é\u00e9\U0001F600\N{BULLET}\101\0'", "\n\t\\Aéé😀•A\0"),
    (r"'\ud83d\ude00'", "😀"),
    (r"'\ud83d'", "\ud83d"),
    (r"'\d+\.'", r"\d+\."),
    ("'a\\\nb'", "ab"),
    ("''", ""),
    ("True", True), ("false", False), ("None", None), ("null", None),
    ("-1", -1), ("+2", 2), ("0", 0), ("-0.5", -0.5), (".5", 0.5), ("5.", 5.0), ("1e3", 1000.0), ("-1.5E-3", -0.0015),
    ("1_000", 1000), (str(10**4000), 10**4000),
    ("[]", []), ("[1, [2], ]", [1, [2]]),
    ("()", []), ("(1,)", [1]), ("(1, 'a')", [1, "a"]), ("(1)", 1), ("((1, 2))", [1, 2]),
    ("{}", {}), ('{"k": None, \'l\': [true, {"m": (1, 2)}],}', {"k": None, "l": [True, {"m": [1, 2]}]}),
    (deep("[", "]", MAX_DEPTH - 2), json.loads(deep("[", "]", MAX_DEPTH - 2))),
]  # fmt: skip


@pytest.mark.parametrize(("literal", "value"), LITERALS, ids=lambda part: str(part)[:30])
def test_literals(literal, value):
    found = parse_calls(f"[f(x={literal}, y=1)]", FORMATS["pythonic"])
    assert same(found, [f(x=value, y=1)])


def test_names_as_data_sets_have_them():
    for name in ("Get Flight Details", "api.news", "/v1/users", "get-it", "3d_plot", "Größe", "a  b"):
        assert parse_calls(f"[{name}(x=1), {name}()]", FORMATS["lfm2"])[0] == {"name": name, "arguments": {"x": 1}}
    (call,) = parse_calls("[f(from-date=1, user.id='a', from=2, 2fa=3)]", FORMATS["pythonic"])
    assert call["arguments"] == {"from-date": 1, "user.id": "a", "from": 2, "2fa": 3}
    name = "User Feed (Video Posts)"
    assert parse_calls(f"[TOOL_CALLS]{name}[ARGS]{{}}", FORMATS["mistral_args"]) == [{"name": name, "arguments": {}}]


@pytest.mark.parametrize(
    ("form", "call", "message"),
    [
        ("pythonic", {"name": "f(x)", "arguments": {}}, r"the function name 'f\(x\)' cannot be written"),
        ("lfm2", {"name": "", "arguments": {}}, "the function name '' cannot be written"),
        ("pythonic", {"name": "f ", "arguments": {}}, "the function name 'f ' cannot"),
        ("pythonic", {"name": "12", "arguments": {}}, "the function name '12' cannot"),
        ("pythonic", {"name": "f", "arguments": {"a b": 1}}, "the argument 'a b' of f cannot be written as a keyword"),
        ("lfm2", {"name": "f", "arguments": {"": 1}}, "the argument '' of f cannot"),
        ("mistral_args", {"name": "f[ARGS]", "arguments": {}}, r"the function name 'f\[ARGS\]' cannot stand before"),
        ("mistral_args", {"name": "", "arguments": {}}, "the function name '' cannot stand before"),
    ],
)
def test_names_that_a_form_cannot_write(form, call, message):
    with pytest.raises(InputError, match=f"^{message}.*rename it"):
        FORMATS[form].render([f(), call])


pieces = st.sampled_from(
    [*MARKERS, ONE, LLAMA, OPENAI, "[f(x=1)]", "[f(", "f(", "x=", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",",
     ";", ":", "\n", " ", "```", "```json", '{"name": "f"', '"arguments": {', "f[ARGS]", "NaN", "<think>", "</think>"]
)  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=50, deadline=None)
@given(text=st.lists(pieces | st.text(max_size=3), max_size=12).map("".join))
def test_any_text_is_survived(name, text):
    found = read(text, FORMATS[name])
    assert found.calls is None or all(
        call.keys() == {"name", "arguments"} and isinstance(call["name"], str) and isinstance(call["arguments"], dict)
        for call in found.calls
    )
    assert not (found.calls is None and found.bare)
    if found.calls and only_calls(text, FORMATS[name]):
        assert not only_calls(f"{text}x", FORMATS[name])


REPEATED = [
    "\\N{a",
    *MARKERS,
    '{"name": "f", "arguments": {"a": "',
    '{"name":',
    '{"name": {"name": ',
    "[{",
    '[{"id": 1}, ',
    '"arguments": {',
    '{"name": "Bob", "age": 3} ',
    "```",
    "```json ",
    "```json\n[{",
    "[TOOL_CALLS]f",
    "f[CALL_ID]a",
    "[f",
    "[f ",
    "[f(",
    "[f(x=[",
    "[f(x='",
    "f(x={'a': ",
    "a b",
    "[a.",
    " ",
    "\\",
    "'",
    '"',
    "(",
    "[1/",
]
BEFORE = {
    "mistral": ["", "[TOOL_CALLS]", "[TOOL_CALLS]f"],
    "pythonic": ["", "<|tool_call_start|>", "[f(x=", "[f(x='"],
    "llama3": ["", "<|python_tag|>", '{"name": "f'],
    "json": ["", "```", "<think>"],
}


@pytest.mark.parametrize("name", BEFORE)
def test_linear_time(name):
    """In quadratic time these would not finish."""
    for piece in REPEATED:
        for before in BEFORE[name]:
            read(before + piece * (40_000 // len(piece)) + "')]", FORMATS[name])
    many = FORMATS[name].render([f(x="y")] * 5_000)
    assert len(parse_calls(many, FORMATS[name])) == 5_000
