"""Rollouts of one turn."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from toolx_kernels.engine import Completion, RolloutEngine
from toolx_kernels.rollout.rollout import Rollout
from toolx_kernels.toolcall.rows import Row


@dataclass(slots=True)
class SingleTurn:
    """The engine's completions as they are."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase

    def offer(self, rows: list[Row]) -> list[Row]:
        return rows

    def roll_out(self, rows, prompts, n, params, *, row_ids, step=0, first_rollout=0, on_rollout=None):
        def heard(place: int, rollout: int, completion: Completion) -> bool:
            return on_rollout(place, rollout, self._rollout(completion))

        groups = self.engine.generate(
            prompts,
            n,
            params,
            row_ids=row_ids,
            step=step,
            first_rollout=first_rollout,
            on_completion=heard if on_rollout else None,
        )
        return [[self._rollout(completion) for completion in group.completions] for group in groups]

    def _rollout(self, completion: Completion) -> Rollout:
        text = self.tokenizer.decode(completion.ids, skip_special_tokens=True)
        messages = [{"role": "assistant", "content": text}]
        return Rollout(
            completion.ids, completion.logprobs, completion.entropies, None, text, messages, completion.finish_reason
        )
