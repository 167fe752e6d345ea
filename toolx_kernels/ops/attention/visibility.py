"""Visibility in a pack: the keys that a query sees."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NO_WINDOW = 2**30  # positions


class Tokens(NamedTuple):
    """Per token, what visibility depends on; all of one shape, (N) for a pack."""

    segment: Tensor  # a unique number for each prompt and each completion of the pack
    prompt: Tensor  # the number of the prompt that the token belongs to or follows
    position: Tensor  # position id

    def at(self, index: Tensor) -> Tokens:
        return Tokens(self.segment[index], self.prompt[index], self.position[index])


def sees(query: Tokens, key: Tokens, window: int | Tensor) -> Tensor:
    """Whether a query sees a key: of its prompt or of its own segment, up to itself, within ``window`` positions."""
    later_by = query.position - key.position
    own = (key.segment == query.segment) | (key.segment == query.prompt)
    return own & (later_by >= 0) & (later_by < window)
