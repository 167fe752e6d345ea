import importlib.util
import json
import re
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall import Row, parse_calls, render_completion, render_prompt, render_text

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather.get",
            "description": 'The "weather" in <Zürich> & elsewhere.',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}},
]
CALLS = [{"name": "weather.get", "arguments": {"city": "Zürich"}}, {"name": "ping", "arguments": {}}]
ROW = Row("r", "Weather in Zürich?", TOOLS, CALLS)
SYSTEM_ROW = Row(
    "s", [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ping?"}], TOOLS, CALLS[1:]
)
DEMONSTRATIONS = [
    SYSTEM_ROW,
    Row("d", "Weather in Oslo?", TOOLS, [{"name": "weather.get", "arguments": {"city": "Oslo"}}]),
]
SHOWN = """Example:
Ping?
<tool_call>
{"name": "ping", "arguments": {}}
</tool_call>
Example:
Weather in Oslo?
<tool_call>
{"name": "weather.get", "arguments": {"city": "Oslo"}}
</tool_call>"""
QWEN_TOOLS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather.get", "description": "The \\"weather\\" in <Zürich> & elsewhere.", \
"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
{"type": "function", "function": {"name": "ping", "parameters": {"type": "object", "properties": {}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
WITH_TOOLS = (
    "{% if messages[0].role == 'system' %}[{{ messages[0].content }}]{% endif %}"
    "{% for tool in tools or [] %}<{{ tool.function.name }}: {{ tool | tojson }}>{% endfor %}"
    "{% if tools %}Call them as <tool_call>.{% endif %}"
    "{% for message in messages if message.role != 'system' %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
# Like SmolLM2's: no tools, and a default system message if the conversation has none.
WITHOUT_TOOLS = (
    "{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nDefault.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{{ messages }}"


def tokenizer_with(template):
    """A tokenizer of bytes with ChatML's markers as special tokens; adds a bos token unless told not to."""
    vocabulary = {piece: n for n, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = "<|bos|>"
    tokenizer.add_special_tokens([bos])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def official_template():
    """Qwen3's chat template, quoted by bfcl-eval in its handler for these models."""
    spec = importlib.util.find_spec("bfcl_eval")
    if spec is None:
        pytest.skip("bfcl-eval, which quotes the official Qwen template, is not installed")
    path = Path(spec.submodule_search_locations[0], "model_handler", "local_inference", "qwen_fc.py")
    quoted = re.search(r'"chat_template":\n(.*?)\n\s*"""', path.read_text(encoding="utf-8"), re.DOTALL)
    return textwrap.dedent(quoted[1])


def test_a_template_with_tools_is_used_as_it_is():
    tokenizer = tokenizer_with(WITH_TOOLS)
    for row in (ROW, SYSTEM_ROW):
        keywords = {"tools": TOOLS, "add_generation_prompt": True}
        assert render_text(tokenizer, row) == tokenizer.apply_chat_template(row.messages, tokenize=False, **keywords)
        ids = tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=False, **keywords)
        assert render_prompt(tokenizer, row) == ids
    text = render_text(tokenizer, ROW)
    assert text.startswith("<weather.get: {") and text.endswith("user: Weather in Zürich?\nassistant:")


def test_the_official_template_is_used_and_the_fallback_equals_it():
    official = tokenizer_with(official_template())
    keywords = {"tools": TOOLS, "add_generation_prompt": True, "tokenize": False}
    for row in (ROW, SYSTEM_ROW):
        expected = official.apply_chat_template(row.messages, **keywords)
        assert render_text(official, row) == expected
        assert render_text(tokenizer_with(WITHOUT_TOOLS), row) == expected
        assert render_text(tokenizer_with(None), row) == f"<|bos|>{expected}"
        assert render_prompt(tokenizer_with(None), row)[1:] == render_prompt(official, row)
        demonstrated = render_text(official, row, DEMONSTRATIONS)
        assert render_text(tokenizer_with(WITHOUT_TOOLS), row, DEMONSTRATIONS) == demonstrated


def test_completions_are_written_as_the_official_template_writes_them():
    official = tokenizer_with(official_template())
    reply = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in CALLS]}
    followed = [*ROW.messages, reply, {"role": "user", "content": "Thanks"}]
    assert f"assistant\n{render_completion(CALLS)}<|im_end|>\n" in official.apply_chat_template(
        followed, tokenize=False
    )


@pytest.mark.parametrize("template", [WITHOUT_TOOLS, None])
def test_the_fallback_in_full(template):
    tokenizer = tokenizer_with(template)
    begin = "" if template else "<|bos|>"  # the tokenizer puts this before any text
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert render_text(tokenizer, ROW) == (
        f"{begin}<|im_start|>system\n{QWEN_TOOLS}<|im_end|>\n" + turn.format("Weather in Zürich?")
    )
    assert render_text(tokenizer, SYSTEM_ROW, DEMONSTRATIONS[1:]) == (
        f"{begin}<|im_start|>system\nBe brief.\n\n{SHOWN[SHOWN.rindex('Example') :]}\n\n{QWEN_TOOLS}<|im_end|>\n"
        + turn.format("Ping?")
    )
    ids = render_prompt(tokenizer, ROW)
    assert tokenizer.decode(ids) == render_text(tokenizer, ROW)
    assert ids.count(tokenizer.bos_token_id) == (template is None)


def test_demonstrations_join_the_system_message():
    tokenizer = tokenizer_with(WITH_TOOLS)
    assert render_text(tokenizer, ROW, DEMONSTRATIONS).startswith(f"[{SHOWN}]<weather.get: ")
    assert render_text(tokenizer, SYSTEM_ROW, DEMONSTRATIONS).startswith(f"[Be brief.\n\n{SHOWN}]<weather.get: ")
    assert SYSTEM_ROW.messages[0]["content"] == "Be brief."


def test_instructions_come_before_demonstrations():
    tokenizer = tokenizer_with(WITH_TOOLS)
    told = "Think first."
    assert render_text(tokenizer, ROW, instructions=told).startswith(f"[{told}]<weather.get: ")
    assert render_text(tokenizer, SYSTEM_ROW, DEMONSTRATIONS, told).startswith(f"[Be brief.\n\n{told}\n\n{SHOWN}]<")
    assert SYSTEM_ROW.messages[0]["content"] == "Be brief."
    assert render_text(tokenizer_with(None), SYSTEM_ROW, DEMONSTRATIONS, told) == (
        f"<|bos|><|im_start|>system\nBe brief.\n\n{told}\n\n{SHOWN}\n\n{QWEN_TOOLS}<|im_end|>\n"
        "<|im_start|>user\nPing?<|im_end|>\n<|im_start|>assistant\n"
    )
    official = tokenizer_with(official_template())
    for row in (ROW, SYSTEM_ROW):
        expected = render_text(official, row, DEMONSTRATIONS, told)
        assert told in expected and render_text(tokenizer_with(WITHOUT_TOOLS), row, DEMONSTRATIONS, told) == expected
        ids = render_prompt(official, row, DEMONSTRATIONS, told)
        assert official.decode(ids) == expected
        assert render_text(official, row, instructions="") == render_text(official, row)


def test_a_changed_template_is_noticed():
    tokenizer = tokenizer_with(WITHOUT_TOOLS)
    assert "# Tools" in render_text(tokenizer, ROW)
    tokenizer.chat_template = WITH_TOOLS
    assert "# Tools" not in render_text(tokenizer, ROW)


def test_a_row_without_tools_has_no_tool_prompt():
    row = Row("n", "Hello", [], [])
    assert "Tools" not in render_text(tokenizer_with(None), row)
    assert render_text(tokenizer_with(WITH_TOOLS), row) == "user: Hello\nassistant:"


def test_a_template_that_refuses_a_rows_own_system_message_is_named():
    with pytest.raises(InputError, match="refuses messages of the roles system, user .*no system role"):
        render_text(tokenizer_with(NO_SYSTEM), SYSTEM_ROW)


def test_completion():
    text = (
        '<tool_call>\n{"name": "weather.get", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
    )
    assert render_completion(ROW) == render_completion(CALLS) == text
    assert parse_calls(text) == CALLS and render_completion([]) == ""
    swapped = [{"arguments": {"a": "b"}, "name": "f"}]
    assert json.loads(render_completion(swapped).split("\n")[1]) == swapped[0]
    assert render_completion(swapped).startswith('<tool_call>\n{"name"')
