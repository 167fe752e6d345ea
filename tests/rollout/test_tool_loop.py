"""The tool loop, episodes of several turns: model input, trained tokens, ends, and independence of the batch."""

import json
import random
import threading

import pytest
import torch

from tests.ops.cases import DEVICE
from tests.toolcall.test_chat import tokenizer_with
from toolx_kernels.engine import Completion, Group, RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.models.bridge import head_of, toolx_attention
from toolx_kernels.models.tiny import tiny_model, tiny_tokenizer
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.single_turn import SingleTurn
from toolx_kernels.rollout.tool_loop import MALFORMED, ToolLoop, supervised_episode
from toolx_kernels.toolcall.chat import Chat, render_text
from toolx_kernels.toolcall.parse import Reading
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.update.batch import PackedGroup, pack

TOKENIZER = tiny_tokenizer()
CHAT = Chat(TOKENIZER)
END = TOKENIZER.eos_token_id
PARAMS = SamplingParams(400, stop_token_ids=(END,))
ROWS = [Row(f"row {i}", f"Please find the number {i}.", [], []) for i in range(3)]


def find(guest: str) -> int:
    """Find a number.

    Args:
        guest: Whose.
    """
    return {"Norville": 347, "Belton": 512}[guest]


def calls(*values, name="find", key="guest"):
    blocks = ({"name": name, "arguments": {key: value}} for value in values)
    return "\n".join(f"<tool_call>\n{json.dumps(block)}\n</tool_call>" for block in blocks)


class Scripted:
    """Stand-in for the engine: answers with ``script[row id, rollout]`` turn by turn, within the given limits."""

    def __init__(self, script, tokenizer=TOKENIZER):
        self.script, self.tokenizer = {key: list(turns) for key, turns in script.items()}, tokenizer
        self.asked = []

    def generate(self, prompts, n, params, *, row_ids, step, first_rollout, limits, on_completion):
        self.asked.append((prompts, n, step, list(zip(row_ids, first_rollout, limits, strict=True))))
        groups = []
        for place, prompt in enumerate(prompts):
            cancelled, completions = False, []
            for index in range(first_rollout[place], first_rollout[place] + n):
                ids = self.tokenizer(self.script[row_ids[place], index].pop(0), add_special_tokens=False)["input_ids"]
                ids = [*ids, params.stop_token_ids[0]]
                reason = "stop" if len(ids) <= limits[place] else "length"
                ids = ids[:1] if cancelled else ids[: limits[place]]
                numbers = [-0.25] * len(ids)
                completion = Completion(ids, numbers, numbers, numbers, numbers, "cancelled" if cancelled else reason)
                cancelled = cancelled or on_completion(place, index, completion)
                completions.append(completion)
            groups.append(Group(prompt, completions))
        return groups


def sample(script, *, rows=ROWS[:1], n=1, params=PARAMS, on_rollout=None, first_rollout=0, context=1024, **options):
    engine = Scripted(script)
    options = {"tools": [find], "max_turns": 4, "tool_timeout": 5} | options
    loop = ToolLoop(engine, Prompts(CHAT, context), **options)
    rows = loop.offer(rows)
    prompts = [CHAT.prompt_ids(row) for row in rows]
    rollouts = loop.roll_out(
        rows, prompts, n, params, row_ids=range(len(rows)), step=7, first_rollout=first_rollout, on_rollout=on_rollout
    )
    return rollouts, engine, prompts


# ---- one episode


def test_an_episode_is_the_conversation_as_the_template_shows_it():
    turns = [calls("Norville", "Belton"), calls("Belton"), "512 it is."]
    ((rollout,),), engine, (prompt,) = sample({(0, 0): turns})
    messages = [
        {"role": "assistant", "content": turns[0]},
        {"role": "tool", "name": "find", "content": "347"},
        {"role": "tool", "name": "find", "content": "512"},
        {"role": "assistant", "content": turns[1]},
        {"role": "tool", "name": "find", "content": "512"},
        {"role": "assistant", "content": turns[2]},
    ]
    assert rollout.messages == messages
    assert rollout.text == "\n".join(turns)
    assert rollout.finish_reason == "stop"
    user = {"role": "user", "content": ROWS[0].prompt}
    loop = ToolLoop(engine, Prompts(CHAT, 99), tools=[find], max_turns=1, tool_timeout=1)
    offered = loop.offer(ROWS[:1])[0].tools
    for n_messages, (prompts, n, _, _) in zip((0, 3, 5), engine.asked, strict=True):
        seen = render_text(TOKENIZER, Row("", [user, *messages[:n_messages]], offered, []))
        assert TOKENIZER.decode(prompts[0]) == seen and n == 1
    written = [token for token, own in zip(rollout.ids, rollout.mask, strict=True) if own]
    expected = [t for turn in turns for t in (*TOKENIZER(turn, add_special_tokens=False)["input_ids"], END)]
    assert written == expected, "what was sampled stays as it was, end-of-turn tokens included"
    for numbers in (rollout.logprobs, rollout.entropies):
        assert numbers == [-0.25 if own else 0.0 for own in rollout.mask]
    assert engine.asked[1][0][0] == prompt + rollout.ids[: len(engine.asked[1][0][0]) - len(prompt)]


def test_an_episode_to_imitate_has_the_tokens_of_a_sampled_one():
    ((rollout,),), _, _ = sample({(0, 0): [calls("Norville", "Belton"), calls("Belton"), "512."]})
    assert supervised_episode(CHAT, ROWS[0], [], rollout.messages) == (rollout.ids, rollout.mask)
    assert supervised_episode(CHAT, ROWS[0], [], rollout.messages[-1:])[1] == [True] * 4  # 51 2 . <|end|>
    for wrong in ([], rollout.messages[:2], rollout.messages[1:], rollout.messages[:1] * 2):
        with pytest.raises(InputError, match="row 'row 0' have the roles"):
            supervised_episode(CHAT, ROWS[0], [], wrong)


def test_the_token_that_stopped_a_turn_is_no_part_of_its_text():
    """This holds for each of several stop tokens, for example an end of message named only in the generation config."""
    ping = TOKENIZER.convert_tokens_to_ids("<0x41>")  # it would be visible in the text
    params = SamplingParams(400, stop_token_ids=(ping, END))

    class Ends(Scripted):
        def generate(self, prompts, n, params, *, on_completion=None, limits=(99,), **keywords):
            ids = [*self.tokenizer("No.", add_special_tokens=False)["input_ids"], ping]
            completion = Completion(ids, [-1.0] * len(ids), [0.0] * len(ids), [], [], "stop")
            if on_completion:
                on_completion(0, 0, completion)
            return [Group(prompts[0], [completion])]

    prompt, keywords = CHAT.prompt_ids(ROWS[0]), {"row_ids": [0], "first_rollout": [0]}
    loop = ToolLoop(Ends({}), Prompts(CHAT, 99), tools=[find], max_turns=2, tool_timeout=1)
    for rollouter in (SingleTurn(Ends({}), CHAT), loop):
        ((rollout,),) = rollouter.roll_out(loop.offer(ROWS[:1]), [prompt], 1, params, **keywords)
        assert rollout.text == "No." and rollout.ids[-1] == ping and len(rollout.ids) > 1


def test_a_single_turn_has_no_mask():
    ((rollout,),), engine, _ = sample({(0, 0): ["No."]})
    assert rollout.mask is None and rollout.finish_reason == "stop" and len(engine.asked) == 1


def test_the_turn_limit_ends_an_episode_before_its_calls_run():
    ran = []

    def note(guest: str) -> str:
        """Note.

        Args:
            guest: Who.
        """
        ran.append(guest)
        return "yes"

    script = {(0, 0): [calls("a", name="note"), calls("b", name="note"), "unreached"]}
    ((rollout,),), _, _ = sample(script, tools=[note], max_turns=2)
    assert (rollout.finish_reason, ran) == ("turns", ["a"])
    assert rollout.messages[-1]["content"] == calls("b", name="note")
    ((rollout,),), _, _ = sample({(0, 0): [calls("a", name="note")]}, tools=[note], max_turns=1)
    assert (rollout.finish_reason, rollout.mask, ran) == ("turns", None, ["a"])


def test_errors_are_read_by_the_model():
    turns = ["<tool_call>{", calls("Nobody") + calls("x", name="fly"), "I give up."]
    ((rollout,),), _, _ = sample({(0, 0): turns})
    texts = [message["content"] for message in rollout.messages if message["role"] == "tool"]
    assert texts == [MALFORMED, '{"error": "KeyError: \'Nobody\'"}', '{"error": "there is no tool fly"}']
    assert rollout.finish_reason == "stop"


def test_lone_surrogates_in_names_errors_and_openings_become_question_marks():
    def shout(guest: str) -> str:
        """Fails.

        Args:
            guest: Who.
        """
        raise ValueError("no \ud800")

    turns = [calls("a", name="fly\ud800") + calls("b", name="shout"), "I give up."]
    ((rollout,),), _, _ = sample({(0, 0): turns}, tools=[shout])
    heard = [(m["name"], m["content"]) for m in rollout.messages if m["role"] == "tool"]
    assert heard == [("fly?", '{"error": "there is no tool fly?"}'), ("shout", '{"error": "ValueError: no ?"}')]

    class Door:
        def reset(self) -> str:
            return " Open \udfff."

        def knock(self) -> str:
            """Knocks."""

    (_,), engine, _ = sample({(0, 0): ["No."]}, tools=(), environment_factory=Door)
    assert "Open ?." in TOKENIZER.decode(engine.asked[0][0][0])


def test_the_whole_completion_is_bounded_and_results_that_do_not_fit_are_left_out():
    script = [calls("Norville"), calls("Belton"), "done."]
    ((whole,),), _, (prompt,) = sample({(0, 0): script})
    ends = [i + 1 for i, own in enumerate(whole.mask) if own and whole.ids[i] == END]  # ends of the turns, in tokens
    starts = [0] + [end + whole.mask[end:].index(True) for end in ends[:-1]]
    for bound, reason, length, n_messages in [
        (len(whole.ids), "stop", len(whole.ids), 5),
        (len(whole.ids) - 1, "length", len(whole.ids) - 1, 5),  # the last turn is cut
        (starts[2] + 1, "length", starts[2] + 1, 5),
        (starts[2], "length", ends[1], 3),  # no room after the second result
        (ends[1], "length", ends[1], 3),
        (ends[1] - 1, "length", ends[1] - 1, 3),
        (3, "length", 3, 1),
    ]:
        params = SamplingParams(bound, stop_token_ids=(END,))
        ((rollout,),), _, _ = sample({(0, 0): script}, params=params)
        assert (rollout.finish_reason, rollout.ids, len(rollout.messages)) == (reason, whole.ids[:length], n_messages)
        assert len(rollout.ids) == len(rollout.logprobs) == len(rollout.entropies) == len(rollout.mask or rollout.ids)
    for room, reason, length in [(starts[2] + 1, "stop", len(whole.ids)), (starts[2], "length", ends[1])]:
        ((rollout,),), _, _ = sample({(0, 0): script}, context=len(prompt) + room)
        assert (rollout.finish_reason, rollout.ids) == (reason, whole.ids[:length])


# ---- many episodes


def test_all_episodes_take_a_turn_together_each_with_its_own_stream_and_limit():
    script = {
        (0, 5): [calls("Norville"), "one."], (0, 6): ["two."],
        (1, 5): [calls("Belton"), calls("Belton"), "three."], (1, 6): [calls("Belton", "Norville"), "four."],
    }  # fmt: skip
    rollouts, engine, prompts = sample(script, rows=ROWS[:2], n=2, first_rollout=5)
    assert [[r.text.split("\n")[-1] for r in group] for group in rollouts] == [["one.", "two."], ["three.", "four."]]
    assert [(len(asked), n, step) for asked, n, step, _ in engine.asked] == [(2, 2, 7), (3, 1, 7), (1, 1, 7)]
    assert engine.asked[0][3] == [(0, 5, 400), (1, 5, 400)]
    longer = [len(prompt) - len(prompts[place]) for prompt, place in zip(engine.asked[1][0], (0, 1, 1), strict=True)]
    assert engine.asked[1][3] == [(0, 5, 400 - longer[0]), (1, 5, 400 - longer[1]), (1, 6, 400 - longer[2])]


def test_calls_of_all_episodes_run_at_once_and_each_for_a_limited_time():
    barrier = threading.Barrier(8)

    def meet(seconds: float) -> str:
        """Waits for the others.

        Args:
            seconds: How long.
        """
        barrier.wait(seconds)
        return "yes"

    waits = calls(10, 10, name="meet", key="seconds")
    rollouts, _, _ = sample({(0, i): [waits, "ok"] for i in range(4)}, n=4, tools=[meet], tool_timeout=10)
    assert all(m["content"] == "yes" for r in rollouts[0] for m in r.messages[1:3])
    ((rollout,),), _, _ = sample({(0, 0): [waits, "ok"]}, tools=[meet], tool_timeout=0.1)
    assert [m["content"] for m in rollout.messages[1:3]] == ['{"error": "TimeoutError: no answer within 0.1 s"}'] * 2
    assert rollout.finish_reason == "stop"


def test_a_group_is_cancelled_when_its_callback_says_so():
    script = {
        (0, 0): [calls("Norville"), "no."], (0, 1): ["yes."], (0, 2): ["never heard of"],
        (1, 0): [calls("Norville"), "yes."], (1, 1): [calls("Norville"), "no."], (1, 2): [calls("Norville")] * 2,
        (2, 0): ["no."], (2, 1): [calls("Norville"), "no."], (2, 2): ["no."],
    }  # fmt: skip
    heard = []

    def on_rollout(place, index, rollout):
        heard.append((place, index, rollout.text.split("\n")[-1]))
        return rollout.text.endswith("yes.")

    rollouts, engine, _ = sample(script, rows=ROWS, n=3, on_rollout=on_rollout)
    reasons = [[r.finish_reason for r in group] for group in rollouts]
    assert reasons == [["cancelled", "stop", "cancelled"], ["stop", "stop", "cancelled"], ["stop", "stop", "stop"]]
    first_turn = [(0, 1, "yes."), (2, 0, "no."), (2, 2, "no.")]
    assert heard == first_turn + [(1, 0, "yes."), (1, 1, "no."), (2, 1, "no.")]
    assert [len(asked) for asked, *_ in engine.asked] == [3, 4], "a cancelled episode takes no further turn"
    assert [len(r.ids) for r in rollouts[0]][2] == 1, "what was sampled of it counts"
    assert all(len(r.ids) == len(r.logprobs) for group in rollouts for r in group)


class Door:
    """Opens with the row's key."""

    def reset(self, key, **columns):
        self.key, self.tries = key, 0
        return f" The key has {len(key)} letters."

    def turn(self, key: str) -> str:
        """Try a key.

        Args:
            key: The key.
        """
        self.tries += 1
        return f"{'open' if key == self.key else 'shut'} after {self.tries}"


def test_every_episode_has_an_environment_of_its_own():
    rows = [Row("a", "Go.", [], [], {"key": "abc"}), Row("b", "Go.", [], [], {"key": "xy"})]
    tries = [calls("xy", "abc", name="turn", key="key"), calls("xy", name="turn", key="key"), "ok"]
    script = {(row, i): tries for row in (0, 1) for i in (0, 1)}
    rollouts, engine, _ = sample(script, rows=rows, n=2, tools=(), environment_factory=Door)
    heard = [[[m["content"] for m in r.messages if m["role"] == "tool"] for r in group] for group in rollouts]
    assert heard[0] == [["shut after 1", "open after 2", "shut after 3"]] * 2
    assert heard[1] == [["open after 1", "shut after 2", "open after 3"]] * 2
    assert "Go. The key has 3 letters.<|end|>" in TOKENIZER.decode(engine.asked[0][0][0])


def test_at_least_one_turn():
    with pytest.raises(InputError, match="max_turns=0"):
        sample({}, max_turns=0)


def test_a_template_without_the_assistants_text_is_refused():
    tokenizer = tokenizer_with("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(InputError, match="does not show the assistant's text"):
        ToolLoop(Scripted({}), Prompts(Chat(tokenizer), 99), tools=[find], max_turns=2, tool_timeout=1)


# ---- chat templates

QWEN = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'tool' %}{% if messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('roles') }}{% endif %}"
)
ALTERNATING += NO_TOOLS.removeprefix("{% for m in messages %}")
PLAIN = "{{ tools or '' }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
RESULTS = [
    {"role": "tool", "name": "f", "content": "one <|im_end|>"},
    {"role": "tool", "name": "g", "content": "zwei ü"},
]
BLOCKS = "<tool_response>\none <|im_end|>\n</tool_response>\n<tool_response>\nzwei ü\n</tool_response>"


@pytest.mark.parametrize(
    "template, expected",
    [
        (QWEN, f"\n<|im_start|>user\n{BLOCKS}<|im_end|>\n<|im_start|>assistant\n"),
        (NO_TOOLS, f"\n<|im_start|>user\n{BLOCKS}<|im_end|>\n<|im_start|>assistant\n"),
        (ALTERNATING, f"\n<|im_start|>user\n{BLOCKS}<|im_end|>\n<|im_start|>assistant\n"),
        (None, f"\n<|im_start|>user\n{BLOCKS}<|im_end|>\n<|im_start|>assistant\n"),
        (PLAIN, "\ntool: one <|im_end|>\ntool: zwei ü\nassistant: "),
    ],
    ids=["qwen", "no tools", "alternating", "no template", "no end"],
)
def test_what_stands_between_two_turns(template, expected):
    tokenizer = tokenizer_with(template)
    chat = Chat(tokenizer, "hermes")
    assert tokenizer.decode(chat.tool_turn_ids(RESULTS)) == expected
    if template == QWEN:
        conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bye"}]
        before = chat.prompt_ids(Row("", conversation, [], []))
        header = tokenizer("\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        whole = chat.prompt_ids(Row("", conversation + RESULTS, [], []))
        assert before[: -len(header)] + chat.tool_turn_ids(RESULTS) == whole


# ---- the real engine


def test_prompts_of_one_call_may_have_rollouts_and_limits_of_their_own():
    model = tiny_model(TOKENIZER, 0).to(DEVICE).eval()
    engine, prompts, params = RolloutEngine(model), [[7, 8, 9], [9, 9], [300]], SamplingParams(12)
    single = [
        engine.generate([prompt], 2, params, row_ids=[row], first_rollout=first)[0].completions
        for row, (prompt, first) in enumerate(zip(prompts, (4, 0, 9), strict=True))
    ]
    together = engine.generate(prompts, 2, params, first_rollout=[4, 0, 9], limits=[5, 99, 1])
    for group, alone, limit in zip(together, single, (5, 12, 1), strict=True):
        assert [c.ids for c in group.completions] == [c.ids[:limit] for c in alone]
    for wrong, message in [
        ({"first_rollout": [1, 2]}, "2 first_rollout for 3 prompts"),
        ({"first_rollout": [1, 2, "x"]}, "first_rollout='x' must"),
        ({"first_rollout": [1, 2, 2**32 - 1]}, "last_rollout=4294967296 must"),
        ({"limits": [1, 2]}, "2 limits for 3 prompts"),
        ({"limits": [1, 0, 2]}, r"Prompt 1 \(row 1\) has a limit of 0"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.generate(prompts, 2, params, **wrong)
    small = RolloutEngine(model, page_size=4, max_pages=3)
    longer = [prompt + completion.ids[:5] for prompt, (completion, _) in zip(prompts, single, strict=True)]
    assert small.generate(longer, 1, SamplingParams(12), limits=[4, 5, 6])[0].completions[0].ids, "only what is left"


def test_episodes_of_a_real_model_depend_on_their_streams_alone_and_train_as_sampled(monkeypatch):
    """A random model makes no calls, so ``read`` treats each of its turns as a call."""

    def read(self, text):
        return Reading(None, [{"name": "echo", "arguments": {"text": text[:20]}}], True)

    monkeypatch.setattr(Chat, "read", read)

    def echo(text: str) -> str:
        """Gives a text back.

        Args:
            text: The text.
        """
        return text[::-1]

    model = tiny_model(TOKENIZER, 0).to(DEVICE).eval()
    stops = (END, *random.Random(0).sample(range(6, len(TOKENIZER)), 120))
    params = SamplingParams(90, temperature=1.0, stop_token_ids=stops)

    def episodes(rows, row_ids, n=2, first_rollout=0, **engine):
        loop = ToolLoop(
            RolloutEngine(model, **engine),
            Prompts(CHAT, 1024),
            tools=[echo],
            max_turns=3,
            tool_timeout=5,
        )
        rows = loop.offer(rows)
        prompts = [CHAT.prompt_ids(row) for row in rows]
        return prompts, loop.roll_out(rows, prompts, n, params, row_ids=row_ids, step=3, first_rollout=first_rollout)

    prompts, expected = episodes(ROWS, [4, 5, 6])
    flat = [rollout for group in expected for rollout in group]
    assert {r.finish_reason for r in flat} <= {"turns", "length"}
    assert sum(len(r.messages) == 5 for r in flat) >= 4, "three turns with two results in between"
    assert len({tuple(r.ids) for r in flat}) == len(flat)
    _, backwards = episodes(ROWS[::-1], [6, 5, 4], page_size=4)
    alone = [episodes([row], [row_id])[1][0] for row, row_id in zip(ROWS, (4, 5, 6), strict=True)]
    _, seconds = episodes(ROWS, [4, 5, 6], n=1, first_rollout=1)
    for other in (
        backwards[::-1],
        alone,
        [[group[0], again[0]] for group, again in zip(expected, seconds, strict=True)],
    ):
        for rollout, same in zip(flat, (r for group in other for r in group), strict=True):
            assert (rollout.ids, rollout.mask, rollout.messages) == (same.ids, same.mask, same.messages)

    groups = [
        PackedGroup(prompt, [r.ids for r in group], [r.mask for r in group])
        for prompt, group in zip(prompts, expected, strict=True)
    ]
    batch = pack(groups, DEVICE)
    with toolx_attention(model), torch.no_grad():
        trained = linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs
    sampled = torch.tensor([logp for r in flat for logp in r.logprobs], device=DEVICE)
    assert (~batch.mask).sum() > 20
    torch.testing.assert_close(trained[batch.mask], sampled[batch.mask], rtol=0, atol=1e-4)
    assert (sampled[~batch.mask] == 0).all()
