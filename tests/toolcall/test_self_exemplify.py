import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import (
    FORMATS,
    RewardFunctions,
    Row,
    SelfExemplifyingReward,
    answer_of,
    distinct_examples,
    is_answer_correct,
    is_correct,
    parse_sections,
    render_completion,
    render_self_exemplified,
)
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS, Sections, instructions
from toolx_kernels.toolcall.strict_json import MAX_DEPTH

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}]


def calls_for(*cities):
    return [{"name": "weather", "arguments": {"city": city}} for city in cities]


def an_example(question, *cities, **other):
    return {"tools": ["weather"], "question": question, "answer": calls_for(*cities), **other}


REQUEST = "What is the weather in Oslo today?"
ROW = Row("r", REQUEST, TOOLS, calls_for("Oslo"))
CHAT_ROW = Row(
    "c",
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": REQUEST}],
    TOOLS,
    calls_for("Oslo"),
)
POSSIBLE = [{"weather": {"city": ["Oslo", "Oslo, Norway"]}}]
LOOSE_ROW = Row("l", REQUEST, TOOLS, ROW.answer, {"possible_answers": POSSIBLE, "category": "simple_python"})
NO_CALL = Row("n", "Sing!", TOOLS, [], {"possible_answers": [], "category": "irrelevance"})
RIGHT = render_completion(ROW)
EXAMPLES = [
    an_example("Will it rain in Bergen tomorrow?", "Bergen"),
    an_example("Weather for Rome and Paris, please.", "Rome", "Paris"),
    an_example("How hot does it get in Cairo?", "Cairo"),
    an_example("Tell me a story", *[]),
]
EXAMPLES_BLOCK = f"<examples>{json.dumps(EXAMPLES)}</examples>"
THINK = "<think>The user asks about Oslo.</think>"
GOOD = f"{EXAMPLES_BLOCK}\n{THINK}\n{RIGHT}"

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
weird_examples = st.fixed_dictionaries({"tools": values, "question": values, "answer": values}, optional={"x": values})
calls = st.lists(
    st.fixed_dictionaries({"name": st.text(), "arguments": st.dictionaries(st.text(), scalars, max_size=2)}), max_size=2
)
pieces = st.lists(
    st.sampled_from(
        [
            "<examples>",
            "</examples>",
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            RIGHT,
            json.dumps(EXAMPLES),
            "[",
            "]",
            "{",
            '"',
            "\\",
            " ",
            "\n",
            "a",
            ",",
            "[]",
            "<",
            '{"name": "weather", "arguments": {"city": "Oslo"}}',
        ]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)
fewer = settings(max_examples=50)  # for what is slow to draw


def test_the_sections_of_a_good_completion():
    assert parse_sections(GOOD) == Sections(EXAMPLES, "The user asks about Oslo.", RIGHT, True)
    assert parse_sections(f"\n {EXAMPLES_BLOCK}{THINK}{RIGHT}\n") == parse_sections(GOOD)
    assert parse_sections(f"{THINK}{RIGHT}") == Sections(None, "The user asks about Oslo.", RIGHT, True)
    assert parse_sections(RIGHT) == Sections(None, None, RIGHT, True)
    assert parse_sections("") == Sections(None, None, "", True)
    assert parse_sections("<examples> [ ] </examples>Sorry.") == Sections([], None, "Sorry.", True)


def test_tags_within_strings_and_thoughts_are_text():
    tagged = an_example(f"</examples><think>{RIGHT}</think><examples>", "</examples>")
    thought = f"I could write <examples>[]</examples>{RIGHT} <think> here"
    call = [{"name": "weather", "arguments": {"city": "<think></examples>"}}]
    text = render_self_exemplified([tagged], thought, call)
    assert parse_sections(text) == Sections([tagged], thought, render_completion(call), True)


@pytest.mark.parametrize(
    "block",
    [
        "{}",
        "[1]",
        "[[]]",
        "null",
        "",
        "not json",
        "[{}]",
        '[{"tools": [], "question": "q"}]',
        "[] []",
        json.dumps(EXAMPLES)[:-1],
        f"{json.dumps(EXAMPLES)} and so on",
        f"Examples: {json.dumps(EXAMPLES)}",
        json.dumps([*EXAMPLES, {"tools": ["weather"]}]),
        json.dumps([*EXAMPLES, "more"]),
        '[{"tools": [], "question": NaN, "answer": []}]',
        '[{"tools": [], "tools": [], "question": "", "answer": []}]',
        '[{"tools": [], "question": 1e999, "answer": []}]',
        f'[{{"tools": 1, "question": {"9" * 9999}, "answer": 1}}]',
        f'[{{"tools": {"[" * MAX_DEPTH + "]" * MAX_DEPTH}, "question": "q", "answer": []}}]',
        "[" * 99_999,
    ],
)
def test_malformed_examples_leave_the_rest_as_it_is(block):
    text = f"<examples>{block}</examples>{THINK}{RIGHT}"
    assert parse_sections(text) == Sections(None, "The user asks about Oslo.", RIGHT, True)
    assert reward_of(text) == 1.0


MISPLACED = [
    f"Sure! {GOOD}",
    f"{GOOD} Done.",
    f"{EXAMPLES_BLOCK} so {THINK}{RIGHT}",
    f"{THINK}{EXAMPLES_BLOCK}{RIGHT}",
    f"{EXAMPLES_BLOCK}{EXAMPLES_BLOCK}{THINK}{RIGHT}",
    f"{EXAMPLES_BLOCK}{THINK}{THINK}{RIGHT}",
    f"{EXAMPLES_BLOCK}{RIGHT}{THINK}",
    f"{THINK}{RIGHT}{EXAMPLES_BLOCK}",
    f"{EXAMPLES_BLOCK}</examples>{THINK}{RIGHT}",
    f"{EXAMPLES_BLOCK}{THINK}</think>{RIGHT}",
]


@pytest.mark.parametrize("text", MISPLACED)
def test_misplaced_sections_break_the_format_and_not_the_result(text):
    assert reward_of(text) == 0.0 and is_answer_correct(text, ROW)


UNFINISHED = [GOOD[: GOOD.index(end)] for end in ("</examples>", "</think>")]
ONLY_INSIDE = [
    f"<examples>{RIGHT}</examples>",
    f"<examples>{RIGHT}</examples>{THINK}",
    f"<examples>[{json.dumps(an_example(RIGHT, 'Oslo'))}]</examples>{THINK}",
    f"<examples>{json.dumps([*EXAMPLES, an_example(REQUEST, 'Oslo')])}</examples>{THINK}",
    f"<think>{RIGHT}</think>",
    f"<think></think><examples>{RIGHT}</examples>",
    f"<examples>[]</examples><examples>{RIGHT}</examples>",
    f"<examples>{RIGHT}",
    f"<think>{RIGHT}",
    f'<examples>["</examples>{RIGHT}"</examples>',
    f"<examples>a</examples>{RIGHT}</examples>",
    f"<tool_call><examples>[]</examples>{RIGHT.removeprefix('<tool_call>')}",
    f"<tool_call>{RIGHT.partition('{')[2]}<examples>{RIGHT}</examples>",
    "<tool_<think></think>call>" + RIGHT.removeprefix("<tool_call>"),
]


@pytest.mark.parametrize("text", [*UNFINISHED, *ONLY_INSIDE])
def test_calls_inside_examples_and_thoughts_alone_are_never_the_answer(text):
    for row in (ROW, CHAT_ROW, LOOSE_ROW):
        assert not is_answer_correct(text, row) and reward_of(text, row) == 0.0


@given(pieces)
def test_no_text_inside_makes_a_sample_correct(inside):
    assert not is_answer_correct(f"<examples>{inside.replace('<tool_call>', '')}{RIGHT}</examples>", ROW)
    assert not is_answer_correct(f"<examples>{json.dumps([inside, RIGHT])}</examples>{THINK}", ROW)


def test_where_no_call_is_right():
    for text in ("", "No.", f"{EXAMPLES_BLOCK}{THINK}", f"{EXAMPLES_BLOCK}{THINK}I cannot sing."):
        assert is_answer_correct(text, NO_CALL) and reward_of(text, NO_CALL) == (1.01 if "<examples>" in text else 1.0)
    for text in (*UNFINISHED, GOOD, f"{THINK}<tool_call>"):
        assert not is_answer_correct(text, NO_CALL) and reward_of(text, NO_CALL) == 0.0
    assert reward_of(f"{THINK}I cannot.</think>", NO_CALL) == 0.0


@given(pieces)
@example(f"<examples>{'[' * 5000}")
def test_parsing_never_raises_and_plain_answers_are_judged_as_ever(text):
    sections = parse_sections(text)
    distinct_examples(sections.examples or [], text)
    assert answer_of(text) == sections.answer
    if not any(f"<{slash}{tag}>" in text for slash in ("", "/") for tag in ("examples", "think")):
        assert sections == Sections(None, None, text.strip(), True)
        assert is_answer_correct(text, ROW) == is_correct(text, ROW)


@fewer
@given(st.lists(weird_examples, max_size=3), st.text().filter(lambda text: "</think>" not in text), calls)
@example([], "</examples>", [{"name": "</think>", "arguments": {"<examples>": "\ud800<think>\x00"}}])
def test_what_is_rendered_is_parsed_again(examples, thought, calls):
    sections = parse_sections(render_self_exemplified(examples, thought, calls))
    assert json.dumps(sections.examples, sort_keys=True) == json.dumps(examples, sort_keys=True)
    assert sections.thought == thought.strip() and sections.in_order
    assert sections.answer == render_completion(calls).strip()


def test_rendering_in_full():
    text = render_self_exemplified(EXAMPLES[:2], "Oslo, then.", ROW.answer)
    first, second = map(json.dumps, EXAMPLES[:2])
    assert text == f"<examples>\n[{first},\n{second}]\n</examples>\n<think>\nOslo, then.\n</think>\n{RIGHT}"
    with pytest.raises(InputError, match="the thought 'a</think>b' holds '</think>'"):
        render_self_exemplified([], "a</think>b", [])
    with pytest.raises(InputError, match="the example .* must have the keys answer, question, tools"):
        render_self_exemplified([{"tools": [], "question": "q"}], "", [])


SAME = [  # pairs that count once
    (an_example("Rain in Rome?", "Rome"), an_example("Rain in Rome?", "Rome")),
    (an_example("Rain in Rome?", "Rome"), an_example(" rain  in\nROME", "rome")),
    (an_example("Rain in Rome?", "Rome"), an_example("Rain in Rome?", "Paris")),  # the same question
    (an_example("Rain in Rome?", "Rome"), an_example("Rain in Rome!!", "Paris", tools=["forecast"])),
    (an_example("Is it dry, in New York?", "New York"), an_example("Is it dry in New-York?", "new york")),
    (an_example("Will it rain in Rome today?", "Rome"), an_example("Will it snow in Rome today?", "Rome")),
    (an_example("Will it rain in Rome today?", "Rome"), an_example("Will it rain in Rome?", "Rome")),
    (an_example("Will it rain in Rome?", "Rome"), an_example("Please, will it rain in Rome?", "Rome")),
    (an_example("Rome and Paris", "Rome", "Paris"), an_example("Paris and Rome", "Paris", "Rome")),
    (an_example("a b", answer=[{"name": "f", "arguments": {"x": 1, "y": 2}}]),
     an_example("b a", answer=[{"arguments": {"y": 2, "x": 1}, "name": "f"}])),
    (an_example("ﬁnd Rome", "Rome"), an_example("find Rome", "Rome")),
]  # fmt: skip
DIFFERENT = [
    (an_example("Rain in Rome?", "Rome"), an_example("Rain in Paris?", "Paris")),
    (an_example("Will it rain in Rome today?", "Rome"), an_example("Will it rain in Paris today?", "Paris")),
    (an_example("Will it rain in Rome today?", "Rome"), an_example("Is Rome sunny?", "Rome")),
    (an_example("How warm is Rome?", "Rome"), an_example("Do I need an umbrella in Rome?", "Rome")),
    (an_example("What is 3 + 5?", answer=[{"name": "add", "arguments": {}}]),
     an_example("What is 3 - 5?", answer=[{"name": "subtract", "arguments": {}}])),
    (an_example("What is 3 plus -5 now?", answer=[{"name": "add", "arguments": {"a": 3, "b": -5}}]),
     an_example("What is 3 plus 5 now?", answer=[{"name": "add", "arguments": {"a": 3, "b": 5}}])),
    (an_example("Tell me a story"), an_example("Tell me a joke")),  # two empty answers do not count as alike
    (an_example("罗马天气", "罗马"), an_example("罗马下雨吗", "罗马")),
    (an_example("Oslo to Rome?", answer=[{"name": "fly", "arguments": {"from": "Oslo", "to": "Rome"}}]),
     an_example("Rome to Oslo?", answer=[{"name": "fly", "arguments": {"from": "Rome", "to": "Oslo"}}])),
]  # fmt: skip


@pytest.mark.parametrize("pair", SAME)
def test_trivial_edits_count_once(pair):
    assert distinct_examples(pair) == distinct_examples(pair[::-1]) == 1 == distinct_examples([*pair, *pair])


@pytest.mark.parametrize("pair", DIFFERENT)
def test_different_examples_count_each(pair):
    assert distinct_examples(pair) == distinct_examples(pair[::-1]) == 2 == distinct_examples([*pair, *pair])


NO_EXAMPLES = [
    None, 1, "x", [], {}, {"question": "q"}, an_example(7), an_example(None), an_example(""), an_example(" ?!"),
    an_example("q", tools=[]), an_example("q", tools="weather"), an_example("q", answer="Oslo"),
    an_example("q", answer={}), an_example(["q"]), an_example("q", answer=json.loads("[" * 99 + "]" * 99)),
]  # fmt: skip


@pytest.mark.parametrize("value", NO_EXAMPLES)
def test_what_is_no_example_does_not_count(value):
    assert distinct_examples([value]) == 0 and distinct_examples([value, EXAMPLES[0], value]) == 1


@fewer
@given(st.lists(weird_examples | values, max_size=4), st.none() | st.text())
@example([an_example("\ud800 q"), an_example("ª"), an_example("?" * 999)], "\ud800")
def test_counting_never_raises(examples, request):
    assert 0 <= distinct_examples(examples, request) <= len(examples)
    assert distinct_examples(examples * 2, request) == distinct_examples(examples, request)


def test_the_request_itself_is_no_example():
    assert distinct_examples(EXAMPLES) == 4
    for copied in (REQUEST, f" {REQUEST.upper()} ", REQUEST.rstrip("?")):
        copy = an_example(copied, "Oslo")
        assert distinct_examples([*EXAMPLES, copy]) == 5
        assert distinct_examples([*EXAMPLES, copy], REQUEST) == 4
        text = render_self_exemplified([*EXAMPLES[:3], copy], "", ROW.answer)
        assert reward_of(text) == reward_of(text, CHAT_ROW) == 1.0
        assert reward_of(text, distinct=False) == 1.01


def test_counting_and_parsing_are_linear():
    def seconds(function, *arguments):
        best = float("inf")
        for _ in range(3):
            begin = time.process_time()
            function(*arguments)
            best = min(best, time.process_time() - begin)
        return best

    def made(n):
        return [an_example(f"Is number {i} of the cities of the world {i * i} warm?", "x") for i in range(n)]

    assert seconds(distinct_examples, made(2000)) < 40 * seconds(distinct_examples, made(200))
    for hostile in ("!", "a!", " ", "<think></think>", '<tool_call>["', "<examples>[", f"{RIGHT}<think>", "</think>"):
        few, many = hostile * 500, hostile * 10_000
        assert seconds(parse_sections, many) < 80 * seconds(parse_sections, few) + 0.05
        counted = [[an_example(f"a{question}")] for question in (few, many)]
        assert seconds(distinct_examples, counted[1]) < 80 * seconds(distinct_examples, counted[0]) + 0.05


def reward_of(text, row=ROW, **settings):
    class Written:
        ids = [1]
        messages = [{"role": "assistant", "content": text}]

    Written.text = text
    (reward,) = RewardFunctions(SelfExemplifyingReward(**settings))([row], [Written]).total
    return reward


def test_the_reward():
    wrong = render_completion(calls_for("Bergen"))
    three = f"<examples>{json.dumps(EXAMPLES[:3])}</examples>"
    edited = f"<examples>{json.dumps([*EXAMPLES[:3], an_example('how hot does it get in CAIRO', 'Cairo')])}</examples>"
    cases = [
        (GOOD, 1.01),
        (f"{EXAMPLES_BLOCK}{RIGHT}", 1.01),
        (f"{THINK}{RIGHT}", 1.0),
        (RIGHT, 1.0),
        (f"{three}{THINK}{RIGHT}", 1.0),
        (f"{edited}{THINK}{RIGHT}", 1.0),
        (f"{EXAMPLES_BLOCK}{THINK}{wrong}", 0.0),
        (f"{EXAMPLES_BLOCK}{THINK}{RIGHT}{RIGHT}", 0.0),
        (f"{EXAMPLES_BLOCK}{THINK}", 0.0),
        ("", 0.0),
    ]
    for text, expected in cases:
        assert reward_of(text) == reward_of(text, CHAT_ROW) == reward_of(text, LOOSE_ROW) == expected
    assert reward_of(f"{edited}{THINK}{RIGHT}", distinct=False) == 1.01
    assert reward_of(f"{three}{THINK}{RIGHT}", more_than=2, bonus=0.5) == 1.5
    folded = GOOD.replace(RIGHT, RIGHT.replace("Oslo", "oslo norway"))
    assert reward_of(folded, LOOSE_ROW) == 1.01 and reward_of(folded) == 0.0
    assert RewardFunctions(SelfExemplifyingReward()).names == ["self_exemplifying_reward"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bonus": -0.01}, "bonus=-0.01 must be"),
        ({"bonus": float("nan")}, "bonus=nan must be"),
        ({"bonus": float("inf")}, "bonus=inf must be"),
        ({"more_than": -1}, "more_than=-1 must be"),
        ({"more_than": 3.0}, "more_than=3.0 must be"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        SelfExemplifyingReward(**settings)


def test_the_instructions_ask_for_what_the_reward_wants():
    for part in ("<examples></examples>", "<think></think>", "<tool_call></tool_call>", '"tools"', '"question"',
                 '"answer"', '"name"', '"arguments"', "at least 4 different"):  # fmt: skip
        assert part in INSTRUCTIONS
    assert len(INSTRUCTIONS) < 700


IN_EACH_FORM = [  # a text, whether it is right, what it earns
    ("{ex}\n{think}\n{calls}", True, 1.01),
    ("{think}{calls}", True, 1.0),
    ("{calls}", True, 1.0),
    ("{calls}{ex}", True, 0.0),
    ("Sure! {calls}", True, 0.0),
    ("{ex}{think}<think>{calls}</think>", False, 0.0),
    ("<examples>[{calls}]</examples>{think}", False, 0.0),
    ("{ex}<think>{calls}</think>", False, 0.0),
    ("{ex}<think>{calls}", False, 0.0),
    ("{ex}{think}{calls}<think>", False, 0.0),
    ("{ex}{think}{opened}<think>{calls}</think>", False, 0.0),
    ("{ex}{think}{opened}{ex}{calls}", False, 0.0),
]


@pytest.mark.parametrize("name", FORMATS)
def test_answers_in_each_form(name):
    form = FORMATS[name]
    tagged = calls_for("</think>", "<examples>[", '"<think></examples>')
    for calls, row in ((calls_for("Oslo"), ROW), (tagged, Row("t", REQUEST, TOOLS, tagged))):
        text = render_completion(calls, form)
        parts = {"ex": EXAMPLES_BLOCK, "think": THINK, "calls": text, "opened": text[:-9]}
        for template, right, reward in IN_EACH_FORM:
            written = template.format(**parts)
            assert is_answer_correct(written, row, form) == right, written
            assert reward_of(written, row, tool_format=form) == reward, written
    written = render_self_exemplified(EXAMPLES, "Hm.", tagged, form)
    assert parse_sections(written, form) == Sections(EXAMPLES, "Hm.", render_completion(tagged, form), True)
    assert reward_of(f"{EXAMPLES_BLOCK}{THINK}I cannot sing.", NO_CALL, tool_format=form) == 1.01
    assert reward_of(f"{EXAMPLES_BLOCK}{THINK}{written}", NO_CALL, tool_format=form) == 0.0


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=30)
@given(text=pieces)
def test_any_text_is_survived_in_each_form(name, text):
    form = FORMATS[name]
    sections = parse_sections(text, form)
    assert answer_of(text, form) == sections.answer
    if not any(f"<{slash}{tag}>" in text for slash in ("", "/") for tag in ("examples", "think")):
        assert sections == Sections(None, None, text.strip(), True)
    assert not is_answer_correct(f"<examples>{json.dumps([text])}</examples>{THINK}", ROW, form)


def test_malformed_calls_make_an_answer_wrong_whatever_follows():
    """Cutting a section out of them must not repair them."""
    cut = "<tool_call>" + json.dumps({"name": "weather", "arguments": {"city": "<think></think>"}}) + "</tool_call>"
    row = Row("t", REQUEST, TOOLS, calls_for("<think></think>"))
    assert is_answer_correct(cut, row)
    assert not is_answer_correct(cut.replace("<think>", '<think>"'), row)


def test_instructions_name_the_form():
    assert instructions() == instructions(FORMATS["hermes"]) == INSTRUCTIONS
    assert INSTRUCTIONS.endswith(
        "request.\n3. Your answer: one <tool_call></tool_call> block with one JSON object for each call."
    )
    assert len({instructions(form) for form in FORMATS.values()}) == len(FORMATS)
    for form in FORMATS.values():
        assert all(
            marker in instructions(form) for marker in form.markers if marker not in ("<|python_tag|>", "[CALL_ID]")
        )
