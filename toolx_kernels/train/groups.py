"""From prompts to rollouts, and the groups of rollouts that a step learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from toolx_kernels.engine import Completion, RolloutEngine, SamplingParams
from toolx_kernels.toolcall.rewards import completion_turns
from toolx_kernels.toolcall.rows import Row


@dataclass(slots=True)
class Rollout:
    """One completion of a row's prompt, as the trainer sees it.

    >>> Rollout([5, 9], [-0.1, -0.7], [0.4, 0.9], None, "hi", [{"role": "assistant", "content": "hi"}], "stop")
    ... # doctest: +SKIP
    """

    ids: list[int]  # all completion tokens; of several turns also the tokens of tool outputs between them
    logprobs: list[float]  # the sampler's, one per id; 0.0 at tool outputs
    entropies: list[float]  # one per id; 0.0 at tool outputs
    mask: list[bool] | None  # which ids the model wrote; None: all of them
    text: str  # what the model wrote, turns joined by newlines, special tokens skipped
    messages: list[dict]  # the completion as chat messages: assistant turns and tool messages in order
    finish_reason: str  # "stop", "length", "cancelled" (of the engine); "turns" when the turn limit ended it

    @property
    def written(self) -> int:
        """How many tokens the model wrote."""
        return len(self.ids) if self.mask is None else sum(self.mask)

    @property
    def judged(self) -> str | list[str]:
        """Its text, or those of its turns where there are several."""
        turns = completion_turns(self.messages)
        return turns if len(turns) > 1 else self.text


class Sampler(Protocol):
    """How completions of prompts come about: in one turn (``SingleTurn``) or with tools in between (``ToolLoop``)."""

    def sample(
        self,
        rows: Sequence[Row],
        prompts: Sequence[list[int]],
        n: int,
        params: SamplingParams,
        *,
        row_ids: Sequence[int],
        step: int = 0,
        first_rollout: int | Sequence[int] = 0,
        on_rollout: Callable[[int, int, Rollout], bool] | None = None,
    ) -> list[list[Rollout]]:
        """``n`` rollouts of each prompt, in order; ``prompts[i]`` is that of ``rows[i]``.

        ``on_rollout(place, rollout, what)`` hears of each that ends by itself; True cancels the rest of its group.
        """


@dataclass(slots=True)
class SingleTurn:
    """The engine's completions as they are."""

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase

    def sample(self, rows, prompts, n, params, *, row_ids, step=0, first_rollout=0, on_rollout=None):
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


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group that a step is to sample: rollouts that are compared with each other.

    row      index of the training row
    shown    the demonstrations in the prompt of the first ``num_generations`` rollouts, of the next, ...
    learned  the demonstrations in the prompt on which the loss scores all of them

    >>> GroupPlan(7).shown  # raw
    ((),)
    """

    row: int
    shown: tuple[tuple[Row, ...], ...] = ((),)
    learned: tuple[Row, ...] = ()


@dataclass(slots=True)
class ScoredGroup:
    """A sampled group with what its rollouts earned."""

    plan: GroupPlan
    prompt: list[int]  # on which the loss scores the rollouts
    rollouts: list[Rollout]
    sampled_here: list[bool]  # whether a rollout was sampled on ``prompt``
    rewards: list[float] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # of the rewards, by function
    correct: list[bool] = field(default_factory=list)
    advantages: list[float] = field(default_factory=list)

    @property
    def equal_rewards(self) -> bool:
        """Nothing can be learned from it; decided by comparing, as the mean of equal floats may differ from them."""
        return min(self.rewards) == max(self.rewards)
