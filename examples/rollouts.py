"""Groups of rollouts from an unmodified transformers model: log-probs, stop tokens, and leaving a group early.

python examples/rollouts.py   # prints completions, what transformers says of their log-probs, and tokens saved
"""

import torch

from toolx_kernels import RolloutEngine, SamplingParams, load_model

MODEL = "tiny"  # random weights write nonsense; for a real model: "Qwen/Qwen2.5-0.5B-Instruct"

model, tokenizer = load_model(MODEL)
engine = RolloutEngine(model, seed=0)
questions = ["Please find a room.", "Please cancel a room."]
prompts = [
    tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)["input_ids"]
    for question in questions
]
# a completion ends with a turn, or already with a sentence
stops = (tokenizer.eos_token_id, *tokenizer.encode(".", add_special_tokens=False))
params = SamplingParams(max_new_tokens=64, temperature=0.7, stop_token_ids=stops)

for question, group in zip(questions, engine.generate(prompts, 4, params), strict=True):
    print(question)
    for completion in group.completions:
        text, logprob = tokenizer.decode(completion.ids), sum(completion.logprobs)
        print(f"  {completion.finish_reason}, {len(completion.ids)} tokens, log-prob {logprob:.1f}: {text[:40]!r}")

# the log-probs are those of the model itself, at the sampling temperature
ids = torch.tensor([group.prompt_ids + completion.ids], device=model.device)
with torch.no_grad():
    logprobs = (model(ids).logits[0].float() / params.temperature).log_softmax(-1)
plain = logprobs[len(group.prompt_ids) - 1 : -1].gather(1, ids[0, len(group.prompt_ids) :, None])[:, 0]
difference = (plain.cpu() - torch.tensor(completion.logprobs)).abs().max()
print(f"largest difference from transformers' log-probs: {difference:.0e}")


def sentence(prompt: int, rollout: int, completion) -> bool:
    """Called with each completion when it ends; True cancels the others of its prompt."""
    return completion.ids[-1] in stops


left = engine.generate(prompts, 16, params, step=1, on_completion=sentence)
whole = engine.generate(prompts, 16, params, step=1)
count = [sum(len(completion.ids) for group in groups for completion in group.completions) for groups in (left, whole)]
print(f"leaving groups at their first sentence: {count[0]} tokens instead of {count[1]}")
