"""Small random models of several architectures, with weights large enough for clear preferences among tokens."""

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
VOCAB = 131


def small_model(architecture: str, *, tied: bool = True, seed: int = 0):
    common = dict(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**common)).eval()
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common)).eval()
    if architecture == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**common, head_dim=32)).eval()
    windows = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(
        **common,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=windows,
        final_logit_softcapping=5.0,
    )
    return Gemma3ForCausalLM(config).eval()
