"""The tiny model and its tokenizer."""

from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolx_kernels.models.tiny import tiny_config, tiny_model, tiny_tokenizer
from toolx_kernels.toolcall.chat import Chat, render_prompt, render_text
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.parse import parse_calls
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.tool_format import render_completion

ROWS = builtin.train_rows(200, seed=0) + builtin.heldout_rows(200, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def byte_tokens(tokenizer, ids):
    return [t for t in tokenizer.convert_ids_to_tokens(ids) if t.startswith("<0x")]


def test_completions_round_trip_exactly(tokenizer):
    calls = [{"name": "find_hotel", "arguments": {"city": "Norville", "amount": 347}}]
    text = '<tool_call>\n{"name": "find_hotel", "arguments": {"city": "Norville", "amount": 347}}\n</tool_call>'
    assert render_completion(calls) == text
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        '<tool_call>\n{"name": "', "find", "_", "hotel", '", "arguments": {"', "city", '": "', "Nor", "ville", '", "',
        "amount", '": ', "34", "7", "}}\n</tool_call>",
    ]  # fmt: skip
    assert tokenizer.decode(ids) == text
    for row in ROWS:
        text = render_completion(row)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) <= 45
        assert parse_calls(tokenizer.decode(ids)) == row.answer


def test_the_task_needs_no_byte_tokens(tokenizer):
    chat = Chat(tokenizer)
    for example in islice(builtin.cold_start_examples(1), builtin.COLD_EASY_EXAMPLES - 200, None):
        prompt = chat.prompt_ids(example.row, example.demonstrations)
        assert not byte_tokens(tokenizer, prompt + tokenizer(render_completion(example.target))["input_ids"])
        if int(example.row.id.split("-")[1]) > builtin.COLD_EASY_EXAMPLES + 300:
            break
    for row in ROWS:
        prompt = chat.prompt_ids(row)
        assert not byte_tokens(tokenizer, prompt) and len(prompt) <= 110


def test_held_out_values_are_two_tokens_that_training_rows_contain(tokenizer):
    chat = Chat(tokenizer)
    trained = {i for row in builtin.train_rows(2000, seed=0) for i in chat.prompt_ids(row)}
    for value in builtin.strings(held_out=True) + builtin.integers(held_out=True):
        ids = tokenizer(str(value))["input_ids"]
        assert len(ids) == 2 and set(ids) <= trained


def test_the_prompt_shows_signatures_demonstrations_and_the_assistant_header(tokenizer):
    def tool(name, properties, required):
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [
        tool("find_hotel", {"city": {"type": "string"}, "amount": {"type": "integer"}}, ["city"]),
        tool("rate_tour", {"currency": {"type": "string", "enum": ["euro", "yen"]}}, ["currency"]),
        tool("open_car", {}, []),
    ]
    shown = Row("2", "Please open the car.", tools, [{"name": "open_car", "arguments": {}}])
    row = Row("1", "Now find the hotel with city Norton.", tools, [])
    expected = (
        "<|system|>find_hotel(city: string, amount?: integer)\nrate_tour(currency: euro|yen)\nopen_car()\n"
        'Example:\nPlease open the car.\n<tool_call>\n{"name": "open_car", "arguments": {}}\n</tool_call>'
        "<|user|>Now find the hotel with city Norton.<|end|><|assistant|>"
    )
    assert render_text(tokenizer, row, [shown]) == expected
    assert tokenizer.decode(render_prompt(tokenizer, row, [shown])) == expected


def test_an_assistants_calls_render_as_the_completion_does(tokenizer):
    calls = ROWS[2].answer
    conversation = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]},
        {"role": "tool", "content": "done"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == f"<|user|>hi<|end|><|assistant|>{render_completion(calls)}<|end|><|tool|>done<|end|>"


@pytest.mark.parametrize("text", ["Größe: 12 €\t🙂", "a 1234567 b", "", 'nested {"x": [1, 2]}\n\n', "<unk> [UNK]"])
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_and_model_survive_saving(tokenizer, tmp_path):
    model = tiny_model(tokenizer, seed=0)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.eos_token, loaded.pad_token, loaded.padding_side) == ("<|end|>", "<|pad|>", "left")
    assert len(loaded) == len(tokenizer)
    for row in ROWS[:20]:
        ids = render_prompt(tokenizer, row, ROWS[20:22])
        assert render_prompt(loaded, row, ROWS[20:22]) == ids
        assert loaded.decode(ids) == tokenizer.decode(ids)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_model_depends_on_its_seed_and_leaves_the_generator_alone(tokenizer):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, same, other = (tiny_model(tokenizer, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    weights = [m.model.layers[0].self_attn.q_proj.weight for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].dtype == torch.float32
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert first.config.vocab_size == tiny_config(tokenizer).vocab_size == len(tokenizer)
