"""Tool loop: rollouts of several turns, in which the model calls tools, reads their results, and continues.

    all episodes: one engine call per turn -> parse the calls -> run them in parallel -> append the results -> repeat

An episode is one growing completion: the sampled tokens of each turn, and between turns the tokens with which the chat
template shows tool results, which are context and never trained on. ``max_new_tokens`` bounds the whole episode, tool
results included, like TRL's ``max_completion_length``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from toolx_kernels.engine import Completion, RolloutEngine, SamplingParams
from toolx_kernels.errors import InputError
from toolx_kernels.rollout.prompts import Prompts
from toolx_kernels.rollout.rollout import OnRollout, Rollout, written_ids
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.rows import Row
from toolx_kernels.toolcall.strict_json import encodable
from toolx_kernels.toolcall.tools import Session, Toolbox, error_text

MALFORMED = error_text("malformed tool call")


@dataclass(slots=True, eq=False)
class _Episode:
    """One rollout in progress."""

    place: int  # of its prompt in the call
    row_id: int
    index: int  # of the rollout
    prompt: Sequence[int]
    session: Session
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of the turns
    messages: list[dict] = field(default_factory=list)
    finish_reason: str = ""
    calls: list[dict] | None = None  # of the turn that ended last; None: malformed

    def write(self, completion: Completion, text: str) -> None:
        """Appends a turn of the model."""
        self.ids += completion.ids
        self.logprobs += completion.logprobs
        self.entropies += completion.entropies
        self.mask += [True] * len(completion.ids)
        self.texts.append(text)
        self.messages.append({"role": "assistant", "content": text})

    def read(self, messages: list[dict], ids: list[int]) -> None:
        """Appends tool messages and their tokens."""
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.entropies += [0.0] * len(ids)
        self.mask += [False] * len(ids)
        self.messages += messages

    def rollout(self) -> Rollout:
        mask = None if all(self.mask) else self.mask
        text = "\n".join(self.texts)
        return Rollout(self.ids, self.logprobs, self.entropies, mask, text, self.messages, self.finish_reason)


class ToolLoop:
    """Samples episodes with tool calls, from prompts of rows that ``offer`` returned.

    Args:
        engine, prompts: of the model.
        tools, environment_factory: see ``Toolbox``; as in TRL.
        max_turns: turns of the model in one episode; the calls of the last one are not run. (TRL's
            ``max_tool_calling_iterations`` counts the rounds of calls in between: one less.)
        tool_timeout: seconds that one call may take.

    An episode ends with a turn without calls ("stop"), a turn that is cut off or results that leave no room for another
    token and are left out ("length"), or at the turn limit ("turns"). For calls that are malformed, unknown or wrong,
    fail or take too long, the model reads ``{"error": "..."}``.

    Raises:
        InputError: ``max_turns`` below 1, invalid tools (see ``Toolbox``), or a chat template that does not show the
            assistant's text.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        prompts: Prompts,
        *,
        tools: Sequence[Callable] = (),
        environment_factory: Callable[[], Any] | None = None,
        max_turns: int,
        tool_timeout: float,
    ):
        if max_turns < 1:
            raise InputError(f"max_turns={max_turns} must be at least 1: an episode has at least one turn.")
        prompts.chat.conventions.after_turn([])
        self.engine, self.chat, self.context, self.max_turns = engine, prompts.chat, prompts.context, max_turns
        self.toolbox = Toolbox(tools, environment_factory, timeout=tool_timeout)

    def offer(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the schemas of our tools and the texts of ``reset``, for prompts; see ``Toolbox.offer``."""
        return self.toolbox.offer(rows)

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
        """See ``Rollouter``; a rollout is an episode.

        A token is a function of (seed, step, row id, rollout index, position), whatever else is sampled with it. In the
        first turn the rest of a group is cancelled at once, later at the end of the turn.
        """
        sessions = iter(self.toolbox.open([row for row in rows for _ in range(n)]))
        firsts = [first_rollout] * len(prompts) if isinstance(first_rollout, int) else first_rollout
        groups = [
            [_Episode(place, row_id, first + i, prompt, next(sessions)) for i in range(n)]
            for place, (prompt, row_id, first) in enumerate(zip(prompts, row_ids, firsts, strict=True))
        ]
        solved: set[int] = set()  # places whose group is no longer needed

        def end(episode: _Episode, reason: str) -> bool:
            episode.finish_reason = reason
            if on_rollout is not None and on_rollout(episode.place, episode.index, episode.rollout()):
                solved.add(episode.place)
            return episode.place in solved

        def going_on() -> list[_Episode]:
            return [e for group in groups for e in group if not e.finish_reason and e.place not in solved]

        turn = groups  # the episodes of an entry share their tokens so far
        while turn:
            self._write(turn, params, step, end)
            self._use_tools(going_on(), params, end)
            turn = [[episode] for episode in going_on()]
        for episode in (e for group in groups for e in group):
            episode.finish_reason = episode.finish_reason or "cancelled"
        return [[episode.rollout() for episode in group] for group in groups]

    def _write(self, turn: list[list[_Episode]], params: SamplingParams, step: int, end: Callable) -> None:
        """Samples one turn of the model in all episodes of ``turn``."""

        def ended(place: int, index: int, completion: Completion) -> bool:
            episode = turn[place][index - turn[place][0].index]
            text = self._text(episode, completion)
            episode.write(completion, text)
            episode.calls = self.chat.read(text).calls
            if completion.finish_reason == "length":
                return end(episode, "length")
            if episode.calls == []:
                return end(episode, "stop")
            return len(episode.texts) == self.max_turns and end(episode, "turns")

        leaders = [episodes[0] for episodes in turn]
        sampled = self.engine.generate(
            [[*leader.prompt, *leader.ids] for leader in leaders],
            len(turn[0]),
            params,
            row_ids=[leader.row_id for leader in leaders],
            step=step,
            first_rollout=[leader.index for leader in leaders],
            limits=[params.max_new_tokens - len(leader.ids) for leader in leaders],
            on_completion=ended,
        )
        for episodes, group in zip(turn, sampled, strict=True):
            for episode, completion in zip(episodes, group.completions, strict=True):
                if completion.finish_reason == "cancelled":
                    episode.write(completion, self._text(episode, completion))

    def _text(self, episode: _Episode, completion: Completion) -> str:
        return self.chat.written_text(written_ids(completion), episode.ids or episode.prompt)

    def _use_tools(self, episodes: list[_Episode], params: SamplingParams, end: Callable) -> None:
        """Runs the calls of all episodes and appends their results."""
        results = self.toolbox.answer([(episode.session, episode.calls or []) for episode in episodes])
        for episode, texts in zip(episodes, results, strict=True):
            names = [encodable(call["name"]) for call in episode.calls or []]
            messages = [
                {"role": "tool", "name": name, "content": text}
                for name, text in zip(names or ["unknown"], texts or [MALFORMED], strict=True)
            ]
            ids = self.chat.tool_turn_ids(messages)
            length = len(episode.ids) + len(ids)
            if length < params.max_new_tokens and len(episode.prompt) + length < self.context:
                episode.read(messages, ids)
            else:
                end(episode, "length")


def supervised_episode(
    chat: Chat, row: Row, prompt: Sequence[int], turns: Sequence[dict]
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole episode to imitate after ``prompt``, and a mask of those that the model must write.

    ``turns`` are chat messages as in ``Rollout.messages``: turns of the assistant, each but the last followed by the
    tool messages that answer it. Instead of text a turn may have ``calls``, which are written in the tool format of
    ``chat``. Each turn ends with the end-of-turn token.

    Raises:
        InputError: the messages are not in this order; names ``row``.
    """
    roles = [message["role"] for message in turns]
    if not re.fullmatch("assistant( (tool )+assistant)*", " ".join(roles)):
        raise InputError(
            f"The turns to imitate for row {row.id!r} have the roles {', '.join(roles) or '(none)'}: begin and end "
            "with the assistant, and answer each of its other turns with tool messages."
        )
    ids: list[int] = []
    mask: list[bool] = []
    for role, messages in groupby(turns, key=lambda message: message["role"]):
        if role == "assistant":
            (message,) = messages
            context = ids or prompt
            if "calls" in message:
                new = chat.completion_ids(message["calls"], context)
            else:
                new = chat.turn_ids(message["content"], context)
        else:
            new = chat.tool_turn_ids(list(messages))
        ids += new
        mask += [role == "assistant"] * len(new)
    return ids, mask
