"""The rollout engine against transformers' ``generate``, and its guarantees about randomness and memory."""

import math
import threading

import numpy as np
import pytest
import torch

from tests.ops.cases import DEVICE, make_case, run_loss
from tests.small_models import ARCHITECTURES, VOCAB
from tests.small_models import small_model as cpu_model
from toolx_kernels import GRPOLossConfig, group_advantages, linear_grpo_loss, sample
from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.engine import engine as engine_module
from toolx_kernels.engine import runner as runner_module
from toolx_kernels.engine.scheduler import Scheduler
from toolx_kernels.errors import DivergedError, InputError
from toolx_kernels.models.bridge import attention_function, head_of, toolx_attention
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.train.update.batch import PackedGroup, pack

GREEDY = SamplingParams(20, temperature=0.0, stop_token_ids=(2,))
WARM = SamplingParams(20, temperature=0.8, stop_token_ids=(2,))


def small_model(architecture, **options):
    return cpu_model(architecture, **options).to(DEVICE)


def prompts(lengths=(1, 5, 16, 23, 32, 40), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=g).tolist() for n in lengths]


def assert_empty(pool):
    assert sorted(pool.free) == list(range(pool.n_pages))
    assert pool.references == [0] * pool.n_pages


def ids(groups):
    return [[c.ids for c in group.completions] for group in groups]


@pytest.mark.parametrize("architecture, tied", [*((name, True) for name in ARCHITECTURES), ("llama", False)], ids=str)
def test_greedy_is_generate_token_for_token(architecture, tied, monkeypatch):
    model = small_model(architecture, tied=tied)
    expected = []
    for prompt in prompts():
        tokens = torch.tensor([prompt], device=DEVICE)
        out = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=2)
        expected.append(out[0, len(prompt) :].tolist())
    assert len({tuple(e) for e in expected}) == len(expected)
    for page_size, max_pages in [(8, None), (16, 5), (32, None), (1, 200)]:
        engine = RolloutEngine(model, page_size=page_size, max_pages=max_pages)
        assert ids(engine.generate(prompts(), 2, GREEDY)) == [[e, e] for e in expected]
        assert_empty(engine.pool)
    monkeypatch.setattr(Scheduler, "_growth", lambda *_: 0)  # starts all rows that fit now, so it must preempt some
    for page_size in (8, 16, 32):
        engine = RolloutEngine(model, page_size=page_size, max_pages=-(-60 // page_size) + 1)
        assert ids(engine.generate(prompts(), 2, GREEDY)) == [[e, e] for e in expected]
        assert engine.preemptions > 0
        assert_empty(engine.pool)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampled_logprobs_are_those_of_training(architecture):
    model = small_model(architecture)
    groups = RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM)
    batch = pack([PackedGroup(g.prompt_ids, [c.ids for c in g.completions]) for g in groups], DEVICE)
    with toolx_attention(model), torch.no_grad():
        trained = linear_logprob(
            batch.hidden(model), targets=batch.targets, temperature=0.8, entropy=True, **head_of(model)
        )
    completions = [c for g in groups for c in g.completions]
    sampled = torch.tensor([logp for c in completions for logp in c.logprobs], device=DEVICE)
    entropies = torch.tensor([h for c in completions for h in c.entropies], device=DEVICE)
    torch.testing.assert_close(trained.logprobs, sampled, rtol=0, atol=1e-4)
    torch.testing.assert_close(trained.entropy, entropies, rtol=0, atol=1e-4)
    assert len({tuple(c.ids) for c in completions}) > len(groups), "siblings should differ"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_completions_depend_on_nothing_but_their_stream(architecture):
    model = small_model(architecture)
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


@pytest.mark.parametrize(
    "architecture, page_size", [*((name, 16) for name in ARCHITECTURES), ("gemma3", 8), ("gemma3", 32)]
)
def test_preemption_changes_no_token(architecture, page_size, monkeypatch):
    """With too few pages for the started rows, some rows are preempted and recomputed later."""
    model = small_model(architecture)
    expected = RolloutEngine(model).generate(prompts(), 3, WARM)
    monkeypatch.setattr(Scheduler, "_growth", lambda *_: 0)  # starts all rows that fit now
    engine = RolloutEngine(model, page_size=page_size, max_pages=-(-60 // page_size) + 2)
    groups = engine.generate(prompts(), 3, WARM)
    assert engine.preemptions > 0
    assert ids(groups) == ids(expected)
    for mine, theirs in zip(groups, expected, strict=True):
        for a, b in zip(mine.completions, theirs.completions, strict=True):
            torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=0, atol=1e-4)
    assert_empty(engine.pool)


def test_prompts_are_found_again_until_the_weights_change():
    model = small_model("llama")
    engine, seen = RolloutEngine(model, page_size=8), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape[1]))
    once = SamplingParams(1)
    engine.generate(prompts(), 3, once)
    assert seen == [1 + 5 + 16 + 23 + 32 + 40]
    engine.generate(prompts(), 3, once)
    assert seen[1:] == [1 + 5 + 8 + 7 + 8 + 8], "only what follows the last full page, or that page itself"
    engine.forget_prefixes()
    engine.generate(prompts(), 1, once)
    assert seen[2] == seen[0]
    by_fused_adamw(model)
    engine.generate(prompts(), 1, once)
    assert seen[3] == seen[0]


def test_a_found_prompt_changes_no_token():
    engine = RolloutEngine(small_model("llama"), page_size=8)
    first = engine.generate(prompts(), 2, WARM)
    assert ids(engine.generate(prompts(), 2, WARM)) == ids(first)


def test_a_callback_sees_every_completion_and_may_end_its_group(monkeypatch):
    model, seen = small_model("llama"), []
    expected = RolloutEngine(model).generate(prompts(), 4, WARM, first_rollout=10)

    def callback(place, rollout, completion):
        seen.append((place, rollout, completion.ids))
        return place == 2

    monkeypatch.setattr(engine_module, "MAX_SEQUENCES", 10)  # so that some rows wait
    groups = RolloutEngine(model).generate(prompts(), 4, WARM, first_rollout=10, on_completion=callback)
    assert [g for i, g in enumerate(ids(groups)) if i != 2] == [g for i, g in enumerate(ids(expected)) if i != 2]
    ended = [c for c in groups[2].completions if c.finish_reason != "cancelled"]
    cancelled = [c for c in groups[2].completions if c.finish_reason == "cancelled"]
    assert ended and cancelled
    for mine, whole in zip(groups[2].completions, expected[2].completions, strict=True):
        assert mine.ids == whole.ids[: len(mine.ids)] and len(mine.logprobs) == len(mine.ids)
        assert (mine.finish_reason == "cancelled") == (len(mine.ids) < len(whole.ids))
    by_place = [(p, 10 + i, c.ids) for p, g in enumerate(groups) for i, c in enumerate(g.completions)]
    assert sorted(seen) == sorted(
        x for x in by_place if groups[x[0]].completions[x[1] - 10].finish_reason != "cancelled"
    )


class FakeGraph:
    """Stand-in for a captured graph: it copies inputs into one buffer and repeats the same step."""

    made = 0

    def __init__(self, step, buffer, memory, stream):
        FakeGraph.made += 1
        self.step, self.buffer = step, buffer

    def __call__(self, flat):
        self.buffer.copy_(flat)
        return self.step(self.buffer)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_in_buckets_give_what_exact_ones_give(architecture, monkeypatch):
    model = small_model(architecture)
    expected = RolloutEngine(model, page_size=8).generate(prompts(), 3, WARM)
    engine = RolloutEngine(model, page_size=8)
    engine.generate(prompts(), 1, WARM)
    engine.runner.graphs.capture = FakeGraph
    FakeGraph.made = 0
    assert ids(engine.generate(prompts(), 3, WARM)) == ids(expected)
    made = FakeGraph.made
    assert 0 < made < 12
    assert ids(engine.generate(prompts(), 3, WARM)) == ids(expected)
    assert FakeGraph.made == made, "graphs are kept between calls"
    greedy = ids(engine.generate(prompts(), 1, GREEDY))
    assert greedy == ids(RolloutEngine(model).generate(prompts(), 1, GREEDY)) and FakeGraph.made > made
    model.model.layers[0].self_attn.k_proj.weight.data = model.model.layers[0].self_attn.k_proj.weight.data.clone()
    made = FakeGraph.made
    engine.generate(prompts(), 3, WARM)
    assert FakeGraph.made > made, "weights that moved are no longer where the graph reads them"


def test_sizes_are_captured_when_they_come_for_the_third_time():
    engine = RolloutEngine(small_model("llama"), max_pages=8)
    engine.generate([[5]], 1, SamplingParams(1))
    engine.runner.graphs.capture, FakeGraph.made = FakeGraph, 0
    two_steps = SamplingParams(3)
    engine.generate([[5]], 1, two_steps)
    assert FakeGraph.made == 0
    engine.generate([[5]], 1, two_steps)
    assert FakeGraph.made == 1
    engine.generate([[5]] * 3, 1, two_steps)
    assert FakeGraph.made == 1 and len(engine.runner.graphs) == 1
    engine.runner.graphs._baked = ()  # as if the pool had moved
    engine.generate([[5]], 1, two_steps)
    assert FakeGraph.made == 2, "it has come often enough"


@pytest.mark.soak
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_compiled_step_gives_what_an_eager_one_gives(architecture, monkeypatch):
    """Traced and functionalized, without the slow code generation: cache writes must be kept."""
    compile, graphs = torch.compile, []

    def aot(function, **options):
        graphs.append(function)
        return compile(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", aot)
    model = small_model(architecture)
    engine = RolloutEngine(model, page_size=8, compile=True)
    assert ids(engine.generate(prompts(), 3, WARM)) == ids(RolloutEngine(model).generate(prompts(), 3, WARM))
    assert len(graphs) == 1


def test_models_with_hooks_and_failed_captures_run_eagerly():
    model = small_model("llama")
    expected = ids(RolloutEngine(model).generate(prompts(), 1, GREEDY))
    engine = RolloutEngine(model)
    engine.generate([[5]], 1, GREEDY)
    engine.runner.graphs.capture = lambda *_: pytest.fail("a hook would run at the capture only")
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    assert ids(engine.generate(prompts(), 1, GREEDY)) == expected
    hook.remove()

    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    engine.runner.graphs.capture = fails
    with pytest.warns(UserWarning, match="without CUDA graphs, because capturing one failed: operation not permitted"):
        assert ids(engine.generate(prompts(), 1, GREEDY)) == expected
    assert ids(engine.generate(prompts(), 1, GREEDY)) == expected


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need a GPU")
def test_graphs_are_in_use_on_a_gpu_also_after_the_pool_has_grown():
    model = small_model("llama")
    engine = RolloutEngine(model, page_size=8)
    for n in (1, 3, 6):
        expected = RolloutEngine(model, page_size=8)
        expected.generate([[5]], 1, GREEDY)
        expected.runner.graphs.capture = None
        assert ids(engine.generate(prompts(), n, WARM)) == ids(expected.generate(prompts(), n, WARM))
        assert engine.runner.graphs and engine.runner.graphs.capture is not None


def test_a_pool_made_in_inference_mode_serves_outside_of_it():
    model = small_model("llama")
    engine = RolloutEngine(model)
    with torch.inference_mode():
        first = engine.generate(prompts(), 1, GREEDY)
    assert ids(engine.generate(prompts(), 1, GREEDY)) == ids(first)


def test_bf16_logprobs_err_no_more_than_trainings():
    model = small_model("llama").bfloat16()
    groups = RolloutEngine(model, page_size=8).generate(prompts(), 8, WARM)
    batch = pack([PackedGroup(g.prompt_ids, [c.ids for c in g.completions]) for g in groups], DEVICE)

    def trained(model):
        with toolx_attention(model), torch.no_grad():
            hidden = batch.hidden(model)
            return linear_logprob(hidden, targets=batch.targets, temperature=0.8, **head_of(model)).logprobs

    sampled = torch.tensor([logp for g in groups for c in g.completions for logp in c.logprobs], device=DEVICE)
    ours = trained(model)
    exact = trained(model.float())
    error, same_dtype = ((x - exact).pow(2).mean().sqrt() for x in (sampled, ours))
    assert 0 < error <= 1.2 * same_dtype, (error, same_dtype)


def test_siblings_are_samples_of_the_models_distribution():
    """Chi-square of the siblings' first two tokens against the model; siblings share all pages, then copy one."""
    from scipy.stats import chisquare

    model, n = small_model("llama"), 2000
    [prompt] = prompts((11,))
    [group] = RolloutEngine(model, page_size=4).generate([prompt], n, SamplingParams(2))
    drawn = torch.tensor([c.ids for c in group.completions])
    first = drawn[:, 0].mode().values

    def p_value(prefix, tokens):
        with torch.no_grad():
            expected = model(torch.tensor([prefix], device=DEVICE)).logits[0, -1].double().softmax(-1).cpu() * len(
                tokens
            )
        counts = torch.bincount(tokens, minlength=VOCAB).double()
        common = expected >= 5
        observed = [*counts[common].tolist(), float(counts[~common].sum())]
        wanted = [*expected[common].tolist(), float(expected[~common].sum())]
        return chisquare(observed, wanted).pvalue

    assert p_value(prompt, drawn[:, 0]) > 1e-3
    assert p_value([*prompt, int(first)], drawn[drawn[:, 0] == first, 1]) > 1e-3


def test_a_callback_cannot_call_the_engine_that_called_it():
    engine = RolloutEngine(small_model("llama"))
    with pytest.raises(InputError, match="is already running, in another thread or around its own on_completion"):
        engine.generate([[5]], 1, GREEDY, on_completion=lambda *_: engine.generate([[6]], 1, WARM))
    assert engine.generate([[5]], 1, GREEDY)


def test_threads_share_a_model_but_not_an_engine():
    model = small_model("llama").train()
    engine, other = RolloutEngine(model), RolloutEngine(model)
    expected, own = ids(other.generate(prompts(), 2, WARM)), model.config._attn_implementation
    inside, entered, refused = [], threading.Event(), []

    def second():
        with pytest.raises(InputError, match="is already running, in another thread"):
            engine.generate([[6]], 1, WARM)
        refused.append(True)
        entered.set()
        RolloutEngine(model)
        inside.append(other.generate(prompts(), 2, WARM))

    def callback(*_):
        if not thread.ident:
            thread.start()
            assert entered.wait(60)
            thread.join(0.05)  # it goes on only after this call
        inside.append(None)

    thread = threading.Thread(target=second)
    assert ids(engine.generate(prompts(), 2, WARM, on_completion=callback)) == expected
    thread.join()
    assert refused and ids(inside.pop()) == expected and inside == [None] * 2 * len(expected)
    assert model.training and model.config._attn_implementation == own


def test_a_callback_may_call_another_engine_on_the_model():
    model = small_model("llama")
    engine, other, found = RolloutEngine(model), RolloutEngine(model), []
    expected = ids(engine.generate([[5, 6]], 2, WARM))
    engine.generate([[5, 6]], 1, WARM, on_completion=lambda *_: found.append(other.generate([[5, 6]], 2, WARM)))
    assert [ids(groups) for groups in found] == [expected]


def test_an_engine_keeps_its_model():
    engine = RolloutEngine(small_model("llama"))
    with pytest.raises(AttributeError, match="model"):
        engine.model = small_model("qwen2")


def test_a_default_device_changes_nothing():
    model, prompt = small_model("llama"), prompts()[:2]
    usual = ids(RolloutEngine(model).generate(prompt, 2, WARM))
    case, streams = make_case(), torch.zeros(3, 5, dtype=torch.int64, device=DEVICE)
    group_ids = case["cu_seqlens"][1:].clone()
    with torch.device("meta"):
        assert ids(RolloutEngine(model).generate(prompt, 2, WARM)) == usual
        for recompute in (False, True):
            assert run_loss(linear_grpo_loss, case, GRPOLossConfig(recompute=recompute))[0].loss.isfinite()
        assert (sample(case["hidden"][:3], case["weight"], streams=streams, top_k=3).tokens >= 0).all()
        assert group_advantages(case["rewards"], group_size=4).isfinite().all()
        assert group_advantages(case["rewards"], group_ids=group_ids).isfinite().all()


def test_an_engine_may_be_built_in_inference_mode_but_not_its_model():
    model = small_model("llama")
    with torch.inference_mode():
        engine = RolloutEngine(model)
        made = small_model("llama")
    assert engine.generate([[5]], 1, GREEDY)
    with pytest.raises(InputError, match="LlamaForCausalLM was made under torch.inference_mode"):
        RolloutEngine(made)


def test_a_callback_may_call_the_model():
    model = small_model("llama")
    asked = torch.tensor([[5, 6, 7]], device=DEVICE)
    with torch.no_grad():
        expected = model.eval()(asked).logits
    engine, seen = RolloutEngine(model), []
    usual = ids(engine.generate(prompts(), 2, WARM))
    groups = engine.generate(prompts(), 2, WARM, on_completion=lambda *_: seen.append(model(asked).logits))
    assert ids(groups) == usual and len(seen) == 2 * len(groups)
    assert all(logits.equal(expected) for logits in seen)


def test_weights_that_are_not_finite_are_told_and_not_sampled_from():
    engine = RolloutEngine(model := small_model("llama"))
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(DivergedError, match=r"log-probs are not finite on prompt 0 \(row 3\), completion 0"):
        engine.generate([[5]], 2, WARM, row_ids=[3])
    with pytest.raises(InputError, match="should be equal and finite"):
        RolloutEngine(model)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"page_size": 10**30}, "page_size=1000000000000000000000000000000 must be at least 1 and at most 65,536"),
        ({"page_size": 16.0}, "page_size=16.0 must be a whole number"),
        ({"max_pages": 10**12}, "max_pages=1000000000000 must be at least 1 and at most 4,194,304"),
        ({"max_pages": "8"}, "max_pages='8' must be a whole number"),
        ({"page_size": 2**16, "max_pages": 2**22}, "page_size=65536 with max_pages=4194304 takes .* GiB, but .* has"),
        ({"seed": "a"}, "seed='a' must be a whole number"),
        ({"seed": 2**32}, "seed=4294967296 must be at least 0 and at most 4,294,967,295"),
        ({"compile": "yes"}, "compile='yes' must be True or False"),
        ({"model": None}, "NoneType cannot be run exactly"),
        ({"model": torch.nn.DataParallel(torch.nn.Linear(2, 2))}, "not a PreTrainedModel .*, but its module may be"),
        ({"model": small_model("llama").to("meta")}, r"without weights \(on the meta device\)"),
    ],
)
def test_an_engine_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        RolloutEngine(**{"model": small_model("llama")} | arguments)


def test_a_sharded_model_is_refused():
    class DTensor(torch.nn.Parameter):
        pass

    model = small_model("llama")
    model.lm_head.weight = DTensor(model.lm_head.weight)
    with pytest.raises(InputError, match=r"its weights are sharded \(FSDP's fully_shard\)"):
        RolloutEngine(model)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_new_tokens": 10**30}, "max_new_tokens=10+ must be at least 1 and at most 1,048,576"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4' must be a whole number"),
        ({"temperature": "a"}, "temperature='a' must be a number"),
        ({"temperature": math.inf}, "temperature=inf must be 0"),
        ({"temperature": 1e-300}, r"temperature=1e-300 must be 0 \(greedy\), or from 1e-30 to 1e\+30"),
        ({"temperature": torch.tensor(0.5)}, r"temperature=tensor\(0.5000\) must be a number"),
        ({"top_k": 1.0}, "top_k=1.0 must be a whole number"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": None}, "top_p=None must be a number"),
        ({"top_p": math.nan}, r"top_p=nan must lie in \(0, 1\]"),
        ({"min_p": 2}, r"min_p=2 must lie in \[0, 1\]"),
        ({"stop_token_ids": 2}, "stop_token_ids=2 must be token ids"),
        ({"stop_token_ids": "ab"}, "stop_token_ids='ab' must be token ids"),
        ({"stop_token_ids": (True,)}, r"stop_token_ids=\(True,\) must be token ids"),
    ],
)
def test_sampling_parameters_are_checked(wrong, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(**{"max_new_tokens": 4} | wrong)


def test_prompts_may_be_tensors_and_arrays():
    engine = RolloutEngine(small_model("llama"))
    expected = ids(engine.generate(prompts(), 1, GREEDY))
    assert ids(engine.generate([torch.tensor(p) for p in prompts()], 1, GREEDY)) == expected
    assert ids(engine.generate([list(np.array(p)) for p in prompts()], 1, GREEDY, row_ids=np.arange(6))) == expected


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"row_ids": ["a"]}, "row id='a' must be a whole number from 0"),
        ({"row_ids": [2**32]}, "row id=4294967296 must"),
        ({"step": -1}, "step=-1 must"),
        ({"first_rollout": 2**32 - 1}, "rollout=4294967296 must"),
        ({"params": SamplingParams(4, stop_token_ids=(131,))}, "stop token 131 is outside the vocabulary of 131"),
        ({"row_ids": [True]}, "row id=True must be a whole number from 0"),
        ({"row_ids": [0, 1]}, "2 row_ids for 1 prompts"),
        ({"row_ids": 3}, "row_ids is 3: give a list of whole numbers"),
        ({"first_rollout": "a"}, "first_rollout is 'a': give a whole number or a list of them"),
        ({"first_rollout": None}, "first_rollout=None must be a whole number"),
        ({"limits": ["a"]}, "limits holds 'a': give a list of whole numbers"),
        ({"step": "a"}, "step='a' must be a whole number"),
        ({"prompts": [[5, "x"]]}, r"Prompt 0 \(row 0\) holds token id 'x'"),
        ({"prompts": [[5, True]]}, r"Prompt 0 \(row 0\) holds token id True, outside the vocabulary of 131: ids are"),
        ({"prompts": [[5.0]]}, "holds token id 5.0"),
        ({"prompts": [torch.tensor([5.5])]}, "holds token id 5.5"),
        ({"prompts": [[10**30]]}, "holds token id 1000000"),
        ({"prompts": [[5], [[6]]]}, r"Prompt 1 \(row 1\) holds token id \[6\]"),
        ({"prompts": [5, 6]}, "prompt 0 is 5: give a list of token ids"),
        ({"prompts": [[5], None]}, "prompt 1 is None: give a list of token ids"),
        ({"prompts": ["hello"]}, "prompt 0 is 'hello': give a list of token ids"),
        ({"prompts": None}, "prompts is None: give a list of prompts, each a list of token ids"),
        ({"prompts": "hello"}, "prompts is 'hello': give a list of prompts"),
        ({"prompts": [torch.zeros(2, device="meta")]}, "prompt 0 is tensor.* give a list of token ids"),
        ({"n": 10**9}, "n=1000000000 must be at least 1 and at most 1,048,576"),
        ({"n": 2**20, "prompts": [[5], [6]]}, "n=1048576 completions of 2 prompts are 2,097,152: sample at most"),
        ({"n": "2"}, "n='2' must be a whole number"),
        ({"n": True}, "n=True must be a whole number"),
        ({"params": {"max_new_tokens": 4}}, r"params is {'max_new_tokens': 4}: pass SamplingParams"),
        ({"on_completion": 3}, "on_completion=3 must be a function"),
    ],
)
def test_words_of_a_stream_and_tokens_are_checked_and_cost_no_pool(arguments, message):
    engine = RolloutEngine(small_model("llama"))
    engine.generate([[5]], 1, GREEDY)
    pool = engine.pool
    with pytest.raises(InputError, match=message):
        engine.generate(**({"prompts": [[5]], "n": 2, "params": GREEDY} | arguments))
    assert engine.pool is pool


def test_autocast_around_a_call_changes_nothing():
    model = small_model("llama")
    expected = RolloutEngine(model).generate(prompts(), 1, GREEDY)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert RolloutEngine(model).generate(prompts(), 1, GREEDY)[1].completions[0] == expected[1].completions[0]


def test_seed_step_row_and_rollout_each_change_the_noise():
    model = small_model("llama")
    prompt = prompts((16,))
    base = RolloutEngine(model).generate(prompt, 2, WARM)
    assert base[0].completions[0].ids != base[0].completions[1].ids
    assert ids(RolloutEngine(model, seed=1).generate(prompt, 2, WARM)) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM, step=1)) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM, row_ids=[7])) != ids(base)
    assert ids(RolloutEngine(model).generate(prompt, 2, WARM)) == ids(base)


def by_hand(model):
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))


def by_fused_adamw(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()


def of_one_value(model):
    model.model.layers[0].self_attn.k_proj.weight.data[0] *= -50


def by_moving_rows(model):
    weight = model.model.embed_tokens.weight.data
    weight.copy_(weight.roll(1, 0))


def by_a_setting(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


@pytest.mark.parametrize("update", [by_hand, by_fused_adamw, of_one_value, by_moving_rows, by_a_setting])
def test_new_weights_serve_from_the_first_token_on(update):
    model = small_model("llama")
    engine = RolloutEngine(model, page_size=4)
    before = engine.generate(prompts(), 1, GREEDY)
    update(model)
    after = engine.generate(prompts(), 1, GREEDY)
    assert ids(after) == ids(RolloutEngine(model).generate(prompts(), 1, GREEDY)) != ids(before)
    assert after[2].completions[0].logprobs[0] != before[2].completions[0].logprobs[0]


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
    kept, small = engine.pool, engine.pool.n_pages
    engine.generate(prompts((4,)), 1, GREEDY)
    assert engine.pool is kept and kept.n_pages == small
    expected = ids(RolloutEngine(engine.model, page_size=8).generate(prompts((40, 40)), 4, GREEDY))
    assert ids(engine.generate(prompts((40, 40)), 4, GREEDY)) == expected
    assert engine.pool is kept and kept.n_pages > small


def test_the_pool_grows_seldom():
    """Growing it discards the graphs that read it."""
    engine, seen = RolloutEngine(small_model("llama"), page_size=4), set()
    for n in range(1, 10):
        engine.generate([[5] * 40], n, SamplingParams(8, stop_token_ids=range(VOCAB)))
        seen.add(engine.pool.n_pages)
    assert seen == {16, 32}  # the calls need 12 to 28 pages


@pytest.mark.parametrize(
    "prompt, n, options, message",
    [
        ([1, 2], 0, {}, "n=0"),
        ([], 1, {}, r"Prompt 1 \(row 8\) is empty"),
        ([5, 131], 1, {}, r"Prompt 1 \(row 8\) holds token id 131"),
        ([5, -1], 1, {}, r"Prompt 1 \(row 8\) holds token id -1"),
        ([5] * 128, 1, {}, r"Prompt 1 \(row 8\) has 128 tokens, but the model's context is 128"),
        ([5] * 90, 1, {"max_pages": 3}, r"Prompt 1 \(row 8\) with 90 tokens needs 7 pages"),
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
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 3.5},
        {"temperature": -1},
        {"temperature": 1e-40},
        {"top_p": 0},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"stop_token_ids": 2},
    ],
)
def test_bad_sampling_parameters_are_named(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(InputError, match=f"{name}={value}"):
        SamplingParams(**({"max_new_tokens": 4} | settings))
    with pytest.raises(InputError, match="page_size=0"):
        RolloutEngine(small_model("llama"), page_size=0)
    with pytest.raises(InputError, match="max_pages=0 must be at least 1 and"):
        RolloutEngine(small_model("llama"), max_pages=0)


def test_prefill_in_several_batches(monkeypatch):
    model = small_model("llama")
    expected = ids(RolloutEngine(model).generate(prompts(), 1, GREEDY))
    monkeypatch.setitem(runner_module.MAX_PREFILL_TOKENS, DEVICE.type, 30)
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
    out, _ = attention_function(
        module, query, key, key, None, scaling=0.5, toolx=Context(), softcap=2.0, sliding_window=7
    )
    assert seen == [(3, (5, 4, 8), (5, 2, 8), 0.5, 2.0, 7)]
    assert torch.equal(out, query.transpose(1, 2))


def test_no_prompts():
    assert RolloutEngine(small_model("llama")).generate([], 3, GREEDY) == []
