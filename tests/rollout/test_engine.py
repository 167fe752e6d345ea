"""The rollout engine against transformers' own generation, and what it promises about randomness and memory."""

import pytest
import torch

from tests.models import ARCHITECTURES, VOCAB, small_model
from toolx_kernels.errors import InputError
from toolx_kernels.ops.hf_attention import _attention, head_of, toolx_attention
from toolx_kernels.ops.linear_logprob import linear_logprob
from toolx_kernels.rollout import RolloutEngine, SamplingParams
from toolx_kernels.rollout import engine as engine_module
from toolx_kernels.train.batch import PackedGroup, pack

GREEDY = SamplingParams(20, temperature=0.0, stop_token_ids=(2,))
WARM = SamplingParams(20, temperature=0.8, stop_token_ids=(2,))


def prompts(lengths=(1, 5, 16, 23, 32, 40), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


def ids(groups):
    return [[c.ids for c in group.completions] for group in groups]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_generate_token_for_token(architecture):
    model = small_model(architecture, tied=architecture != "qwen2")
    expected = []
    for prompt in prompts():
        out = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=2)
        expected.append(out[0, len(prompt) :].tolist())
    for page_size, max_pages in [(8, None), (16, 5), (32, None), (1, 200)]:
        engine = RolloutEngine(model, page_size=page_size, max_pages=max_pages)
        groups = engine.generate(prompts(), 2, GREEDY)
        assert ids(groups) == [[e, e] for e in expected]
        assert sorted(engine.pool.free) == list(range(engine.pool.n_pages))
        assert engine.pool.references == [0] * engine.pool.n_pages


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logprobs_are_those_of_training(architecture):
    model = small_model(architecture)
    groups = RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM)
    batch = pack([PackedGroup(g.prompt_ids, [c.ids for c in g.completions]) for g in groups])
    with toolx_attention(model), torch.no_grad():
        trained = linear_logprob(
            batch.hidden(model), targets=batch.targets, temperature=0.8, entropy=True, **head_of(model)
        )
    completions = [c for g in groups for c in g.completions]
    sampled = torch.tensor([logp for c in completions for logp in c.logprobs])
    entropies = torch.tensor([h for c in completions for h in c.entropies])
    torch.testing.assert_close(trained.logprobs, sampled, rtol=0, atol=1e-4)
    torch.testing.assert_close(trained.entropy, entropies, rtol=0, atol=1e-4)
    assert len({tuple(c.ids) for c in completions}) > len(groups), "siblings should differ"


def test_completions_depend_on_nothing_but_their_stream():
    model = small_model("llama")
    expected = RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM, row_ids=range(10, 16))
    backwards = RolloutEngine(model, page_size=16, max_pages=6).generate(
        prompts()[::-1], 3, WARM, row_ids=range(15, 9, -1)
    )
    assert ids(backwards[::-1]) == ids(expected)
    engine = RolloutEngine(model)
    alone = [engine.generate([p], 3, WARM, row_ids=[row])[0] for p, row in zip(prompts(), range(10, 16), strict=True)]
    assert ids(alone) == ids(expected)
    later = engine.generate(prompts(), 1, WARM, row_ids=range(10, 16), first_rollout=2)
    assert [g[0] for g in ids(later)] == [g[2] for g in ids(expected)]


def test_seed_step_row_and_rollout_each_change_the_noise():
    model = small_model("llama")
    prompt = prompts((16,))
    base = RolloutEngine(model).generate(prompt, 2, WARM)
    assert base[0].completions[0].ids != base[0].completions[1].ids
    assert ids(RolloutEngine(model, seed=1).generate(prompt, 2, WARM)) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM, step=1)) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM, row_ids=[7])) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM)) == ids(base)


def test_new_weights_serve_from_the_first_token_on():
    model = small_model("llama")
    engine = RolloutEngine(model)
    before = engine.generate(prompts(), 1, GREEDY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    after = engine.generate(prompts(), 1, GREEDY)
    assert ids(after) == ids(RolloutEngine(model).generate(prompts(), 1, GREEDY)) != ids(before)


def test_stops_and_limits():
    model = small_model("llama")
    [group] = RolloutEngine(model).generate(prompts((9,)), 1, SamplingParams(12, temperature=0.0))
    free = group.completions[0]
    assert len(free.ids) == 12 and free.finish_reason == "length"
    stop = free.ids[4]
    [group] = RolloutEngine(model).generate(
        prompts((9,)), 1, SamplingParams(12, temperature=0.0, stop_token_ids=(stop,))
    )
    assert group.completions[0].ids == free.ids[: free.ids.index(stop) + 1]
    assert group.completions[0].finish_reason == "stop"
    [group] = RolloutEngine(model).generate(prompts((120,)), 1, SamplingParams(50, temperature=0.0))
    assert len(group.completions[0].ids) == 8, "the context of 128 ends there"


def test_filters_reach_the_sampler():
    model = small_model("llama")
    [group] = RolloutEngine(model).generate(prompts((9,)), 4, SamplingParams(12, temperature=1.5, top_k=1))
    [greedy] = RolloutEngine(model).generate(prompts((9,)), 1, SamplingParams(12, temperature=0.0))
    assert all(c.ids == greedy.completions[0].ids for c in group.completions)
    assert all(0 < mass < 1 for c in group.completions for mass in c.kept_mass)


def test_the_model_is_left_as_it_was():
    model = small_model("llama")
    model.train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    implementation = model.config._attn_implementation
    engine = RolloutEngine(model)
    engine.generate(prompts(), 1, GREEDY)
    with pytest.raises(RuntimeError):
        model.lm_head.register_forward_hook(lambda *_: None)
        model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        engine.generate(prompts(), 1, GREEDY)
    assert [m.training for m in model.modules()] == before
    assert model.config._attn_implementation == implementation


def test_an_exception_does_not_cost_the_next_call_its_pages():
    model = small_model("llama")
    engine = RolloutEngine(model, max_pages=6)
    expected = ids(engine.generate(prompts(), 2, GREEDY))
    hook = model.model.norm.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts(), 2, GREEDY)
    hook.remove()
    assert ids(engine.generate(prompts(), 2, GREEDY)) == expected


def test_the_pool_is_kept_and_grows():
    engine = RolloutEngine(small_model("llama"), page_size=8)
    engine.generate(prompts((5,)), 1, GREEDY)
    small = engine.pool
    engine.generate(prompts((4,)), 1, GREEDY)
    assert engine.pool is small
    engine.generate(prompts((40, 40)), 4, GREEDY)
    assert engine.pool.n_pages > small.n_pages


@pytest.mark.parametrize(
    "prompt, n, options, message",
    [
        ([1, 2], 0, {}, "n=0"),
        ([], 1, {}, r"Prompt 1 \(row 8\) is empty"),
        ([5, 131], 1, {}, r"Prompt 1 \(row 8\) holds token id 131"),
        ([5, -1], 1, {}, r"Prompt 1 \(row 8\) holds token id -1"),
        ([5] * 128, 1, {}, r"Prompt 1 \(row 8\) has 128 tokens, and the model's context is 128"),
        ([5] * 90, 1, {"max_pages": 3}, r"Prompt 1 \(row 8\) with 90 tokens needs 8 pages"),
    ],
)
def test_bad_prompts_are_named_before_anything_runs(prompt, n, options, message):
    model = small_model("llama")
    engine = RolloutEngine(model, **options)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        engine.generate([[5], prompt], n, GREEDY, row_ids=[7, 8])
    with pytest.raises(InputError, match="1 row_ids for 2 prompts"):
        engine.generate([[5], [6]], 1, GREEDY, row_ids=[7])


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}]
)
def test_bad_sampling_parameters_are_named(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(InputError, match=f"{name}={value}"):
        SamplingParams(**({"max_new_tokens": 4} | settings))
    with pytest.raises(InputError, match="page_size=0"):
        RolloutEngine(small_model("llama"), page_size=0)


def test_prefill_in_several_batches(monkeypatch):
    model = small_model("llama")
    expected = ids(RolloutEngine(model).generate(prompts(), 1, GREEDY))
    monkeypatch.setattr(engine_module, "MAX_PREFILL_TOKENS", 30)
    assert ids(RolloutEngine(model).generate(prompts(), 1, GREEDY)) == expected


def test_every_position_draws_its_own_noise():
    model = small_model("llama", tied=False)
    model.lm_head.weight.data.zero_()
    [group] = RolloutEngine(model).generate(prompts((9,)), 2, SamplingParams(16))
    assert all(len(set(c.ids)) > 8 for c in group.completions), "uniform tokens hardly repeat"


def test_the_pool_follows_the_models_dtype():
    model = small_model("llama")
    engine = RolloutEngine(model)
    engine.generate(prompts(), 1, GREEDY)
    model.double()
    assert ids(engine.generate(prompts(), 1, GREEDY)) == ids(RolloutEngine(model).generate(prompts(), 1, GREEDY))
    assert engine.pool.key_caches[0].dtype == torch.float64


def test_window_and_softcap_reach_the_context():
    seen = []

    class Context:
        def attend(self, layer, query, key, value, scale, softcap, window):
            seen.append((layer, tuple(query.shape), tuple(key.shape), scale, softcap, window))
            return query

    module = type("Layer", (), {"layer_idx": 3})()
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    out, _ = _attention(module, query, key, key, None, scaling=0.5, toolx=Context(), softcap=2.0, sliding_window=7)
    assert seen == [(3, (5, 4, 8), (5, 2, 8), 0.5, 2.0, 7)]
    assert torch.equal(out, query.transpose(1, 2))


@pytest.mark.parametrize("scaled", ["granite", "cohere"])
def test_architectures_that_scale_their_logits_are_refused(scaled):
    import transformers

    settings = dict(vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=4, pad_token_id=0)  # fmt: skip
    if scaled == "granite":
        model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**settings, logits_scaling=8.0))
    else:
        model = transformers.CohereForCausalLM(transformers.CohereConfig(**settings))
    with pytest.raises(InputError, match="log-probs differ by"):
        RolloutEngine(model)


def test_no_prompts():
    assert RolloutEngine(small_model("llama")).generate([], 3, GREEDY) == []
