"""A scripted sampler without a model, for tests of what a run does with rollouts."""

import copy
import random
from collections.abc import Callable
from functools import cache

import torch
from transformers import LlamaForCausalLM

from tests.train.test_trainer import SMALL, training_rows
from toolx_kernels.models.load import load_model
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.datasets import builtin
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.train.config import ToolExpanderConfig
from toolx_kernels.train.trainer import ToolExpanderTrainer

PLACES = {row.id: place for place, row in enumerate(training_rows())}
SHARES = (0.25, 0.5, 0.75)
CHATTER = "chatter"  # the right calls, next to other text


class Scripted:
    """Writes the answer if ``right(row, help, index)`` is True, text and answer if it is ``CHATTER``, else nonsense.

    ``help`` is "raw" or "demonstrations", the share of the answer that a hint shows, or the prompt's text. As with the
    engine, the text depends only on the prompt, the stream, the row's id in it and the rollout's index. Each rollout
    ends with ``tool`` random tokens, masked like the output of a tool. Greedy answers are nonsense.

    asked  stream, rows and prompts of each call
    """

    def __init__(self, trainer, right: Callable[[Row, str | float, int], bool | str], tool: int = 0):
        self.engine, self.prompts, self.right, self.tool = trainer.engine, trainer.task.prompts, right, tool
        self.asked: list[tuple[int, list[Row], list[list[int]]]] = []

    def offer(self, rows):
        return rows

    def help_of(self, row, prompt):
        if prompt == self.prompts.ids(row):
            return "raw"
        text = self.prompts.chat.tokenizer.decode(prompt)
        if "Example:" in text:
            return "demonstrations"
        shares = (s for s in SHARES if prompt == self.prompts.ids(row, (), self.prompts.hint(row, s)))
        return next(shares, text)

    def roll_out(self, rows, prompts, n, params, *, row_ids, step=0, first_rollout=0, on_rollout=None):
        self.asked.append((step, list(rows), list(prompts)))
        groups = []
        for place, (row, prompt, row_id) in enumerate(zip(rows, prompts, row_ids, strict=True)):
            help, rollouts = self.help_of(row, prompt), []
            for index in range(first_rollout, first_rollout + n):
                rng = random.Random(f"{step} {row_id} {index} {prompt}")
                right = params.temperature > 0 and self.right(row, help, index)
                rollouts.append(self._rollout(row, prompt, right, rng))
                if on_rollout and on_rollout(place, index, rollouts[-1]):
                    break
            groups.append(rollouts)
        return groups

    def _rollout(self, row, prompt, right, rng):
        chat = self.prompts.chat
        if right == CHATTER:
            ids = chat.turn_ids(f"Here it is: {chat.tool_format.render(row.answer)}", prompt)
        elif right:
            ids = chat.completion_ids(row.answer, prompt)
        else:
            ids = [*rng.choices(range(300, 500), k=rng.randint(3, 7)), chat.tokenizer.eos_token_id]
        text = chat.written_text(ids[:-1], prompt)
        mask = [True] * len(ids) + [False] * self.tool if self.tool else None
        ids = ids + rng.choices(range(300, 500), k=self.tool)
        zeros = [0.0] * len(ids)
        return Rollout(ids, zeros, zeros, mask, text, [{"role": "assistant", "content": text}], "stop")


@cache
def _tiny():
    return load_model("tiny")


def smaller_tokenizer():
    return _tiny()[1]


def smaller_model():
    """The tiny model with one layer and few dimensions, because its output does not matter."""
    config = copy.deepcopy(_tiny()[0].config)
    config.update(dict(hidden_size=32, intermediate_size=32, head_dim=16, num_hidden_layers=1))
    config.update(dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2))
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def scripted_trainer(folder, right, reward_funcs=None, tool=0, more=(), policies=None, **settings):
    """A trainer whose rollouter is a ``Scripted``, by default with the default reward; ``more`` adds demonstrations."""
    settings = SMALL | {"cold_start_steps": 0, "max_completion_length": 64} | settings
    args = ToolExpanderConfig(output_dir=str(folder), **settings)
    held_out = builtin.heldout_rows(2, 0, ("easy",))
    rows = training_rows(), held_out, smaller_tokenizer()
    trainer = ToolExpanderTrainer(smaller_model(), reward_funcs, args, *rows, demonstrations=more, **policies or {})
    trainer.rollouter = trainer.collector.rollouter = Scripted(trainer, right, tool)
    # these take longer than a step
    trainer.reporter.plan, trainer.reporter._gemm_speed = (lambda workload: None), 1.0
    return trainer
