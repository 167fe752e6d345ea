"""Rollouts of a single turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from toolx_kernels.engine import Completion, RolloutEngine, SamplingParams
from toolx_kernels.rollout.rollout import OnRollout, Rollout, written_ids
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.rows import Row


@dataclass(slots=True)
class SingleTurn:
    """A rollouter whose rollouts are single completions of the engine."""

    engine: RolloutEngine
    chat: Chat

    def offer(self, rows: list[Row]) -> list[Row]:
        return rows

    def roll_out(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        n: int,
        params: SamplingParams,
        *,
        row_ids: Sequence[int],
        step: int = 0,
        first_rollout: int | Sequence[int] = 0,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """See ``Rollouter``."""

        made: dict[int, Rollout] = {}  # by the identity of its completion, so that no text is decoded twice

        def ended(place: int, index: int, completion: Completion) -> bool:
            assert on_rollout is not None
            made[id(completion)] = self._rollout(completion, prompts[place])
            return on_rollout(place, index, made[id(completion)])

        groups = self.engine.generate(
            prompts,
            n,
            params,
            row_ids=row_ids,
            step=step,
            first_rollout=first_rollout,
            on_completion=ended if on_rollout else None,
        )
        return [
            [made.get(id(each)) or self._rollout(each, group.prompt_ids) for each in group.completions]
            for group in groups
        ]

    def _rollout(self, completion: Completion, prompt: Sequence[int]) -> Rollout:
        text = self.chat.written_text(written_ids(completion), prompt)
        messages = [{"role": "assistant", "content": text}]
        return Rollout(
            completion.ids, completion.logprobs, completion.entropies, None, text, messages, completion.finish_reason
        )
