"""Rollouts, and the protocol ``Rollouter`` of the classes that make them."""

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
    old_logprobs: Tensor | None = None  # one per id, on the CPU: of the policy to which an update's ratios compare
    ref_logprobs: Tensor | None = None  # likewise, of the reference model

    @property
    def written(self) -> int:
        """The number of tokens that the model wrote."""
        return len(self.ids) if self.mask is None else sum(self.mask)

    @property
    def answer_text(self) -> str | list[str]:
        """The text, or a list of the turns' texts if there are several."""
        turns = completion_turns(self.messages)
        return turns if len(turns) > 1 else self.text


def written_ids(completion: Completion) -> list[int]:
    """The tokens of a completion without the one that stopped it."""
    return completion.ids[:-1] if completion.finish_reason == "stop" else completion.ids


# Called with (position of the prompt, rollout index, rollout) for each rollout that finishes on its own; True cancels
# the rest of its group.
OnRollout = Callable[[int, int, Rollout], bool]


class Rollouter(Protocol):
    """Makes rollouts of prompts: in one turn (``SingleTurn``), or in several turns with tools (``ToolLoop``)."""

    engine: RolloutEngine

    def offer(self, rows: list[Row]) -> list[Row]:
        """The rows with the tools that the rollouter offers in addition to their own."""

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
        """Samples ``n`` rollouts of each prompt, in order; ``prompts[i]`` is the prompt of ``rows[i]``."""
