"""The tiny model of the built-in task: a tokenizer made from the task's text, and a small Llama for it.

Both are ordinary transformers objects; nothing else in the package treats them specially.
"""

import re
import string
from string import Formatter

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolx_kernels.toolcall.datasets import builtin, builtin_facts
from toolx_kernels.toolcall.self_exemplify import INSTRUCTIONS

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# JSON and signature syntax that is always one token; the tag and key fragments are Qwen's tool-call format.
FRAGMENTS = (
    '<tool_call>\n{"name": "', '", "arguments": {"', '": "', '": ', '", "', ', "',
    '"}}\n</tool_call>', "}}\n</tool_call>", "Example:\n",
    # the self-exemplifying form; its instructions are one token, because the model need not read their words
    INSTRUCTIONS, '<examples>\n[{"tools": ["', '"], "question": "', '", "answer": [{"name": "',
    '"}}]},\n{"tools": ["', '}}]},\n{"tools": ["', '"}}]}]\n</examples>\n<think>\n', '}}]}]\n</examples>\n<think>\n',
    '\n</think>\n<tool_call>\n{"name": "',
    "(", ": string", ": integer", ": boolean", ": ", "|", ", ", ")\n", "_", "\n", "true", "false",
)  # fmt: skip

# Tools are listed as signatures, one per line, then the system text, then the turns.
CHAT_TEMPLATE = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if tools or system %}{{ '<|system|>' }}
{%- for tool in tools or [] %}
{%- set function = tool.function or tool %}
{%- set required = function.parameters.required or [] %}
{{- function.name }}(
{%- for name, schema in (function.parameters.properties or {}).items() %}
{{- name }}{{ '' if name in required else '?' }}{{ ': ' }}
{{- schema.enum | join('|') if schema.enum else schema.type }}
{{- ', ' if not loop.last }}
{%- endfor %}
{{- ')\\n' }}
{%- endfor %}
{{- system }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
{{- '<|' + message.role + '|>' }}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '' if loop.first and not message.content else '\\n' }}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
{{- function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def is_tiny(name: str) -> bool:
    """Whether a model's name is ``tiny``, or ``tiny:<seed of its weights>``."""
    return re.fullmatch(r"tiny(:[0-9]+)?", name) is not None


def _pieces() -> list[str]:
    templates = [*builtin.MENTIONS, *builtin.OPENINGS, *builtin.DETERMINERS, *builtin.INTRODUCTIONS]
    templates += [*builtin.SEPARATORS, *builtin.CALL_SEPARATORS]
    literals = [literal for template in templates for literal, *_ in Formatter().parse(template)]
    words = [*builtin.VERBS, *builtin.NOUNS, *builtin.PARAMETERS, "currency", *builtin.CURRENCIES]
    words += [*builtin.BOOLEAN_WORDS.values(), *builtin.STRING_HEADS, *builtin.STRING_TAILS]
    numbers = [str(i) for i in range(10, 100)]
    facts = ["office", "account", builtin_facts.COLD_CODE]
    pieces = dict.fromkeys([*FRAGMENTS, *literals, *words, *numbers, *string.digits, ".", *facts])
    return [p for p in pieces if p]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the built-in task, the same on every call.

    It is a unigram model whose pieces all have the same score, so a text is split into as few pieces as possible;
    anything else falls back to bytes, so every text can be encoded and decoded exactly. Numbers are split into two
    leading digits and the rest: the head of a value is then nearly unique within a prompt, which makes it easy to copy.
    """
    vocabulary = [PAD, END, *ROLES, *(f"<0x{b:02X}>" for b in range(256)), *_pieces()]
    unigram = models.Unigram([(piece, -1.0) for piece in vocabulary], unk_id=0, byte_fallback=True)
    tokenizer = Tokenizer(unigram)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"(?<!\d)\d\d"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
        padding_side="left",
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the tiny model, with half a million parameters.

    Two layers with two wide heads are enough to copy values from the prompt, and they learn it several times sooner
    than more layers or more heads; the wide initialization and the small rotary base suit short prompts.
    """
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        initializer_range=0.07,
        rope_parameters={"rope_type": "default", "rope_theta": 200.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A new fp32 model whose random weights depend only on ``seed``; torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tokenizer)).float()
    model.name_or_path = f"tiny:{seed}"  # its name for load_model
    return model
