"""A LoRA adapter: trained, merged into its base by peft, and used with plain transformers.

python examples/lora.py   # prints the mean reward of each step, then what the merged model earns and writes
"""

import json
from pathlib import Path

from peft import PeftModel  # pip install 'toolx_kernels[lora]'
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolx_kernels import ToolExpanderConfig, ToolExpanderTrainer, load_model

MODEL = "tiny"  # for a real model: "Qwen/Qwen2.5-0.5B-Instruct", and the values behind the settings below
RUN, MERGED = Path("runs/lora"), Path("runs/lora-merged")
QUESTIONS = ("Tell me a number.", "How much is it?")


def digits(prompts, completions, completion_ids, **columns) -> list[float]:
    """The share of characters that are digits."""
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


args = ToolExpanderConfig(
    output_dir=str(RUN),
    overwrite=True,
    use_peft=True,
    lora_r=8,
    lora_alpha=64,  # 16
    prompts_per_step=2,
    num_generations=32,
    num_iterations=2,
    max_steps=8,
    max_completion_length=8,  # 32
    temperature=1.0,
    learning_rate=2e-2,  # 1e-5
    lr_decay=1.0,
)
rows = [{"prompt": question, "tools": [], "answer": []} for question in QUESTIONS]
summary = ToolExpanderTrainer(MODEL, digits, args, rows).train()
log = [json.loads(line) for line in (RUN / "metrics.jsonl").open()]
print("mean reward:", " ".join(f"{line['reward']:.2f}" for line in log if line["event"] == "step"))

base, tokenizer = load_model(MODEL)
PeftModel.from_pretrained(base, summary["checkpoint"]).merge_and_unload().save_pretrained(MERGED)
tokenizer.save_pretrained(MERGED)

model = AutoModelForCausalLM.from_pretrained(MERGED)  # from here on transformers alone
tokenizer = AutoTokenizer.from_pretrained(MERGED)
form = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[0]}], **form)
sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=8, num_return_sequences=32)
texts = tokenizer.batch_decode(model.generate(**prompt, **sampling)[:, prompt["input_ids"].shape[1] :])
print(f"merged: mean reward {sum(digits(None, texts, None)) / len(texts):.2f}, as in {texts[0]!r}")
