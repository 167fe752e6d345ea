"""Tools in several turns: rollouts that call a Python function, and a reward on the final answer alone.

python examples/tools_in_turns.py   # prints the mean reward of each step, then what the best rollout wrote in its turns
"""

import json
from itertools import cycle
from pathlib import Path

from transformers.utils import get_json_schema

from toolx_kernels import ToolExpanderConfig, ToolExpanderTrainer
from toolx_kernels.toolcall import Episode, rows_from

MODEL = "tiny"  # for a real model: "Qwen/Qwen2.5-0.5B-Instruct", and the values behind the settings below
RUN = Path("runs/tools-in-turns")
RATES = {"hotel": 96, "flight": 80, "concert": 35, "tour": 24, "boat": 17, "dinner": 42}


def rate(item: str) -> int:
    """Look up what an item costs.

    Args:
        item: What is asked for.
    """
    return RATES[item]


def right_rate(prompts, completions, completion_ids, item, **columns) -> list[float]:
    """1 where the last turn tells the right number. A completion is a list of messages, tool results included."""
    return [float(str(RATES[i]) in turns[-1]["content"]) for turns, i in zip(completions, item, strict=True)]


def episode(row) -> Episode:
    """A call, its result and an answer to imitate: random weights would never call anything."""
    item = row.columns["item"]
    call = {"role": "assistant", "calls": [{"name": "rate", "arguments": {"item": item}}]}
    result = {"role": "tool", "name": "rate", "content": str(RATES[item])}
    return Episode(row, [call, result, {"role": "assistant", "content": str(RATES[item])}])


prompts = {item: [{"role": "user", "content": f"Check the rate: {item}"}] for item in RATES}
row = {"tools": [get_json_schema(rate)], "answer": []}  # the calls that answer are for the default reward, unused here
rows = rows_from([row | {"prompt": prompt, "item": item} for item, prompt in prompts.items()])
args = ToolExpanderConfig(
    output_dir=str(RUN),
    overwrite=True,
    prompts_per_step=6,
    num_generations=8,
    max_steps=6,
    max_completion_length=40,  # 256; of all turns together
    max_tool_calling_iterations=2,
    learning_rate=5e-4,  # 1e-6
    cold_start_steps=16,  # 0
    cold_start_batch_size=12,
    cold_start_learning_rate=4e-3,
)
ToolExpanderTrainer(MODEL, right_rate, args, rows, tools=[rate], cold_start=cycle(map(episode, rows))).train()
log = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
print("mean reward:", " ".join(f"{line['reward']:.2f}" for line in log if line["event"] == "step"))
rollouts = [json.loads(line) for line in (RUN / "rollouts.jsonl").open()]
print(max(rollouts, key=lambda rollout: rollout["reward"])["completion"])
