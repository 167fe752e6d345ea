"""The fused GRPO loss in a training loop of your own, with transformers' generate and torch's AdamW around it.

python examples/loss_in_your_trainer.py   # a model learns to write digits: prints the mean reward of every step
"""

import torch
from torch.nn.functional import pad

from toolx_kernels import GRPOLossConfig, linear_grpo_loss, load_model

MODEL, LEARNING_RATE = "tiny", 5e-3  # for a real model: "Qwen/Qwen2.5-0.5B-Instruct", 1e-6
GROUP, STEPS, UPDATES = 16, 6, 2  # completions of a prompt; batches; updates from each batch


def reward(text: str) -> float:
    """The share of characters that are digits."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


torch.manual_seed(0)
model, tokenizer = load_model(MODEL)
tokenizer.padding_side = "left"
optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
questions = ["Tell me a number.", "How much is it?"]
prompts = tokenizer.apply_chat_template(
    [[{"role": "user", "content": question}] for question in questions],
    add_generation_prompt=True,
    padding=True,
    return_tensors="pt",
    return_dict=True,
).to(model.device)
length = prompts["input_ids"].shape[1]

for step in range(1, STEPS + 1):
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=16)
    ids = model.generate(**prompts, **sampling, num_return_sequences=GROUP)
    completions = ids[:, length:]
    ends = (completions == tokenizer.eos_token_id).int()
    written = ends.cumsum(1) == ends  # up to the first end of turn, which is written too
    attended = torch.cat([prompts["attention_mask"].repeat_interleave(GROUP, 0), written], dim=1)
    positions = (attended.cumsum(1) - 1).clamp(min=0)
    rewards = torch.tensor([reward(text) for text in tokenizer.batch_decode(completions, skip_special_tokens=True)])
    old_logprobs = None  # until the first update has told them
    for _ in range(UPDATES):
        hidden = model.get_decoder()(ids, attended, positions, use_cache=False).last_hidden_state
        out = linear_grpo_loss(
            hidden[:, length - 1 : -1][written],  # (N, D) the states that predict completion tokens, packed
            model.get_output_embeddings().weight,  # (V, D) the logits are never in memory
            completions[written],  # (N)
            cu_seqlens=pad(written.sum(1).cumsum(0), (1, 0)).int(),  # where completions begin and end
            rewards=rewards.to(model.device),
            group_size=GROUP,
            old_logprobs=old_logprobs,
            config=GRPOLossConfig(epsilon=0.2, epsilon_high=0.26),
        )
        old_logprobs = out.logprobs if old_logprobs is None else old_logprobs
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"step {step}: mean reward {rewards.mean():.3f}")
