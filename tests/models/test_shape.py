"""Shapes read from a config: context, cache and scale of the logits."""

import pytest
from transformers import AutoConfig, PreTrainedConfig

from toolx_kernels.errors import InputError
from toolx_kernels.models.shape import cache_shape, context_of, has_experts, logit_scale

LONGROPE = dict(
    rope_type="longrope", rope_theta=1e4, short_factor=[1.0], long_factor=[2.0], original_max_position_embeddings=512
)
DYNAMIC = dict(rope_type="dynamic", rope_theta=1e4, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=512)


@pytest.mark.parametrize(
    "kind, settings, context",
    [
        ("llama", dict(max_position_embeddings=2048), 2048),
        ("gpt2", dict(n_positions=77), 77),
        ("llama", dict(max_position_embeddings=2048, rope_parameters=DYNAMIC), 2048),
        ("llama", dict(max_position_embeddings=2048, rope_parameters=YARN), 2048),
        ("llama", dict(max_position_embeddings=2048, rope_parameters=LONGROPE), 512),
        (
            "gemma3_text",
            dict(max_position_embeddings=2048, rope_parameters={"full_attention": LONGROPE, "sliding_attention": YARN}),
            512,
        ),
    ],
)
def test_the_context_ends_where_factors_would_change(kind, settings, context):
    found = context_of(AutoConfig.for_model(kind, **settings))
    assert found == context
    assert str(found) == str(context) or "those to 2048 are not used" in str(found)


def test_sizes_that_a_config_does_not_name():
    class Nameless(PreTrainedConfig):
        model_type = "nameless"

    with pytest.raises(InputError, match="A nameless config names no context .max_position_embeddings."):
        context_of(Nameless())
    with pytest.raises(InputError, match="A nameless config does not name one number of attention heads"):
        cache_shape(Nameless())


@pytest.mark.parametrize(
    "kind, settings, shape",
    [
        ("llama", dict(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2), (3, 2, 16)),
        ("qwen3", dict(num_hidden_layers=3, num_key_value_heads=2, head_dim=24), (3, 2, 24)),
        ("gpt2", dict(n_layer=3, n_embd=64, n_head=4), (3, 4, 16)),
    ],
)
def test_cache_shape(kind, settings, shape):
    assert cache_shape(AutoConfig.for_model(kind, **settings)) == shape


def test_scales_and_experts():
    assert logit_scale(AutoConfig.for_model("llama")) == 1
    assert logit_scale(AutoConfig.for_model("granite", logits_scaling=8.0)) == 1 / 8
    assert logit_scale(AutoConfig.for_model("cohere", logit_scale=0.25)) == 0.25
    assert has_experts(AutoConfig.for_model("mixtral")) and not has_experts(AutoConfig.for_model("qwen3"))
