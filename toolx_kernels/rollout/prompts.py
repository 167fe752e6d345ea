"""Prompts of rows as token ids."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from typing import Literal

from toolx_kernels.errors import InputError, counted
from toolx_kernels.toolcall.chat import Chat
from toolx_kernels.toolcall.rows import Row

Overlong = Literal["error", "drop"]


class Prompts:
    """Makes the token ids of rows' prompts, with or without demonstrations, within a model's context."""

    def __init__(self, chat: Chat, context: int, instructions: str = ""):
        self.chat, self.context, self.instructions = chat, context, instructions
        # keyed by identity: row ids are unique only within a dataset, and a row in the cache keeps its address;
        # 4-byte numbers, because a large dataset has tens of millions of tokens
        self._cache: dict[int, tuple[Row, array]] = {}

    def ids(self, row: Row, demonstrations: Sequence[Row] = (), hint: str = "") -> list[int]:
        """The prompt of a rollout; raw prompts are cached. A hint is placed like demonstrations."""
        if demonstrations or hint:
            return self.render(row, demonstrations, "\n\n".join(filter(None, [self.instructions, hint])))
        if id(row) not in self._cache:
            self._cache[id(row)] = row, array("i", self.render(row))
        return self._cache[id(row)][1].tolist()

    def render(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str | None = None) -> list[int]:
        """The prompt without the cache; ``instructions`` replaces those of all prompts."""
        instructions = self.instructions if instructions is None else instructions
        try:
            return self.chat.prompt_ids(row, demonstrations, instructions)
        except InputError as error:
            raise InputError(f"Row {row.id}: {error}") from None

    def hint(self, row: Row, share: float, room: int = 1) -> str:
        """A sentence with the first ``share`` of the tokens of the row's answer; "" if that is no text or leaves less
        room than ``fitting`` requires."""
        answer = self.chat.completion_ids(row.answer)[:-1]
        beginning = self.chat.quoted(answer[: math.ceil(share * len(answer))])
        text = f"The answer begins: {beginning}"
        room = min(room, self.context - len(self.ids(row)))
        return text if beginning and len(self.ids(row, (), text)) + room <= self.context else ""

    def fitting(self, row: Row, demonstrations: Sequence[Row], room: int = 1) -> list[Row]:
        """The demonstrations, taken in order, that leave ``room`` tokens of the context for the answer, or as many as
        the raw prompt leaves."""
        room = min(room, self.context - len(self.ids(row)))
        shown: list[Row] = []
        for demonstration in demonstrations:
            if len(self.ids(row, [*shown, demonstration])) + room <= self.context:
                shown.append(demonstration)
        return shown

    def fitting_rows(self, rows: Sequence[Row], overlong: Overlong, answers: bool = False) -> list[Row]:
        """The rows whose raw prompt leaves room for an answer; with ``answers``, for the row's own.

        Raises InputError, with the number of rows that do not fit and the longest one, unless all fit, or ``overlong``
        is "drop" and some do.
        """
        lengths = []
        for row in rows:
            ids = self.ids(row)
            lengths.append(len(ids) + (len(self.chat.completion_ids(row.answer, ids)) if answers else 1))
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= self.context]
        if len(kept) < len(rows) and (overlong == "error" or not kept):
            what = "prompt and answer have" if answers else "prompt and a token of answer have"
            remedy = "do without a cold start" if answers else "take a model with a longer context"
            if overlong == "drop":
                shortest, row = min(zip(lengths, rows, strict=True), key=lambda of_row: of_row[0])
                raise InputError(
                    f"None of {counted(len(rows), 'row')} is left, as none fits the model's context of {self.context} "
                    f"tokens; the shortest is {row.id}, whose {what} {shortest}: shorten its tools, or {remedy}."
                )
            longest, row = max(zip(lengths, rows, strict=True), key=lambda of_row: of_row[0])
            raise InputError(
                f"{len(rows) - len(kept)} of {len(rows)} rows do not fit the model's context of {self.context} tokens; "
                f"the longest is {row.id}, whose {what} {longest}: shorten its tools, pass --overlong drop to leave "
                f"such rows out, or {remedy}."
            )
        return kept

    def digest(self, rows: Sequence[Row]) -> str:
        """A hash of the raw prompts of these rows."""
        state = hashlib.sha256()
        for row in rows:
            state.update(array("i", self.ids(row)).tobytes())
        return state.hexdigest()
