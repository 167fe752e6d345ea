"""Prompts of rows as token ids."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from toolx_kernels.errors import InputError
from toolx_kernels.toolcall.render import render_completion, render_prompt
from toolx_kernels.toolcall.rows import Row


class Prompts:
    """Token ids of rows, with or without demonstrations, within a model's context."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: int, instructions: str = ""):
        self.tokenizer, self.context, self.instructions = tokenizer, context, instructions
        # by identity: ids are unique within a dataset only, and the row that is kept with its ids keeps its address;
        # as 4-byte numbers, since a large dataset has tens of millions of tokens
        self._cache: dict[int, tuple[Row, array]] = {}

    def ids(self, row: Row, demonstrations: Sequence[Row] = ()) -> list[int]:
        """The prompt that a rollout begins with; raw ones are kept."""
        if demonstrations:
            return self.render(row, demonstrations)
        if id(row) not in self._cache:
            self._cache[id(row)] = row, array("i", self.render(row))
        return self._cache[id(row)][1].tolist()

    def render(self, row: Row, demonstrations: Sequence[Row] = (), instructions: str | None = None) -> list[int]:
        """The same, made anew; with other instructions than those of all prompts."""
        instructions = self.instructions if instructions is None else instructions
        return render_prompt(self.tokenizer, row, demonstrations, instructions)

    def fitting(self, row: Row, demonstrations: Sequence[Row], room: int = 1) -> list[Row]:
        """Those of the demonstrations, from the first on, that leave ``room`` tokens of the context to the answer, or
        as many as the raw prompt leaves."""
        room = min(room, self.context - len(self.ids(row)))
        shown: list[Row] = []
        for demonstration in demonstrations:
            if len(self.ids(row, [*shown, demonstration])) + room <= self.context:
                shown.append(demonstration)
        return shown

    def check(self, rows: Sequence[Row]) -> None:
        """Raises InputError for the first row whose raw prompt leaves no room for an answer."""
        for row in rows:
            if (length := len(self.ids(row))) >= self.context:
                raise InputError(
                    f"Row {row.id}: its prompt has {length} tokens and the model's context is {self.context}: remove "
                    "the row or shorten its tools."
                )

    def check_answers(self, rows: Sequence[Row]) -> None:
        """Raises InputError for the first row whose prompt and answer do not fit together."""
        for row in rows:
            length = len(self.ids(row)) + len(self.completion_ids(row.answer))
            if length > self.context:
                raise InputError(
                    f"Row {row.id}: its prompt and answer have {length} tokens and the model's context is "
                    f"{self.context}: remove the row, or do without a cold start."
                )

    def completion_ids(self, calls: Sequence[dict]) -> list[int]:
        """The canonical answer as token ids, with the end-of-turn token."""
        return self.turn_ids(render_completion(calls))

    def turn_ids(self, text: str) -> list[int]:
        """An assistant's turn as token ids, with the token that ends it."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
