"""Rollouts and training on the pretended GPU, compared with the CPU; ``test_pretended_gpu`` runs this file."""

from functools import cache

import pytest
import torch

from tests.ops.cases import error
from tests.small_models import ARCHITECTURES, small_model
from tests.without_gpu.pretended_gpu import CUDA, Graph, Stream, log, on_cpu, variants, waits
from toolx_kernels import RolloutEngine, SamplingParams, ToolExpanderConfig, linear_grpo_loss
from toolx_kernels.engine.runner import MAX_PREFILL_TOKENS, Runner
from toolx_kernels.models.bridge import checkpointed, head_of, toolx_attention
from toolx_kernels.models.support import check_supported
from toolx_kernels.ops.attention import packed_flex
from toolx_kernels.train.update.adamw import make_optimizer
from toolx_kernels.train.update.batch import PackedGroup, pack

# ---- the device itself


def test_devices_do_not_mix():
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    for operation in (lambda: here + there, lambda: torch.cat([here, there]), lambda: there[:2] @ here[:2]):
        with pytest.raises(RuntimeError, match="the same device"):
            operation()
    assert (there * torch.tensor(2.0)).device == CUDA


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([1])],
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_waits_are_seen(wait):
    x = torch.ones(3, device="cuda")
    log.clear()
    wait(x)
    assert len(waits()) == 1
    with pytest.raises(RuntimeError, match="waits for the device in a captured step"):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            wait(x)
        finally:
            graph.capture_end()


def test_a_graph_repeats_what_was_captured():
    x, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    graph.capture_begin()
    y = (x * 2)[1:].add_(1)
    graph.capture_end()
    x.fill_(5)
    assert y.tolist() == [3, 3]
    graph.replay()
    assert y.tolist() == [11, 11]


# ---- rollouts


def smallest_model(architecture):
    """The small model with one layer, or two where layers differ: one with a window and one without."""
    model = small_model(architecture)
    model.config.num_hidden_layers = 2 if architecture == "gemma3" else 1
    del model.model.layers[model.config.num_hidden_layers :]
    return model


def to_gpu(model):
    model.to("cuda").tie_weights()  # moving tensors of a subclass unties them
    return model


def engines(architecture):
    """An engine on the GPU and one on the CPU."""
    models = to_gpu(smallest_model(architecture)), smallest_model(architecture)
    return [RolloutEngine(model, page_size=4) for model in models]


def samples(engine, n, n_tokens):
    [group] = engine.generate([[5, 6, 7, 8, 9]], n, SamplingParams(n_tokens, temperature=0.8))
    return [completion.ids for completion in group.completions]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_captured_step_never_waits_and_samples_what_the_cpu_does(architecture, monkeypatch):
    decode, steps = Runner.decode, []

    def watched(runner, inputs):
        replays, before = Graph.replays, len(waits())
        result = decode(runner, inputs)
        steps.append((Graph.replays - replays, len(waits()) - before))
        return result

    ours, theirs = engines(architecture)
    expected = samples(theirs, 2, 5)
    monkeypatch.setattr(Runner, "decode", watched)
    assert samples(ours, 2, 5) == expected
    # each step waits once, for its result; the third is captured, and a wait in a capture would raise
    assert steps == [(0, 1), (0, 1), (1, 1), (1, 1)]


def test_a_call_waits_for_its_fingerprint_and_its_tokens_alone(monkeypatch):
    """It never waits for copies to the GPU, even if prompts are computed in several pieces."""
    ours, _ = engines("llama")
    monkeypatch.setitem(MAX_PREFILL_TOKENS, "cuda", 2)
    samples(ours, 2, 1)
    ours.forget_prefixes()
    log.clear()
    samples(ours, 2, 3)
    assert len(waits()) == 1 + 3, waits()


def test_graphs_follow_a_pool_that_moves_share_a_stream_and_compile_nothing_anew(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    ours, theirs = engines("llama")
    streams = Stream.made
    variants.clear()
    for n in (1, 1, 2, 1):
        assert samples(ours, n, 3) == samples(theirs, n, 3)
    assert Graph.replays and Stream.made == streams + 1
    assert len(emptied) == 2, "once in a call that captures, and no sooner"
    compiled = {name: len(seen) for name, seen in variants.items()}
    assert compiled.pop("attention_kernel") == 3  # a prompt, a shared prefix, the part behind the prefix
    assert set(compiled.values()) == {1}, compiled


def test_checking_a_model_compiles_no_flex_attention(monkeypatch):
    monkeypatch.setattr(packed_flex, "kernel", lambda *_, **__: pytest.fail("it is compiled"))
    check_supported(to_gpu(small_model("llama")))


# ---- training


@cache
def updates(optim, dtype, where):
    """The change of the weights in two steps, as one vector."""
    model = smallest_model("llama").to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model = to_gpu(model) if where == "cuda" else model
    groups = [PackedGroup([5, 6, 7, 8], [[9, 10, 11], [12, 13]]), PackedGroup([5, 6, 7], [[9, 10], [12, 13, 14]])]
    optimizer = make_optimizer(model, ToolExpanderConfig(optim=optim), 1e-2)
    for step in range(2):
        batch = pack(groups, where)
        with toolx_attention(model), checkpointed(model):
            out = linear_grpo_loss(
                batch.hidden(model),
                targets=batch.targets,
                cu_seqlens=batch.cu_seqlens,
                advantages=torch.tensor([1.0, -1.0, 0.5, -0.5], device=where),
                **head_of(model),
            )
            out.loss.backward()
            optimizer.collect()
        log.clear()
        optimizer.apply(1.0, (0, step))
        assert step == 0 or len(waits()) <= 1, waits()  # the one wait checks that the norm is finite
    optimizer.close()
    after = on_cpu({name: p.detach() for name, p in model.named_parameters()})
    return torch.cat([(after[name].float() - weight.float()).flatten() for name, weight in before.items()])


@pytest.mark.parametrize(
    "optim, dtype",
    [
        ("adamw", torch.float32),
        ("adamw", torch.bfloat16),
        ("adamw_stochastic", torch.bfloat16),
        ("adamw_offload", torch.bfloat16),
    ],
)
def test_training_steps_are_as_good_as_the_cpus(optim, dtype):
    truth = updates("adamw", torch.float32, "cpu")
    ours, theirs = (updates(optim, dtype, where) for where in ("cuda", "cpu"))
    assert error(ours, truth) <= error(theirs, truth) + (1e-3 if dtype == torch.float32 else 0.01)
