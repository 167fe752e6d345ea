"""Models table of docs/models.md: which architectures run exactly.

    python -m bench.models_table            all of transformers' causal LMs, in about a minute, offline
    python -m bench.models_table llama gpt2 prints these only

Each architecture is tried from its default config as in ``toolx plan``, in a separate process with a minute of time and
bounded memory. ``AS_RELEASED`` has the settings of published models that the defaults lack.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import resource
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from toolx_kernels.engine import RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError, first_line
from toolx_kernels.models.bridge import head_of, toolx_attention
from toolx_kernels.models.shape import SUPPORTED, has_experts
from toolx_kernels.models.support import check_config
from toolx_kernels.ops.lm_head.linear_logprob import linear_logprob
from toolx_kernels.train.update.batch import PackedGroup, pack

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SECONDS = 60
MEMORY = 12 << 30  # bytes of address space
MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.0156)
AS_RELEASED: dict[str, dict] = {
    "deepseek_v2": dict(num_experts_per_tok=6),
    "dots1": dict(n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=2, first_k_dense_replace=1),
    "granite": dict(logits_scaling=8.0, **MULTIPLIERS),
    "granitemoe": dict(logits_scaling=6.0, **MULTIPLIERS),
    "granitemoeshared": dict(logits_scaling=6.0, **MULTIPLIERS),
    "hunyuan_v1_dense": dict(head_dim=128),
    "hunyuan_v1_moe": dict(head_dim=128, num_experts=16),
    "hyperclovax": dict(logits_scaling=0.125, **MULTIPLIERS),
    "lfm2": dict(layer_types=["conv", "conv", "full_attention", "conv"] * 8),
    "lfm2_moe": dict(layer_types=["conv", "conv", "full_attention", "conv"] * 8),
    "minimax_m3_vl_text": dict(layer_types=["full_attention", "minimax_m3_sparse"] * 30),
    "ministral": dict(head_dim=128),
    "nemotron": dict(num_key_value_heads=8),
}


class Result(NamedTuple):
    verdict: str  # exact, refused or untried
    said: str  # the largest difference, or why


def result_of(name: str) -> Result:
    """The result of one architecture, in this process."""
    try:
        config = CONFIG_MAPPING[name](**AS_RELEASED.get(name, {}))
    except Exception as error:
        return Result("untried", f"its config has no defaults ({first_line(error)})")
    try:
        difference = check_config(config)
    except InputError as refusal:
        said = str(refusal).removesuffix(".").removesuffix(SUPPORTED).rstrip(";: ")
        if made := re.fullmatch(r"No language model can be made from a \S+ config \((.*)\)", said, re.DOTALL):
            return Result("untried", f"its default config makes no model ({made[1]})")
        return Result("refused", said.partition("cannot be run exactly: ")[2] or said)
    experts = ", experts" if has_experts(config.get_text_config(decoder=True)) else ""
    return Result("exact", f"{difference:.0e}{experts}")


def _apart(name: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    pipe.send(result_of(name))


def result_apart(name: str) -> Result:
    """The result of one architecture, in a process that is killed when its time is up."""
    context = multiprocessing.get_context("fork")  # so that the process has all imports of this one
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(name, there))
    process.start()
    there.close()
    try:
        return here.recv() if here.poll(SECONDS) else Result("untried", f"it takes longer than {SECONDS} s")
    except EOFError:
        return Result("untried", f"its process needs more than {MEMORY >> 30} GiB or dies")
    finally:
        process.kill()
        process.join()


def gap(kind: str, dtype: torch.dtype, **settings) -> tuple[float, float]:
    """The largest and the mean distance of a trainer's log-probs from the sampler's, of 3 random models."""
    sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8, head_dim=32)
    tokens = dict(vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    distances = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, **sizes, **tokens, num_key_value_heads=4, initializer_range=0.1, **settings)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        prompts = [torch.randint(3, 1000, (length,)).tolist() for length in (20, 40, 60, 80)]
        groups = RolloutEngine(model).generate(prompts, 8, SamplingParams(32, stop_token_ids=(2,)))
        batch = pack([PackedGroup(group.prompt_ids, [c.ids for c in group.completions]) for group in groups], "cpu")
        with toolx_attention(model), torch.no_grad():
            trained = linear_logprob(batch.hidden(model), targets=batch.targets, **head_of(model)).logprobs
        sampled = torch.tensor([p for group in groups for c in group.completions for p in c.logprobs])
        distances.append((trained - sampled).abs())
    together = torch.cat(distances)
    return float(together.max()), float(together.mean())


def table(results: dict[str, Result]) -> str:
    """Tables in Markdown of what is exact, what is refused, and what was not tried."""
    parts = []
    heads = {
        "exact": ("exact", "largest difference of a log-prob"),
        "refused": ("refused", "because"),
        "untried": ("not tried", "because"),
    }
    for verdict, (head, column) in heads.items():
        rows = {name: result.said for name, result in results.items() if result.verdict == verdict}
        parts += [f"### {len(rows)} {head}", "", f"| architecture | {column} |", "|---|---|"]
        parts += [f"| `{name}` | {' '.join(said.split()).replace('|', '/')} |" for name, said in sorted(rows.items())]
        parts.append("")
    return "\n".join(parts)


def experts() -> str:
    """The effect of a mixture of experts, in a sentence."""
    at_most = {}
    mixture = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128)
    for kind, settings in (("qwen3", {}), ("qwen3_moe", mixture)):
        for dtype in (torch.float32, torch.bfloat16):
            at_most[kind, dtype] = "{:.2g} (mean {:.2g})".format(*gap(kind, dtype, **settings))
    of_mixture, of_dense = (
        f"in bfloat16 {at_most[kind, torch.bfloat16]}, in float32 {at_most[kind, torch.float32]}"
        for kind in ("qwen3_moe", "qwen3")
    )
    return (
        f"Random Qwen3-MoE models (4 layers of width 256, 4 of 16 experts): {of_mixture}; dense Qwen3 models, for "
        f"comparison: {of_dense}.\n"
    )


def put(page: str, name: str, text: str) -> str:
    """The page with ``text`` between the markers of that name."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, after = page.split(begin)[0], page.split(end)[1]
    return f"{before}{begin}{text}{end}{after}"


def main(names: Sequence[str]) -> None:
    wanted = names or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = {name: result_apart(name) for name in wanted}
    if names:
        print(table(results))
        return
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    page = put(PAGE.read_text(), "architectures", f"With {versions}:\n\n{table(results)}")
    PAGE.write_text(put(page, "experts", experts()))


if __name__ == "__main__":
    main(sys.argv[1:])
