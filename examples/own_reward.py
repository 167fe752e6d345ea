"""A reward of your own on rows of your own: from a JSONL file through a few steps to a saved model that is asked once.

python examples/own_reward.py   # prints the mean reward of each step, then what the saved model answers
"""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from toolx_kernels import ToolExpanderConfig, ToolExpanderTrainer
from toolx_kernels.toolcall import parse_calls, read_dataset

MODEL = "tiny"  # for a real model: "Qwen/Qwen2.5-0.5B-Instruct", and the values behind the settings below
DATA, RUN = Path("runs/bookings.jsonl"), Path("runs/own-reward")
PROPERTIES = {"item": {"type": "string"}, "insured": {"type": "boolean"}}
BOOK = {"name": "book", "parameters": {"type": "object", "properties": PROPERTIES}}


def booking(item: str, insured: bool) -> list[dict]:
    return [{"name": "book", "arguments": {"item": item, "insured": insured}}]


def prefer_insured(prompts, completions, completion_ids, item, **columns) -> list[float]:
    """1 for the row's item with insurance, 0.5 without, 0 for anything else; ``item`` is a column of the rows."""
    made = [parse_calls(text) for text in completions]
    return [(m == booking(i, True)) + 0.5 * (m == booking(i, False)) for m, i in zip(made, item, strict=True)]


# a dozen rows: their answers show both kinds of booking, and the reward says which one is wanted
rows = [
    {"prompt": f"Please book a {item}.", "tools": [BOOK], "answer": booking(item, insured), "item": item}
    for item in ("flight", "hotel", "car", "boat", "tour", "concert")
    for insured in (True, False)
]
DATA.parent.mkdir(exist_ok=True)
DATA.write_text("".join(json.dumps(row) + "\n" for row in rows))

args = ToolExpanderConfig(
    output_dir=str(RUN),
    overwrite=True,
    prompts_per_step=12,
    num_generations=8,
    max_steps=6,
    max_completion_length=32,  # 128
    learning_rate=5e-4,  # 1e-6
    cold_start_steps=24,  # 0; random weights earn nothing before they have imitated the answers
    cold_start_batch_size=12,
    cold_start_learning_rate=4e-3,
)
summary = ToolExpanderTrainer(MODEL, prefer_insured, args, read_dataset(str(DATA))).train()
log = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
print("mean reward:", " ".join(f"{line['reward']:.2f}" for line in log if line["event"] == "step"))

model = AutoModelForCausalLM.from_pretrained(summary["checkpoint"])  # from here on transformers alone
tokenizer = AutoTokenizer.from_pretrained(summary["checkpoint"])
asked = [{"role": "user", "content": "Please book a tour."}]
form = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
prompt = tokenizer.apply_chat_template(asked, tools=[BOOK], **form)
answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
