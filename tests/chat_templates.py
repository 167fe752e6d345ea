"""Chat templates of model families, and small tokenizers with the control tokens that the templates write.

Templates that TRL ships are read from TRL. It does not ship Mistral's: these are written for the tests, with turns,
tools, calls and results in the form of the published ones.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MISTRAL = """\
{{- bos_token }}
{%- set last = namespace(user=-1) %}
{%- for message in messages if message.role == 'user' %}{% set last.user = messages.index(message) %}{% endfor %}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for message in messages if message.role != 'system' %}
{%- if message.role == 'user' %}
{%- if tools and messages.index(message) == last.user %}
{{- '[AVAILABLE_TOOLS] ' + (tools | list | tojson) + '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST] ' + (system if messages.index(message) == last.user else '') + message.content + '[/INST]' }}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
{%- if not call.id or call.id | length != 9 %}{{ raise_exception('Tool call IDs have 9 characters') }}{% endif %}
{{- '{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) }}
{{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif message.role == 'assistant' %}
{{- ' ' + message.content + eos_token }}
{%- elif message.role == 'tool' %}
{%- if not message.tool_call_id or message.tool_call_id | length != 9 %}
{{- raise_exception('Tool call IDs have 9 characters') }}
{%- endif %}
{{- '[TOOL_RESULTS] {"content": ' + (message.content | tojson) + ', "call_id": "' }}
{{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('Only user, assistant, system and tool roles are supported') }}
{%- endif %}
{%- endfor %}"""
# Calls in the form of Mistral's newer tokenizers: name and arguments, each after its own control token.
MISTRAL_ARGS = MISTRAL
NAME = """'{"name": "' + call.function.name + '", "arguments": '"""
ID = """{{- ', "id": "' + call.id + '"}' + (', ' if not loop.last else '') }}\n"""
for old, new in [
    ("'[TOOL_CALLS] ['", "''"),
    (NAME, "'[TOOL_CALLS]' + call.function.name + '[ARGS]'"),
    (ID, ""),
    ("']' + eos_token", "eos_token"),
]:
    assert old in MISTRAL_ARGS
    MISTRAL_ARGS = MISTRAL_ARGS.replace(old, new)

IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MISTRAL_TOKENS = (
    "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[ARGS]",
)  # fmt: skip
LFM = ("<|startoftext|>", *IM, "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>", "<|tool_call_end|>",
       "<|tool_response_start|>", "<|tool_response_end|>")  # fmt: skip


def trl_template(name: str) -> str:
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def family_tokenizer(family: str, text: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer of the family: bytes, merges learned from ``text``, and the control tokens.

    ``family`` is llama3, mistral, mistral_args, qwen3, qwen2_5, lfm2 or lfm2_5.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    template, special, plain, bos, eos = {
        "llama3": (lambda: trl_template("llama3_2"), LLAMA, (), "<|begin_of_text|>", "<|eot_id|>"),
        "mistral": (lambda: MISTRAL, MISTRAL_TOKENS, (), "<s>", "</s>"),
        "mistral_args": (lambda: MISTRAL_ARGS, MISTRAL_TOKENS, (), "<s>", "</s>"),
        "qwen3": (lambda: trl_template("qwen3"), IM, QWEN_PLAIN, None, "<|im_end|>"),
        "qwen2_5": (lambda: trl_template("qwen2_5"), IM, QWEN_PLAIN[:2], None, "<|im_end|>"),
        "lfm2": (lambda: trl_template("lfm2"), LFM, (), "<|startoftext|>", "<|im_end|>"),
        "lfm2_5": (lambda: trl_template("lfm2_2_5_v2"), LFM, (), "<|startoftext|>", "<|im_end|>"),
    }[family]
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=special[0], chat_template=template()
    )
