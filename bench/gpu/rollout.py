"""Rollout facts on a GPU: errors, tokens per second, and decode steps compared with the floor."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen2Config

from bench.common import timing
from bench.gpu.loss import profiled
from bench.gpu.runner import Bench, Fact
from bench.rollout.cases import Case, make_prompts, model_of
from bench.rollout.measure import measure
from bench.rollout.providers import PEERS, RolloutProvider, ToolxCompiled
from toolx_kernels import RolloutEngine, SamplingParams, linear_logprob

QWEN_05B = Case("qwen2.5-0.5b-shape", 32, 1000, 10, 256, limit_s=30.0)
TOY = Case("tiny", 2, 20, 3, 6)


def exact(bench: Bench) -> dict:
    """Compares greedy tokens with those of ``generate``, and log-probs with those of ``linear_logprob``, in fp32."""
    sizes = dict(vocab_size=20_011, hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    if bench.toy:
        sizes = dict(vocab_size=503, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
    failures, worst, graphs = [], 0.0, 0
    for config in (LlamaConfig(**sizes), Qwen2Config(**sizes)):
        torch.manual_seed(0)
        with bench.device:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        model.generation_config = GenerationConfig()
        g = torch.Generator().manual_seed(0)
        prompts = [torch.randint(3, sizes["vocab_size"], (n,), generator=g).tolist() for n in (9, 33, 50)]
        engine = RolloutEngine(model)
        new = 6 if bench.toy else 24
        greedy = engine.generate(prompts, 1, SamplingParams(new, temperature=0.0))
        for group in greedy:
            ids = torch.tensor([group.prompt_ids], device=bench.device)
            config_ = GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0)
            theirs = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config_)
            if theirs[0, ids.shape[1] :].tolist() != list(group.completions[0].ids):
                failures.append(f"{config.model_type}: greedy tokens differ from generate's")
        for group in engine.generate(prompts, 4, SamplingParams(new, temperature=0.8)):
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt_ids, *completion.ids]], device=bench.device)
                with torch.no_grad():
                    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
                    start = len(group.prompt_ids)
                    predicting = hidden[start - 1 : -1]
                    now = linear_logprob(predicting, model.lm_head.weight, ids[0, start:], temperature=0.8).logprobs
                worst = max(worst, float((now.cpu() - torch.tensor(completion.logprobs)).abs().max()))
        graphs += len(engine.runner.graphs)
    if not worst <= 1e-4:
        failures.append(f"log-probs differ from linear_logprob's by {worst:.2g}")
    if bench.device.type == "cuda" and not graphs:
        failures.append("no CUDA graph is in use")
    return {"logprob_difference": worst, "graphs": graphs, "failures": failures}


def first_call(bench: Bench) -> dict:
    """Seconds of a new engine's first call, which compiles kernels and captures graphs, and of a second call."""
    case = TOY if bench.toy else QWEN_05B
    model, tokens = model_of(case.model, case.dtype, bench.device), min(case.new, 64)
    engine, seconds = RolloutEngine(model), []
    for seed in range(2):
        prompts = make_prompts(case, model.get_output_embeddings().weight.shape[0], seed)
        began = time.perf_counter()
        engine.generate(prompts, case.n, SamplingParams(tokens))
        seconds.append(round(time.perf_counter() - began, 3))
    return {"first_s": seconds[0], "again_s": seconds[1], "graphs": len(engine.runner.graphs), "tokens": tokens}


def timed(
    case: Case,
    peers: Sequence[type[RolloutProvider]] = (),
    *,
    seconds: float = 40,
    rounds: int = 2,
    label: str = "time",
) -> Fact:
    """Times whole calls of ours and peers in turn, and the floor of a decode step; measures KV memory."""

    def find(bench: Bench) -> dict:
        its_case = TOY if bench.toy else case
        measured = measure(its_case, peers if bench.device.type == "cuda" else (), bench.device, rounds)
        (ours, *others), floor = measured["records"], measured["floor"]
        found = {name: ours[name] for name in ("tokens_per_s", "step_ms", "prefill_s", "whole_s", "kv_mib", "peak_mib")}
        found |= {
            "step_to_floor": round(ours["step_ms"] / floor["ms"], 2),
            "share_of_bandwidth": round(floor["bytes_ms"] / ours["step_ms"], 3),
            "kv_share": round(ours["kv_mib"] / measured["case"]["kv_duplicated_mib"], 3),
            "note": ours["note"],
            "floor": floor,
        }
        return found | ({"others": others} if others else {})

    return Fact(f"rollout/{label} {case.model}", seconds, find)


def peers(case: Case) -> Fact:
    return timed(case, (ToolxCompiled, *PEERS), seconds=80, rounds=1, label="peers")


def kernels(bench: Bench) -> dict:
    """The time of four decode steps, kernel by kernel, sampling included."""
    case = TOY if bench.toy else QWEN_05B
    model = model_of(case.model, case.dtype, bench.device)
    engine = RolloutEngine(model)
    prompts = make_prompts(case, model.get_output_embeddings().weight.shape[0], 0)
    for new in (1, 5, 5):  # prefixes are in the pool afterwards, and graphs are captured
        engine.generate(prompts, case.n, SamplingParams(new))
    return profiled(lambda: engine.generate(prompts, case.n, SamplingParams(5)), bench, listed=24)


def prefill(bench: Bench) -> dict:
    """The time of prompts that are not in the pool, kernel by kernel: a call for one token of each row."""
    case = TOY if bench.toy else QWEN_05B
    model = model_of(case.model, case.dtype, bench.device)
    engine, seeds = RolloutEngine(model), iter(range(9))

    def call():
        prompts = make_prompts(case, model.get_output_embeddings().weight.shape[0], next(seeds))
        engine.generate(prompts, case.n, SamplingParams(1))

    return profiled(call, bench, listed=12)


def ragged(bench: Bench) -> dict:
    """Times rows that end at different times, as in training: the batch shrinks, and its size changes often."""
    case = TOY if bench.toy else replace(QWEN_05B, length=300)
    model = model_of(case.model, case.dtype, bench.device)
    limits = [max(1, case.new * (place + 1) // case.prompts) for place in range(case.prompts)]
    engine, seconds = RolloutEngine(model), []
    for seed in range(4):
        prompts = make_prompts(case, model.get_output_embeddings().weight.shape[0], seed)
        call = lambda: engine.generate(prompts, case.n, SamplingParams(case.new), limits=limits)  # noqa: E731, B023
        seconds.append(round(timing.seconds(call, bench.device), 3))
    tokens = case.n * sum(limits)
    return {
        "calls_s": seconds,
        "tokens_per_s": round(tokens / seconds[-1]),
        "graphs": len(engine.runner.graphs) if bench.device.type == "cuda" else 0,
    }
