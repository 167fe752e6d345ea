"""Completions as models write them and as they break: parsers, matches and rewards survive all of them.

    python -m tests.toolcall.fuzz --cases 1000000 --seed 0

A case is a completion in one of the formats, nearly always mutated. It is read, judged and rewarded in that format, and
read in another.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.fuzzing import Fuzzer, main
from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import (
    FORMATS,
    CallReward,
    Row,
    SelfExemplifyingReward,
    SimilarityReward,
    ToolFormat,
    bfcl_match,
    exact_match,
    is_answer_correct,
    is_correct,
    only_calls,
    parse_sections,
    render_self_exemplified,
)
from toolx_kernels.toolcall.bfcl_match import possible_fault
from toolx_kernels.toolcall.literals import write_literal
from toolx_kernels.toolcall.parse import THOUGHTS, read
from toolx_kernels.toolcall.rewards import NEARLY_RIGHT
from toolx_kernels.toolcall.self_exemplify import distinct_examples
from toolx_kernels.toolcall.strict_json import MAX_DEPTH, is_shallow

LONGEST = 100_000  # characters of the longest runs
BONUS = 0.01
QUOTED = ("hermes", "mistral", "llama3", "json")  # formats that quote the names of functions and arguments
MARKERS = sorted({marker for form in FORMATS.values() for marker in form.markers})
TAGS = [*MARKERS, *THOUGHTS, *THOUGHTS.values(), "<examples>", "</examples>", "<tool_response>", "</tool_response>"]
CONTROL = ["<|im_start|>assistant\n", "<|im_end|>", "<|eot_id|>", "</s>", "<|endoftext|>", "<|python_tag|>"]
BITS = [
    '{"name": "f", "arguments": {}}', '{"name": "f", "parameters": {"x": 1}}', '{"name": ', '"arguments": {', "[f(",
    '{"type": "function", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}', '"arguments": "{}"', "g(x=",
    '{"id": "c1", ', '"parameters": {"x": 1}', "```json\n", "```", "NaN", "-Infinity", "1e999", "True", "0x1F",
    "[f(x=1)]", "1_000", "{", "}", "[", "]", "(", ")", '"', "'", "\\", ",", ";", ":", "=", "//", "\n", " ", "\t",
    "\x00", "\ufeff", "\ud800", "\ud83d\ude00", "\u2028", "\\u0000", "\\ud83d\\ude00", "\\ud800", "\\x41",
    "\\N{BULLET}", "\\N{", "𝔘", "東京", "مرحبا", "ﷺ", "İ", "ß", "e\u0301", "٣", "\r\n", "Sure! ", "f[ARGS]{}",
    "[CALL_ID]a1",
]  # fmt: skip
REPEATED = [
    *TAGS,
    *BITS,
    *"[]{}()\"'\\0a,: \n",
    '{"a":',
    "[[",
    '\\"',
    "a b ",
    "f(",
    "f[CALL_ID]",
    '{"name":',
    "</",
    "1.",
]
NAMES = ["f", "get_weather", "api.news", "/v1/users", "Get Flight Details", "Größe", "x-y"]
KEYS = ["x", "city", "from-date", "user.id", "größe", "n2"]
WORDS = [
    "New York",
    "東京",
    "",
    "a",
    "3 + 5",
    'it\'s "so"',
    "</tool_call>",
    "[TOOL_CALLS]",
    "\ud800",
    "\x00",
    "a\nb",
    "\\",
]
JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}
LITERALS = {  # of BFCL's languages: a stated type, a value that it can hold
    "java": [("integer", 42), ("long", 42), ("double", 1.5), ("boolean", True), ("String", "Rome"), ("float", 2.0),
             ("ArrayList<integer>", [1, 2]), ("ArrayList<String>", ["a", "b"]), ("Array<integer>", [1, 2]),
             ("HashMap", {"k": 1})],
    "javascript": [("integer", 42), ("Bigint", 42), ("float", 1.5), ("Boolean", False), ("String", "Rome"),
                   ("array<integer>", [1, 2]), ("array", ["a", 1]), ("dict", {"k": 1})],
}  # fmt: skip


class Setting(NamedTuple):
    form: str
    answer: list[dict]
    tools: list[dict]
    possible: list[dict] | None = None  # with a category, judged by BFCL's rules
    category: str = ""
    right: bool = False  # whether the text is the answer and nothing else
    examples: int | None = None  # in a right text with sections: its different examples


# ---- right completions


def draw(rng: random.Random) -> tuple[Setting, str]:
    form = rng.choice(list(FORMATS))
    setting = _of_bfcl(rng, form) if rng.random() < 0.25 else _of_calls(rng, form)
    calls, right, examples = rng.sample(setting.answer, len(setting.answer)), rng.random() < 0.1, None
    nearly = not right and rng.random() < 0.3
    if nearly:
        calls = _nearly(rng, calls)
    written = FORMATS[form].render(calls)
    if rng.random() < 0.2:
        subjects = rng.choices(["weather", "time", "price", "way", "name", "news"], k=rng.randrange(8))
        made = [{"tools": ["f"], "question": f"What is the {subject}?", "answer": []} for subject in subjects]
        written, examples = render_self_exemplified(made, "Hm.", calls, FORMATS[form]), len(set(subjects))
    if right:
        return setting._replace(right=True, examples=examples), written
    text = written if rng.random() < 0.8 else rng.choice(["<think>Hm.</think>\n", "[THINK][/THINK]"]) + written
    while rng.random() < 0.6 or (text == written and not nearly):
        text = rng.choice(MUTATIONS)(rng, text)
        if len(text) > LONGEST:
            break
    return setting, text


def _nearly(rng: random.Random, calls: list[dict]) -> list[dict]:
    """Other calls: one is missing, or there twice, or has another text in an argument."""
    at = rng.randint(0, len(calls))
    one = [{**call, "arguments": {**call["arguments"], "x": "New York is there"}} for call in calls[at : at + 1]]
    return calls[:at] + rng.choice([[], calls[at : at + 1] * 2, one, one]) + calls[at + 1 :]


def _of_calls(rng: random.Random, form: str) -> Setting:
    def name(plain: list[str]) -> str:
        return rng.choice(WORDS) + rng.choice(plain) if form in QUOTED and rng.random() < 0.1 else rng.choice(plain)

    answer = [
        {"name": name(NAMES), "arguments": {name(KEYS): _value(rng) for _ in range(rng.randrange(4))}}
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3]))
    ]
    keys = {call["name"]: {} for call in answer} | {"f": {"x": {}}}
    for call in answer:
        keys[call["name"]] |= dict.fromkeys(call["arguments"], rng.choice([{}, {}, {"type": "number"}]))
    return Setting(form, answer, [_tool(name, properties) for name, properties in keys.items()])


def _of_bfcl(rng: random.Random, form: str) -> Setting:
    """Calls with one acceptable value per argument, in one of BFCL's three languages, or none."""
    language = rng.choice(["python", "java", "javascript"])
    if rng.random() < 0.1:
        return Setting(form, [], [_tool("f", {"x": {"type": "string"}})], [], "irrelevance")
    answer, tools, possible = [], [], []
    for name in rng.sample(NAMES, rng.choice([1, 1, 2])):
        properties: dict[str, dict] = {}
        arguments, acceptable = {}, {}
        for key in rng.sample(KEYS, rng.randrange(4)):
            if language == "python":
                value = rng.choice([7, 2.5, True, "New York", "it's", ["a", "b"], [1, 2], {"k": "v"}])
                properties[key] = {"type": JSON_TYPES[type(value)]}
                if isinstance(value, list):
                    properties[key]["items"] = {"type": JSON_TYPES[type(value[0])]}
                arguments[key] = accepted = value
            else:
                stated, accepted = rng.choice(LITERALS[language])
                properties[key] = {"type": "string", "format": stated}
                arguments[key] = write_literal(accepted, language, stated)
            acceptable[key] = [{k: [v] for k, v in accepted.items()} if isinstance(accepted, dict) else accepted]
        answer.append({"name": name, "arguments": arguments})
        tools.append(_tool(name, properties))
        possible.append({name: acceptable})
    category = f"parallel_{language}" if len(answer) > 1 else f"simple_{language}"
    assert possible_fault(tools, possible, category) is None
    return Setting(form, answer, tools, possible, category)


def _tool(name: str, properties: dict) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind == 1:
        return rng.choice([0, 1, -7, 2**63, -(10**40), rng.randrange(10**6)])
    if kind == 2:
        return rng.choice([0.0, -0.0, 1.0, 1e22, -1e-7, 5e-324, 1.7976931348623157e308, rng.random()])
    if kind < 6:
        return rng.choice(WORDS) + "".join(rng.choices(BITS, k=rng.choice([0, 0, 0, 1, 2])))
    inner = [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return inner if kind == 6 else {rng.choice([*KEYS, *WORDS]): value for value in inner}


# ---- mutations: (rng, text) to text


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randint(0, len(text))]


def _span(rng: random.Random, text: str) -> tuple[int, int]:
    start = rng.randint(0, len(text))
    return start, min(len(text), start + rng.choice([1, 1, 2, 5, 20, len(text)]))


def _delete(rng: random.Random, text: str) -> str:
    start, stop = _span(rng, text)
    return text[:start] + text[stop:]


def _duplicate(rng: random.Random, text: str) -> str:
    start, stop = _span(rng, text)
    return text[:stop] + text[start:stop] + text[stop:]


def _move(rng: random.Random, text: str) -> str:
    start, stop = _span(rng, text)
    left = text[:start] + text[stop:]
    place = rng.randint(0, len(left))
    return left[:place] + text[start:stop] + left[place:]


def _insert(rng: random.Random, text: str) -> str:
    place = rng.choice([0, len(text), rng.randint(0, len(text))])
    return text[:place] + rng.choice(rng.choice([TAGS, CONTROL, BITS, WORDS])) + text[place:]


def _replace(rng: random.Random, text: str) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + rng.choice(BITS) + text[place + 1 :]


def _escape(rng: random.Random, text: str) -> str:
    place = rng.randint(0, len(text))
    return text[:place] + "".join(f"\\u{ord(c) % 65536:04x}" for c in text[place : place + 1]) + text[place + 1 :]


def _wrap(rng: random.Random, text: str) -> str:
    opening, closing = rng.choice(
        [*THOUGHTS.items(), ("<tool_call>", "</tool_call>"), ("<|tool_call_start|>", "<|tool_call_end|>"), ("[", "]"),
         ("<examples>", "</examples>"), ("```json\n", "\n```"), ("```", "```"), ("[TOOL_CALLS]", ""), ('{"a": ', "}"),
         ("<think>Hm.</think>", ""), ("<examples>[]</examples>\n<think>Hm.</think>\n", ""), ('"', '"')]
    )  # fmt: skip
    start, stop = rng.choice([(0, len(text)), _span(rng, text)])
    return text[:start] + opening + text[start:stop] + closing + text[stop:]


def _other_format(rng: random.Random, text: str) -> str:
    calls = [{"name": "f", "arguments": {"x": rng.choice(WORDS)}}]
    return _insert(rng, text) + FORMATS[rng.choice(list(FORMATS))].render(calls)


_VALUE = re.compile(r"""(?<=[=:])\s?(?:-?[\w.]+|"[^"]*")""")


def _value_span(rng: random.Random, text: str) -> tuple[int, int]:
    """Where a number, a constant or a string stands behind a key; the end of the text if there is none."""
    return rng.choice([found.span() for found in _VALUE.finditer(text)] or [(len(text), len(text))])


def _number(rng: random.Random, text: str) -> str:
    """Another number, or what looks like one, in place of a value."""
    start, stop = _value_span(rng, text)
    long = "9" * rng.choice([20, 400, 4300, 4301])
    number = rng.choice([long, f"-{long}.5", f"1e{long[:5]}", "NaN", "-0", "1.", ".5", "01", "+1", "1_0", "1j", "٣"])
    return text[:start] + number + text[stop:]


def _nest(rng: random.Random, text: str) -> str:
    """Many brackets around a value, about as many as are allowed or far more."""
    start, stop = _value_span(rng, text)
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}"), ("(", ")"), ("[[1],", "]"), ('{"a":[', "]}")])
    deep = rng.choice([MAX_DEPTH - 3, MAX_DEPTH - 2, MAX_DEPTH - 1, MAX_DEPTH, 200, 3000])
    closings = closing * rng.choice([deep, deep, deep - 1])
    return text[:start] + opening * deep + text[start:stop] + closings + text[stop:]


def _run(rng: random.Random, text: str) -> str:
    """A long run of a piece; rarely, because it takes as long as a hundred other cases."""
    if rng.random() < 0.98:
        return _insert(rng, text)
    piece = "".join(rng.choices(REPEATED, k=rng.choice([1, 1, 2, 3])))
    length = int(math.exp(rng.uniform(math.log(100), math.log(LONGEST))))
    place = rng.randint(0, len(text))
    return text[:place] + piece * (length // len(piece)) + text[place:]


MUTATIONS = [
    _cut, _delete, _duplicate, _move, _insert, _insert, _replace, _escape, _wrap, _wrap, _other_format, _number, _nest,
    _run,
]  # fmt: skip


# ---- what must hold


def check(setting: Setting, text: str) -> Counter:
    form = FORMATS[setting.form]
    other = list(FORMATS.values())[len(text) % len(FORMATS)]
    reading, others = read(text, form), read(text, other)
    _check_calls(reading.calls or [], form)
    _check_calls(others.calls or [], other)
    assert not (reading.bare and reading.calls is None), "malformed and bare"
    assert only_calls(text, form) == (reading.bare and reading.thought is None)
    around = read(f" \n{text}\n", form)
    assert (around.calls, around.bare) == (reading.calls, reading.bare), "white space around it changes what is read"
    judged = _check_judgment(setting, text, reading.calls)
    called, similar, exemplified = _check_rewards(setting, text)
    assert called <= judged, "rewarded, but not right"
    if reading.bare and reading.thought is None:
        assert called == judged, "right calls alone are not rewarded"
    if setting.examples is not None:
        assert exemplified == (1 + BONUS if setting.examples > 3 else 1.0), "right sections are not rewarded"
    elif setting.right:
        assert reading.bare and called == similar == 1.0, "the right completion is not rewarded"
    outcome = "malformed" if reading.calls is None else "with calls" if reading.calls else "without calls"
    seen = {"right": judged, "similar": 0 < similar < 1, "exemplifying": exemplified > 0}
    return Counter({outcome: 1} | {name: 1 for name, holds in seen.items() if holds})


def _check_calls(calls: list[dict], form: ToolFormat) -> None:
    """They are JSON that code may recurse through, and what is read can be written and read again."""
    written = json.dumps(calls, allow_nan=False)
    for call in calls:
        assert call.keys() == {"name", "arguments"} and type(call["name"]) is str and type(call["arguments"]) is dict
        assert is_shallow(call), "a call is nested too deep"
        _check_value(call["arguments"])
    if not is_shallow(calls):
        return  # no answer of a row is nested as deep, because its list counts
    try:
        text = form.render(calls)
    except InputError:
        assert form.name not in QUOTED, "a format that quotes names cannot write one"
        return
    again = read(text, form)
    assert json.dumps(again.calls) == written and again.bare, "what was read, and written, is read differently"


def _check_value(value: Any) -> None:
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_value(inner)
    assert value is None or type(value) in (bool, int, float, str, list, dict), type(value)


def _check_judgment(setting: Setting, text: str, calls: list[dict] | None) -> bool:
    """Whether the calls of ``text`` are right, of which the three functions that say so agree."""
    columns = {} if setting.possible is None else {"possible_answers": setting.possible, "category": setting.category}
    form = FORMATS[setting.form]
    row = Row("r", "Question?", setting.tools, setting.answer, columns)
    judged = is_correct(text, row, form)
    if setting.possible is None:
        assert judged == exact_match(calls, setting.answer, setting.tools), "is_correct and exact_match differ"
        same = calls is not None and _multiset(calls) == _multiset(setting.answer)
        assert same == exact_match(calls, setting.answer), "not the answer's calls"
        assert judged in (same, calls is not None and _multiset(calls, _whole) == _multiset(setting.answer, _whole))
        assert judged >= same, "the same calls, but not right"
    else:
        assert judged == bfcl_match(calls, setting.tools, setting.possible, setting.category), "differs from bfcl_match"
    sections = parse_sections(text, form)
    assert sections.examples is None or 0 <= distinct_examples(sections.examples, "Question?") <= len(sections.examples)
    answered = sections.answer is not None and is_correct(sections.answer, row, form)
    assert is_answer_correct(text, row, form) == answered, "is_answer_correct differs from its definition"
    return judged


def _multiset(calls: list[dict], number: Callable[[str], Any] = float) -> Counter:
    texts = (json.dumps(call) for call in calls)
    return Counter(json.dumps(json.loads(text, parse_float=number), sort_keys=True) for text in texts)


def _whole(digits: str) -> int | float:
    return int(number) if (number := float(digits)).is_integer() else number


def _check_rewards(setting: Setting, text: str) -> tuple[float, ...]:
    """The rewards for calls alone, by similarity and with sections; the same for a string and for a chat."""
    form = FORMATS[setting.form]
    chat = [{"role": "assistant", "content": text}, {"role": "tool", "content": "<tool_call>"}]
    columns = {"answer": [setting.answer] * 2, "tools": [setting.tools] * 2}
    if setting.possible is not None:
        columns |= {"possible_answers": [setting.possible] * 2, "category": [setting.category] * 2}
    rewards = []
    for function in (CallReward(form), SimilarityReward(form), SelfExemplifyingReward(BONUS, tool_format=form)):
        ours, chats = function(["Question?"] * 2, [text, chat], [[], []], **columns)
        assert ours == chats and type(ours) is float, function.__name__
        rewards.append(ours)
    called, similar, exemplified = rewards
    assert called in (0.0, 1.0) and exemplified in (0.0, 1.0, 1.0 + BONUS), rewards
    assert similar == 1.0 if called else 0.0 <= similar <= NEARLY_RIGHT, rewards
    return tuple(rewards)


def _seconds(text: str) -> float:
    """Linear in the length of the text: several times what a check takes where every few characters are a call."""
    return 0.5 + 5e-5 * len(text)


FUZZER = Fuzzer("completions", "tests.toolcall.fuzz", draw, check, _seconds)

if __name__ == "__main__":
    main(FUZZER, __doc__)
