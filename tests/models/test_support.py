"""Support of architectures: those that run exactly, and those that are refused with a reason."""

import warnings
from functools import partial
from threading import Thread

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging

from tests.small_models import VOCAB, small_model
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.models import support
from toolx_kernels.models.bridge import head_of, toolx_attention
from toolx_kernels.models.support import check_config, check_supported
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.train.update.batch import PackedGroup, pack

SMALL = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HALF = dict(num_key_value_heads=2)
SCALES = dict(logits_scaling=8.0, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.02)
CONV = dict(layer_types=["conv", "full_attention"])
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=10000.0,
    short_factor=[1.0] * 8,
    long_factor=[8.0] * 8,
)


def tiny_config(kind, **changed):
    return AutoConfig.for_model(kind, **(SMALL | changed))


def tiny_model(kind, seed=0, **changed):
    torch.manual_seed(seed)
    config = tiny_config(kind, initializer_range=0.2, **changed)
    return AutoModelForCausalLM.from_config(config).eval()


# Published configs; the checked copies are narrow and have few layers, but every kind of layer.
EXACT = {
    "llama": {},
    "qwen3_moe": {},
    "gemma2": {},
    "gemma3": {},
    "phi3": {},
    "olmo3": {},
    "smollm3": {},
    "granite": SCALES,
    "cohere2": {},
    "exaone4": {},
    "gpt2": {},
    "gpt_neox": {},
    "deepseek_v3": None,  # its keys are wider than its values
}


@pytest.mark.parametrize("kind", EXACT)
def test_published_shapes_are_tried_without_their_weights(kind):
    before = torch.get_rng_state()
    settings = EXACT[kind]
    if settings is None:
        with pytest.raises(InputError, match="keys and values of layer 0 are 4 x 24 and 4 x 16"):
            check_config(AutoConfig.for_model(kind))
    else:
        assert check_config(AutoConfig.for_model(kind, **settings)) < 5e-5
    assert torch.equal(torch.get_rng_state(), before)


REFUSED = {
    "lfm2": (tiny_config, HALF | CONV, "its Lfm2ShortConv (layers.0.conv) carries state outside attention"),
    "mamba": (tiny_config, {}, "does not take its attention function from transformers' registry"),
    "gpt_oss": (tiny_config, HALF | dict(head_dim=16, num_local_experts=4), "a layer hands s_aux to attention"),
    "doge": (tiny_config, HALF, "a layer hands a mask of its own to attention"),
    "diffllama": (tiny_config, HALF, "its 2 layers do not call attention once each"),
    "jetmoe": (
        tiny_config,
        dict(num_key_value_heads=2, kv_channels=16),
        "keys and values of layer 0 are 4 x 16 and 4 x 16",
    ),
    "bert": (tiny_config, {}, "the log-probs of a row alone differ by"),
    "recurrent_gemma": (tiny_config, HALF, "its RecurrentGemmaRecurrentBlock (layers.0.temporal_block) carries"),
    "minimax_m3_vl_text": (tiny_config, HALF | dict(layer_types=["minimax_m3_sparse"] * 2), "Indexer"),
    "gemma4_text": (tiny_config, HALF, "layers of different shapes"),
    "nemotron": (tiny_config, HALF, "a layer does not hand keyword arguments of the call on to attention"),
    "t5": (AutoConfig.for_model, {}, "No language model can be made from a t5 config"),
    "vit": (AutoConfig.for_model, {}, "No language model can be made from a vit config"),
    "bart": (AutoConfig.for_model, {}, "does not take its attention function"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_is_told_why(kind):
    config_of, settings, reason = REFUSED[kind]
    with pytest.raises(InputError) as refusal:
        check_config(config_of(kind, **settings))
    assert reason in str(refusal.value) and "docs/models.md" in str(refusal.value)


def test_state_outside_attention_is_refused_at_the_engine():
    model = tiny_model("lfm2", **HALF, **CONV)
    for attempt in (check_supported, RolloutEngine):
        with pytest.raises(InputError, match="Lfm2ForCausalLM cannot be run exactly: its Lfm2ShortConv"):
            attempt(model)


def test_what_surrounds_a_check_has_no_say_in_it():
    config = tiny_config("qwen3", **HALF)
    expected = check_config(config)
    support._verdicts.clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
            assert check_config(config) == expected
    finally:
        torch.set_default_dtype(torch.float32)


class TokenShift(nn.Module):
    """A layer that passes on more than keys and values, through a gate that is initially closed."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, hidden):
        return hidden + self.gate * torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)


class ShiftingLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.Sequential(TokenShift(config), self.model.norm)


def test_state_of_any_name_shows_in_rows_together_even_where_its_gate_is_closed():
    with pytest.raises(
        InputError, match="the log-probs of rows packed together differ by .* through our attention and head"
    ):
        check_supported(ShiftingLlama(tiny_config("llama")))


class SequenceNorm(nn.Module):
    def forward(self, hidden):
        return hidden - hidden.mean(1, keepdim=True)


class Gated(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = nn.Sequential(TokenShift(config), self.model.norm)
        nn.init.constant_(self.model.norm[0].gate, -20.0)  # too far closed for noise to open it
        self.model.norm[0].forward = partial(self.shifted, self.model.norm[0])

    @staticmethod
    def shifted(module, hidden):
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        return hidden + module.gate.sigmoid() * before


def shifting_hook(module, inputs, hidden):
    return hidden + torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)


def with_a_hook(model):
    model.model.layers[1].mlp.register_forward_hook(shifting_hook)
    return model


def with_a_norm_over_the_sequence(model):
    model.model.norm = nn.Sequential(SequenceNorm(), model.model.norm)
    return model


def with_a_gate_that_was_opened(model):
    gated = Gated(model.config)
    gated.model.norm[0].gate.data.fill_(2.0)
    return gated.eval()


@pytest.mark.parametrize("made", [with_a_hook, with_a_norm_over_the_sequence, with_a_gate_that_was_opened])
def test_what_only_the_model_itself_has_shows_in_a_row_behind_another(made):
    with pytest.raises(InputError, match="its log-probs differ by .* from the model's own"):
        check_supported(made(small_model("llama")))


def test_large_logits_that_bfloat16_rounds_are_no_reason():
    config = tiny_config("qwen2", hidden_size=512, num_attention_heads=8, num_key_value_heads=2, vocab_size=2000)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.lm_head.weight.data.normal_(0, 1.5)
    check_supported(model.bfloat16())


def test_a_head_with_an_adapter_is_refused_by_the_engine():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small_model("llama", tied=False), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(InputError, match="its head is a peft.*Linear, not a linear layer of torch"):
        RolloutEngine(model.get_base_model())
    with pytest.raises(InputError, match="not a PreTrainedModel of transformers, but its get_base_model may be"):
        RolloutEngine(model)


def test_checks_in_threads_leave_what_they_share_as_it_was():
    verbosity, filters = logging.get_verbosity(), list(warnings.filters)
    support._verdicts.clear()
    kinds = ("llama", "qwen2", "gemma2", "gpt2")
    threads = [Thread(target=check_config, args=(AutoConfig.for_model(kind),)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (logging.get_verbosity(), warnings.filters) == (verbosity, filters)


def test_a_module_that_the_architecture_does_not_have_is_refused():
    model = small_model("llama")
    model.model.norm = nn.Sequential(TokenShift(model.config), model.model.norm)
    with pytest.raises(
        InputError,
        match="no small copy of it can be tried .it lacks TokenShift.; use a model that docs/models.md",
    ):
        check_supported(model)


def test_the_cache_is_checked_on_the_model_itself():
    model = small_model("llama")
    model.config.num_key_value_heads = 4  # but its weights have 2
    with pytest.raises(InputError, match="keys and values of layer 0 are 2 x 16 and 2 x 16 .* is 4 x 16 for all"):
        RolloutEngine(model)


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), None, small_model("llama").model])
def test_what_is_no_language_model_is_refused(thing):
    with pytest.raises(InputError, match=f"{type(thing).__name__} cannot be run exactly: "):
        RolloutEngine(thing)


def test_an_architecture_is_tried_once_and_weights_each_time(monkeypatch):
    model = small_model("llama")
    check_supported(model)
    monkeypatch.setattr(support, "_of_copies", lambda *_: pytest.fail("known already"))
    check_supported(small_model("llama", seed=1).bfloat16())
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="differ by nan from the model's own, where they should be equal and finite"):
        check_supported(model)


def test_last_bits_that_choose_other_experts_are_no_reason():
    """Eager attention rounds where ours does not: in bfloat16 some token takes another expert and is 1.5 nats off."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000)
    config = tiny_config("granitemoe", **sizes, num_key_value_heads=4, num_experts_per_tok=2, initializer_range=0.1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").bfloat16().eval()
    check_supported(model)


def logprobs_in_training(model, groups):
    batch = pack([PackedGroup(g.prompt_ids, [c.ids for c in g.completions]) for g in groups], "cpu")
    with toolx_attention(model):
        return linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs.detach()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("gpt2", {}),
        ("gpt_neox", {}),
        ("granite", HALF | SCALES),
        ("cohere", HALF),
        ("qwen3_moe", HALF | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)),
    ],
)
def test_what_is_accepted_samples_as_generate_does_and_trains_on_what_it_sampled(kind, settings):
    model = tiny_model(kind, **settings)
    prompts = [[3, 9, 4], [7, 30, 21, 5, 90, 17, 33, 41, 8]]
    engine = RolloutEngine(model, page_size=4)
    greedy = engine.generate(prompts, 1, SamplingParams(8, temperature=0.0, stop_token_ids=(2,)))
    for prompt, group in zip(prompts, greedy, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2)
        assert group.completions[0].ids == out[0, len(prompt) :].tolist()
    sampled = engine.generate(prompts, 2, SamplingParams(8, stop_token_ids=(2,)))
    told = torch.tensor([p for group in sampled for c in group.completions for p in c.logprobs])
    torch.testing.assert_close(logprobs_in_training(model, sampled), told, rtol=0, atol=1e-4)


# ---- the context


def test_rows_of_a_longrope_model_have_the_factors_that_they_have_alone():
    limits = dict(max_position_embeddings=256, original_max_position_embeddings=32)
    model = tiny_model("phi3", **HALF, **limits, rope_parameters=LONGROPE)
    engine, five, twenty = RolloutEngine(model), list(range(3, 8)), list(range(10, 30))
    params = SamplingParams(8, stop_token_ids=(2,))
    together = engine.generate([five, twenty], 2, params, row_ids=[0, 1])
    for row, group in enumerate(together):
        alone = RolloutEngine(model).generate([group.prompt_ids], 2, params, row_ids=[row])
        assert [c.ids for c in alone[0].completions] == [c.ids for c in group.completions]
        told = torch.tensor([p for c in group.completions for p in c.logprobs])
        torch.testing.assert_close(logprobs_in_training(model, alone), told, rtol=0, atol=1e-4)
    told = torch.tensor([p for group in together for c in group.completions for p in c.logprobs])
    torch.testing.assert_close(logprobs_in_training(model, together), told, rtol=0, atol=1e-4)
    assert all(len(c.ids) == 8 for c in together[0].completions)
    longest = engine.generate([list(range(3, 33))], 1, params)
    assert len(longest[0].completions[0].ids) == 2
    with pytest.raises(
        InputError, match="has 40 tokens, but the model's context is 32 .the original one of its LongRo"
    ):
        engine.generate([five, list(range(3, 43))], 1, params)
