"""Rollouts, and the protocol of what makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from toolx_kernels.engine import Completion, RolloutEngine, SamplingParams
from toolx_kernels.toolcall.rewards import completion_turns
from toolx_kernels.toolcall.rows import Row


@dataclass(slots=True)
class Rollout:
    """One completion of a row's prompt, as the trainer sees it.

    >>> turn = {"role": "assistant", "content": "hi"}
    >>> rollout = Rollout([5, 9], [-0.1, -0.7], [0.4, 0.9], None, "hi", [turn], "stop")
    >>> rollout.written, rollout.answer_text
    (2, 'hi')
    """

    ids: list[int]  # all completion tokens; of several turns also the tokens of tool outputs between them
    logprobs: list[float]  # the sampler's, one per id; 0.0 at tool outputs
    entropies: list[float]  # one per id; 0.0 at tool outputs
    mask: list[bool] | None  # which ids the model wrote; None: all of them
    text: str  # what the model wrote, turns joined by newlines, as ``Chat.written_text`` has it
    messages: list[dict]  # the completion as chat messages: assistant turns and tool messages in order
    finish_reason: str  # "stop", "length", "cancelled" (of the engine); "turns" when the turn limit ended it
    old_logprobs: Tensor | None = None  # one per id, on the CPU: of the policy that an update's ratios start from
    ref_logprobs: Tensor | None = None  # the same of the reference model

    @property
    def written(self) -> int:
        """How many tokens the model wrote."""
        return len(self.ids) if self.mask is None else sum(self.mask)

    @property
    def answer_text(self) -> str | list[str]:
        """Its text, or those of its turns where there are several."""
        turns = completion_turns(self.messages)
        return turns if len(turns) > 1 else self.text


def written_ids(completion: Completion) -> list[int]:
    """What a completion says: its tokens without the one that stopped it."""
    return completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids


# Called with (place of the prompt, rollout index, rollout) for each rollout that finishes on its own; True cancels the
# rest of its group.
OnRollout = Callable[[int, int, Rollout], bool]


class Rollouter(Protocol):
    """What makes rollouts of prompts: in one turn (``SingleTurn``), or with tools in between (``ToolLoop``)."""

    engine: RolloutEngine

    def offer(self, rows: list[Row]) -> list[Row]:
        """The rows with what the rollouter offers the model besides their own tools."""

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
        """``n`` rollouts of each prompt, in order; ``prompts[i]`` is that of ``rows[i]``."""
