"""Whole runs of tiny random models with the chat templates of real families: the right answer earns the reward."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tests.chat_templates import family_tokenizer
from toolx_kernels.cli import main
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.rows import Row

TOOL = {"name": "ping", "parameters": {"type": "object", "properties": {"host": {"type": "string"}}}}
CALLS = [{"name": "ping", "arguments": {"host": "oslo"}}]
ROWS = [{"id": name, "prompt": "Ping oslo.", "tools": [TOOL], "answer": CALLS} for name in ("a", "b")]
MODELS = {
    "llama3": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}
CANONICAL = {
    "llama3": '{"name": "ping", "parameters": {"host": "oslo"}}',
    "mistral": '[TOOL_CALLS] [{"name": "ping", "arguments": {"host": "oslo"}}]',
    "qwen3": '<tool_call>\n{"name": "ping", "arguments": {"host": "oslo"}}\n</tool_call>',
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path):
    """A random model with the template of its family, which must learn everything."""
    import torch

    row = Row("", ROWS[0]["prompt"], [{"type": "function", "function": TOOL}], CALLS)
    raw = Chat(family_tokenizer(request.param))
    tokenizer = family_tokenizer(request.param, raw.prompt_text(row) + raw.tool_format.render(CALLS))
    kind, config = MODELS[request.param]
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    model = kind(
        config(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **sizes,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path, request.param


FLAGS = (
    "--cold_start_steps 40 --cold_start_batch_size 1 --cold_start_learning_rate 1e-2 "
    "--cold_start_demonstrations 0 --max_steps 1 --prompts_per_step 1 --num_generations 2 --temperature .2 "
    "--hard_sampling none --probe_rollouts 1 --max_completion_length 64 --learning_rate 1e-9 --log_completions 2"
)


def test_the_canonical_answer_earns_the_reward(folder):
    path, family = folder
    rows = str(path / "rows.jsonl")
    data = ["--model", str(path / "model"), "--dataset", rows, "--eval_dataset", rows]
    assert main(["train", *data, "--output_dir", str(path / "run"), *FLAGS.split()]) == 0
    lines = [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["event"] == "step"]
    assert step["reward"] == step["accuracy"] == 1.0
    rollouts = [json.loads(line) for line in (path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {rollout["completion"] for rollout in rollouts} == {CANONICAL[family]}
    scored = ["--model", str(path / "run"), "--dataset", rows, "--output", str(path / "scores")]
    assert main(["eval", *scored, "--max_completion_length", "64"]) == 0
    assert json.loads((path / "scores" / "scores.json").read_text())["scores"][rows]["accuracy"] == 1.0
